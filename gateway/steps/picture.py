"""steps (pure): one encoded picture → its pixels. May use Pillow, numpy, header; knows no tensors.

Pillow sees only what `header` has accepted, and never reads EXIF: some of its versions spend gigabytes on hostile EXIF,
for a JPEG as soon as it is opened.
"""

from __future__ import annotations

import io
import math
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from gateway.errors import Overloaded
from gateway.steps.budget import MEMORY, TooLarge
from gateway.steps.header import BadPicture, Format, Header, strip_jpeg

_Made = TypeVar("_Made")

MOST_PIXELS = 89_000_000
"""The highest limit on pixels: just below the size at which Pillow begins to warn (2^30 / 12 pixels)."""

# Most bytes that a pixel takes, from `load` to the cut of `_fit`. Measured: how much the peak of resident memory grew,
# divided by the pixels, for pictures of 3000 x 3000 and 7000 x 1400; rounded up (Pillow 12, Linux).
# tests/steps/test_picture_memory.py measures it again. Pillow keeps RGB in 4 bytes.
_WEBP_BYTES: Final = 22  # two canvases, the decoder's buffer, the frame as bytes, the picture, its opaque copy
_BYTES: Final = {"1": 3, "L": 2, "P": 9, "RGB": 8, "CMYK": 13, "LA": 14, "RGBA": 13}
_BYTES_16_BIT: Final = 8
_BYTES_TRANSPARENT: Final = 14  # a grey, palette or colour PNG, of 8 or 16 bits, with a transparent colour
_RGB_BYTES: Final = 4
_OWN_BYTES: Final = {"1": 2, "L": 1, "P": 1, "I;16": 2}  # of a pixel in Pillow, for "1" with its grey; else as of RGB
_JPEG_COEFFICIENT: Final = 2  # bytes of a JPEG coefficient; all are freed before the picture is cut
_AT_LEAST: Final = 2 << 20  # bytes that any picture takes: tables, rows in between, the resized part

_OPENERS: dict[Format, type[ImageFile.ImageFile]] = {"JPEG": JpegImageFile, "PNG": PngImageFile, "WebP": WebPImageFile}

# `warnings.catch_warnings` replaces a global list, so only one thread at a time may use it.
_quiet = threading.Lock()

# The transposition that turns a stored picture upright, by its EXIF orientation
_T = Image.Transpose
_TURNS = {
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_270,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_90,
}

# Transpositions that put the right side first, and the bottom
_FROM_THE_RIGHT = (_T.FLIP_LEFT_RIGHT, _T.ROTATE_180, _T.TRANSVERSE, _T.ROTATE_90)
_FROM_THE_BOTTOM = (_T.FLIP_TOP_BOTTOM, _T.ROTATE_180, _T.TRANSVERSE, _T.ROTATE_270)

_BICUBIC_REACH = 2  # pixels, of the smaller picture, that the filter reads to either side

_MOST_ELONGATED = 4  # long side to short side of a picture that is resized; a longer one is cut first


@dataclass(frozen=True, slots=True)
class Fit:
    """How a picture is brought to a model's size, in pixels."""

    resize: int  # length of the short side after resizing
    crop: int  # side of the square that is then cut from the middle
    background: tuple[int, int, int] = (255, 255, 255)  # RGB colour behind transparent parts
    draft: bool = False  # may a JPEG be decoded at a fraction of its size that is still twice `resize`?


def decode(data: bytes, header: Header, fit: Fit) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Decode the first frame, turn it upright, resize and crop it.

    returns:  (3, crop, crop) RGB, or (1, crop, crop) if the picture is grey; only the view's last axis is contiguous.
    raises:   BadPicture if the data is damaged or incomplete, or needs more memory than the process may use;
              Overloaded if others use the memory.
    """
    turn = _TURNS.get(header.orientation)

    def fitted(picture: ImageFile.ImageFile, extent: tuple[float, float]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return _planes(_fit(_opaque(picture, fit.background), extent, turn, fit))

    return _decode(data, header, fit.resize if fit.draft else None, fitted, lambda picture: _memory_of(picture, header))


def decode_whole(
    data: bytes, header: Header, draft: int, more: int, make: Callable[[Image.Image, tuple[int, int]], _Made]
) -> _Made:
    """Decode the first frame whole, turn it upright, white behind transparent parts, and make something of it.

    draft:    a JPEG may be decoded at a fraction of its size whose short side is still twice this, in pixels.
    more:     bytes that `make` takes.
    make:     gets the picture in RGB, and the width and height that it has upright and at full size.
    returns:  what `make` returns.
    raises:   as `decode`, and what `make` raises.
    """
    turn = _TURNS.get(header.orientation)
    size = header.width, header.height
    upright = size[::-1] if turn in (_T.TRANSPOSE, _T.ROTATE_270, _T.TRANSVERSE, _T.ROTATE_90) else size

    def memory(picture: ImageFile.ImageFile) -> int:
        own = _OWN_BYTES.get(picture.mode, _RGB_BYTES)
        copies = _RGB_BYTES * ((picture.mode != "RGB") + (turn is not None))
        whole = _AT_LEAST + picture.width * picture.height * (own + copies)
        return max(_memory_of(picture, header), whole) + more

    def whole(picture: ImageFile.ImageFile, extent: tuple[float, float]) -> _Made:
        opaque = _opaque(picture, (255, 255, 255))
        rgb = opaque if opaque.mode == "RGB" else opaque.convert("RGB")
        return make(rgb if turn is None else rgb.transpose(turn), upright)

    return _decode(data, header, draft, whole, memory)


def _decode(
    data: bytes,
    header: Header,
    draft: int | None,
    make: Callable[[ImageFile.ImageFile, tuple[float, float]], _Made],
    memory: Callable[[ImageFile.ImageFile], int],
) -> _Made:
    """What `make` makes of the decoded picture and its exact size, while the memory for that is held."""
    try:
        # Pillow documents no closed set of what damaged data makes it raise; nothing but Pillow runs in here.
        with _open(data, header) as picture:
            extent = _draft(picture, draft) if draft is not None and header.format == "JPEG" else picture.size
            what = f"to decode this {header.format} of {header.width}x{header.height} pixels"
            with MEMORY.hold(memory(picture), what):
                picture.load()
                return make(picture, extent)
    except TooLarge as exc:
        right = "send it smaller, or as JPEG" if header.format != "JPEG" else "send it smaller"
        raise BadPicture(f"{exc}; {right}") from exc
    except MemoryError as exc:
        raise Overloaded("there is no memory left to decode a picture") from exc
    except (BadPicture, Overloaded):
        raise
    except Exception as exc:
        raise BadPicture(f"the {header.format} data is damaged or incomplete") from exc


def _memory_of(picture: ImageFile.ImageFile, header: Header) -> int:
    """Bytes of memory that decoding takes. picture: opened, but not loaded yet."""
    pixels = picture.width * picture.height  # a JPEG decoded at a fraction has fewer than its header says
    if header.format == "WebP":
        each = _WEBP_BYTES
    elif picture.has_transparency_data:
        each = max(_BYTES_TRANSPARENT, _BYTES.get(picture.mode, 0))
    else:
        each = _BYTES_16_BIT if picture.mode.startswith("I") else _BYTES.get(picture.mode, _WEBP_BYTES)
    coefficients = header.width * header.height * header.coefficients * _JPEG_COEFFICIENT
    return _AT_LEAST + int(max(pixels * each, pixels * 4 + coefficients))


def _planes(picture: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The pixels, channels first. Pillow writes them line by line ("RGB;L"), which numpy reorders much faster."""
    if picture.mode == "L":
        return np.asarray(picture)[None]
    lines = np.frombuffer(picture.tobytes("raw", "RGB;L"), np.uint8)
    return lines.reshape(picture.height, 3, picture.width).transpose(1, 0, 2)


def _open(data: bytes, header: Header) -> ImageFile.ImageFile:
    """Let Pillow read all that comes before the pixels.

    This calls the plugin itself: `Image.open` would also analyse JPEGs of several pictures (MPO).
    """
    bare = strip_jpeg(data) if header.format == "JPEG" else data
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged APNG blocks, which do no harm
        picture = _OPENERS[header.format](io.BytesIO(bare))
    if picture.size != (header.width, header.height):
        raise BadPicture("its size changes")  # the header's size was checked against the limit
    return picture


def _opaque(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The picture in 8-bit grey ("L") or RGB, with the background behind transparent parts."""
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        return _from_16_bit(picture, background)
    if picture.has_transparency_data:
        layer = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        under = Image.new("RGB", picture.size, background)
        under.paste(layer, mask=layer.getchannel("A"))
        return under
    if picture.mode in ("L", "RGB"):
        return picture
    return picture.convert("L" if picture.mode == "1" else "RGB")


def _from_16_bit(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    values = np.asarray(picture)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    see_through = picture.info.get("transparency")
    if see_through is None:
        return grey
    rgb = grey.convert("RGB")
    rgb.paste(background, mask=Image.fromarray((values == see_through).astype(np.uint8) * 255))
    return rgb


def _draft(picture: ImageFile.ImageFile, resize: int) -> tuple[float, float]:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 of its size if the short side is still twice `resize`.

    returns: the exact size; the picture's own is rounded up to whole pixels.
    """
    drafted = picture.draft(None, (2 * resize, 2 * resize))
    return drafted[1][2:] if drafted else picture.size


def _fit(picture: Image.Image, extent: tuple[float, float], turn: Image.Transpose | None, fit: Fit) -> Image.Image:
    """The middle of the resized picture, turned upright. The parts that are cut off are never computed.

    extent:  exact width and height, at most the picture's size.
    """
    picture, extent = _middle(picture, extent)
    width, height = extent
    short = min(width, height)
    size = int(width * fit.resize / short), int(height * fit.resize / short)
    left, top = _corner(size, turn, fit.crop)
    small = _resized(picture, extent, size, (left, top, left + fit.crop, top + fit.crop))
    return small if turn is None else small.transpose(turn)


def _corner(size: tuple[int, int], turn: Image.Transpose | None, crop: int) -> tuple[int, int]:
    """Where to crop before turning. An odd margin is rounded down on the left and top of the turned picture."""
    wide, high = size
    left, top = (wide - crop) // 2, (high - crop) // 2
    if turn in _FROM_THE_RIGHT:
        left = wide - crop - left
    if turn in _FROM_THE_BOTTOM:
        top = high - crop - top
    return left, top


def _resized(
    picture: Image.Image, extent: tuple[float, float], size: tuple[int, int], part: tuple[int, int, int, int]
) -> Image.Image:
    """`picture.resize(size, box=(0, 0, *extent)).crop(part)` at the cost of the part; few values differ, by 1.

    It resizes rows first and then columns, as Pillow does for whole pictures that are not very high. For a part Pillow
    chooses the cheaper order, which differs at sharp edges, where values between the two passes are clipped.
    """
    left, right, across = _window(picture.width, extent[0], size[0], part[0], part[2])
    top, bottom, down = _window(picture.height, extent[1], size[1], part[1], part[3])
    seen = picture.crop((left, top, right, bottom))
    wide, high = part[2] - part[0], part[3] - part[1]
    narrow = seen.resize((wide, seen.height), Image.Resampling.BICUBIC, (across[0], 0, across[1], seen.height))
    return narrow.resize((wide, high), Image.Resampling.BICUBIC, (0, down[0], wide, down[1]))


def _window(length: int, extent: float, size: int, start: int, end: int) -> tuple[int, int, tuple[float, float]]:
    """On one axis: the first and last pixel that the filter reads, and where among them the resized part lies.

    extent, size:  length of the whole axis, before and after resizing.
    start, end:    where the part lies after resizing.
    """
    scale = extent / size
    reach = math.ceil(_BICUBIC_REACH * max(1.0, scale))
    first, last = max(0, math.floor(start * scale) - reach), min(length, math.ceil(end * scale) + reach)
    return first, last, (start * scale - first, min(extent, end * scale) - first)


def _middle(picture: Image.Image, extent: tuple[float, float]) -> tuple[Image.Image, tuple[float, float]]:
    """Cut the ends off a long thin picture, which are never visible: 1 x 50,000 pixels resized would take gigabytes."""
    width, height = picture.size
    most = _MOST_ELONGATED * min(width, height)
    if max(width, height) <= most:
        return picture, extent
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    cut = picture.crop((left, top, width - left, height - top))
    return cut, (extent[0] - 2 * left, extent[1] - 2 * top)
