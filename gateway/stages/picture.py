"""stages (pure): one encoded picture → its pixels. May use Pillow, numpy, header; knows no tensors.

Pillow sees only what `header` has passed, and never reads EXIF: some of its versions spend gigabytes on a hostile one,
of a JPEG as soon as it is opened.
"""

from __future__ import annotations

import io
import math
import threading
import warnings
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from gateway.errors import Overloaded
from gateway.stages.budget import MEMORY, TooLarge
from gateway.stages.header import BadPicture, Format, Header, strip_jpeg

MOST_PIXELS = 89_000_000
"""What a limit on pixels can be at most: just below the size at which Pillow begins to warn (2^30 / 12 pixels)."""

# Bytes that one pixel takes at the worst moment, from `load` to what `_fit` cuts out of it: the peak of the resident
# memory over that before, divided by the pixels, of pictures of 3000 x 3000 and 7000 x 1400, rounded up (Pillow 12,
# Linux). tests/stages/test_picture_memory.py measures it anew. Pillow keeps RGB in 4 bytes.
_WEBP_BYTES: Final = 22  # two canvases, what the decoder works on, the frame as bytes, the picture, its opaque copy
_BYTES: Final = {"1": 3, "L": 2, "P": 9, "RGB": 8, "CMYK": 13, "LA": 14, "RGBA": 13}
_BYTES_16_BIT: Final = 8
_BYTES_TRANSPARENT: Final = 14  # a grey, palette or colour PNG that names a see-through colour; 16 bits too
_JPEG_COEFFICIENT: Final = 2  # bytes; beside the pixels, but gone before these are cut
_AT_LEAST: Final = 2 << 20  # bytes: tables, rows in between, the part that is resized

_OPENERS: dict[Format, type[ImageFile.ImageFile]] = {"JPEG": JpegImageFile, "PNG": PngImageFile, "WebP": WebPImageFile}

# `warnings.catch_warnings` swaps a list that is global to the process, so only one thread at a time may be inside.
_quiet = threading.Lock()

# EXIF orientation → what turns the stored picture upright.
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

# Those that make what was the right, or the bottom, come first.
_FROM_THE_RIGHT = (_T.FLIP_LEFT_RIGHT, _T.ROTATE_180, _T.TRANSVERSE, _T.ROTATE_90)
_FROM_THE_BOTTOM = (_T.FLIP_TOP_BOTTOM, _T.ROTATE_180, _T.TRANSVERSE, _T.ROTATE_270)

_BICUBIC_REACH = 2  # how far the filter looks to either side, in pixels of the smaller of both pictures

_MOST_ELONGATED = 4  # long side to short side, of what is resized


@dataclass(frozen=True, slots=True)
class Fit:
    """How a picture is brought to a model's size, in pixels."""

    resize: int  # the short side becomes this long
    crop: int  # and the middle square of this size is taken
    background: tuple[int, int, int] = (255, 255, 255)  # what shows through transparent parts, RGB
    draft: bool = False  # may JPEG be decoded at a fraction of its size, where that is still twice `resize`?


def decode(data: bytes, header: Header, fit: Fit) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Decode the first frame, turn it upright, fit it.

    returns:  (3, crop, crop) RGB, or (1, crop, crop) if the picture is grey; a view whose last axis alone is dense.
    raises:   BadPicture if the data is damaged or incomplete, or takes more memory than there is in all;
              Overloaded if others hold it.
    """
    try:
        # Pillow documents no closed set of what damaged data makes it raise; nothing but Pillow runs in here.
        with _open(data, header) as picture:
            extent = _draft(picture, fit.resize) if fit.draft and header.format == "JPEG" else picture.size
            what = f"to decode this {header.format} of {header.width}x{header.height} pixels"
            with MEMORY.hold(_memory_of(picture, header), what):
                picture.load()
                return _planes(_fit(_opaque(picture, fit.background), extent, _TURNS.get(header.orientation), fit))
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
    """Bytes that decoding takes. picture: opened but not loaded, so its mode is what Pillow will really make."""
    pixels = picture.width * picture.height  # less than the header says, of a JPEG that is decoded at a fraction
    if header.format == "WebP":
        each = _WEBP_BYTES
    elif picture.has_transparency_data:
        each = max(_BYTES_TRANSPARENT, _BYTES.get(picture.mode, 0))
    else:
        each = _BYTES_16_BIT if picture.mode.startswith("I") else _BYTES.get(picture.mode, _WEBP_BYTES)
    coefficients = header.width * header.height * header.coefficients * _JPEG_COEFFICIENT
    return _AT_LEAST + int(max(pixels * each, pixels * 4 + coefficients))


def _planes(picture: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Channels first. Pillow writes them a line at a time ("RGB;L"), and numpy then works on lines, not on pixels."""
    if picture.mode == "L":
        return np.asarray(picture)[None]
    lines = np.frombuffer(picture.tobytes("raw", "RGB;L"), np.uint8)
    return lines.reshape(picture.height, 3, picture.width).transpose(1, 0, 2)


def _open(data: bytes, header: Header) -> ImageFile.ImageFile:
    """Let Pillow read all that comes before the pixels.

    The plugin is called without `Image.open`, which would look at several-picture JPEGs (MPO) more closely than needed.
    """
    bare = strip_jpeg(data) if header.format == "JPEG" else data
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged APNG blocks: nobody to tell, and harmless
        picture = _OPENERS[header.format](io.BytesIO(bare))
    if picture.size != (header.width, header.height):
        raise BadPicture("its size changes")  # what was checked against the limit must be what is decoded
    return picture


def _opaque(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Bring any mode to 8-bit grey ("L") or RGB, transparent parts over the background."""
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip instead of scale
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
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 where its short side is still twice `resize`; its extent then.

    That is a fraction of a pixel less than its size, which is rounded up.
    """
    told = picture.draft(None, (2 * resize, 2 * resize))
    return told[1][2:] if told else picture.size


def _fit(picture: Image.Image, extent: tuple[float, float], turn: Image.Transpose | None, fit: Fit) -> Image.Image:
    """The middle of the resized picture, turned upright. What will be cut off is not computed at all.

    extent:  width and height of what is pictured, at most the picture's size.
    """
    picture, extent = _middle(picture, extent)
    width, height = extent
    short = min(width, height)
    size = int(width * fit.resize / short), int(height * fit.resize / short)
    left, top = _corner(size, turn, fit.crop)
    small = _resized(picture, extent, size, (left, top, left + fit.crop, top + fit.crop))
    return small if turn is None else small.transpose(turn)


def _corner(size: tuple[int, int], turn: Image.Transpose | None, crop: int) -> tuple[int, int]:
    """Where the middle begins before it is turned: an odd margin is rounded down on the left and top of the result."""
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
    """`picture.resize(size, box=(0, 0, *extent)).crop(part)` at the cost of the part; few values differ, by a level.

    Along the rows first and then along the columns, as Pillow resizes whole pictures that are not very high. Given a
    part it takes what is cheaper, and what is clipped in between differs at sharp edges.
    """
    left, right, across = _window(picture.width, extent[0], size[0], part[0], part[2])
    top, bottom, down = _window(picture.height, extent[1], size[1], part[1], part[3])
    seen = picture.crop((left, top, right, bottom))
    wide, high = part[2] - part[0], part[3] - part[1]
    narrow = seen.resize((wide, seen.height), Image.Resampling.BICUBIC, (across[0], 0, across[1], seen.height))
    return narrow.resize((wide, high), Image.Resampling.BICUBIC, (0, down[0], wide, down[1]))


def _window(length: int, extent: float, size: int, start: int, end: int) -> tuple[int, int, tuple[float, float]]:
    """Along one axis: which pixels of `length` the filter looks at, and where in them what is resized begins and ends.

    extent, size:  of the whole, before and after.
    start, end:    of the part, after.
    """
    scale = extent / size
    reach = math.ceil(_BICUBIC_REACH * max(1.0, scale))
    first, last = max(0, math.floor(start * scale) - reach), min(length, math.ceil(end * scale) + reach)
    return first, last, (start * scale - first, min(extent, end * scale) - first)


def _middle(picture: Image.Image, extent: tuple[float, float]) -> tuple[Image.Image, tuple[float, float]]:
    """Cut off what can never show of a long thin picture: resized, one of 1 x 50,000 pixels would take gigabytes."""
    width, height = picture.size
    most = _MOST_ELONGATED * min(width, height)
    if max(width, height) <= most:
        return picture, extent
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    cut = picture.crop((left, top, width - left, height - top))
    return cut, (extent[0] - 2 * left, extent[1] - 2 * top)
