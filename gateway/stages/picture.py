"""stages (pure): one encoded picture, as bytes → its size, and its pixels. May use Pillow and numpy; knows no tensors.

What a picture claims to be is read from its header by the few lines below, before Pillow sees it: a picture that is too
large is refused while it is still small, and Pillow's own limits and warnings, which are global to the process, never
come into play.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

MOST_PIXELS = 89_000_000
"""What a limit on pixels can be at most: just below the size at which Pillow begins to warn (2^30 / 12 pixels)."""

Format = Literal["JPEG", "PNG", "WebP"]
_OPENERS: dict[Format, type[ImageFile.ImageFile]] = {"JPEG": JpegImageFile, "PNG": PngImageFile, "WebP": WebPImageFile}

# `warnings.catch_warnings` swaps a list that is global to the process, so only one thread at a time may be inside.
_quiet = threading.Lock()

# Start-of-frame markers of JPEG (ITU-T T.81, table B.1): all of C0 to CF but DHT (C4), JPG (C8) and DAC (CC).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # TEM, RST0 to RST7, SOI: markers with no length after them

_MOST_SEGMENTS = (
    10_000  # before the frame: an ICC profile and EXIF with previews take tens; bounds what hostile data costs
)

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
_ORIENTATION = 0x0112

_MOST_ELONGATED = 4


class BadPicture(Exception):
    """These bytes cannot be used as a picture; the text says why and is fit for the caller."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a picture says it is: width and height in pixels, as stored (before EXIF rotation)."""

    format: Format
    width: int
    height: int


def read_header(data: bytes) -> Header:
    """Read format and size without decoding anything.

    raises:  BadPicture if it is not a JPEG, PNG or WebP, or its header is damaged.
    source:  ITU-T T.81 B.2.2; PNG 3rd edition 11.2.2; RFC 9649 (WebP) 2.5 to 2.7.
    """
    if not data:
        raise BadPicture("empty")
    form: Format
    if data.startswith(b"\xff\xd8\xff"):
        form, size = "JPEG", _jpeg_size(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        form, size = "PNG", _png_size(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        form, size = "WebP", _webp_size(data)
    else:
        raise BadPicture(f"not a JPEG, PNG or WebP picture; it starts with {data[:8]!r}")
    if size is None:
        raise BadPicture(f"the {form} header is damaged or incomplete")
    if 0 in size:
        raise BadPicture(f"the {form} header says {size[0]}x{size[1]} pixels")
    return Header(form, *size)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    for _ in range(_MOST_SEGMENTS):
        at = data.find(0xFF, at)  # padding between segments is against the rules, and met in practice
        if at < 0 or at + 9 > len(data):
            return None
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        if marker in (0xD9, 0xDA):  # the end, or the first scan, and no frame before it
            return None
        if marker in (0x00, 0xFF):
            at += 1
        elif marker in _STANDALONE:
            at += 2
        else:
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    return None


def _png_size(data: bytes) -> tuple[int, int] | None:
    if len(data) < 33 or data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _webp_size(data: bytes) -> tuple[int, int] | None:
    if len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


@dataclass(frozen=True, slots=True)
class Fit:
    """How a picture is brought to a model's size, in pixels."""

    resize: int  # the short side becomes this long
    crop: int  # and the middle square of this size is taken
    background: tuple[int, int, int] = (255, 255, 255)  # what shows through transparent parts, RGB
    draft: bool = False  # may JPEG be decoded at a fraction of its size, where that is still twice `resize`?


def decode(data: bytes, header: Header, fit: Fit) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Decode the first frame, turn it upright, fit it.

    returns:  (crop, crop, 3) RGB, or (crop, crop, 1) if the picture is grey.
    raises:   BadPicture if the data is damaged or incomplete.
    """
    try:
        # Pillow documents no closed set of what damaged data makes it raise; nothing but Pillow runs in here.
        with _open(data, header) as picture:
            turn = _turn(picture)
            if fit.draft and header.format == "JPEG":
                picture.draft(None, (2 * fit.resize, 2 * fit.resize))
            picture.load()
            return np.asarray(_fit(_opaque(picture, fit.background), turn, fit)).reshape(fit.crop, fit.crop, -1)
    except (BadPicture, MemoryError):
        raise
    except Exception as exc:
        raise BadPicture(f"the {header.format} data is damaged or incomplete") from exc


def _open(data: bytes, header: Header) -> ImageFile.ImageFile:
    """Let Pillow read all that comes before the pixels.

    The plugin is called without `Image.open`, which would look at several-picture JPEGs (MPO) more closely than needed.
    """
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged EXIF or APNG blocks: nobody to tell, and harmless
        picture = _OPENERS[header.format](io.BytesIO(data))
        picture.getexif()  # parsed here, kept by the picture
    if picture.size != (header.width, header.height):
        raise BadPicture("its size changes")  # what was checked against the limit must be what is decoded
    return picture


def _turn(picture: Image.Image) -> Image.Transpose | None:
    return _TURNS.get(picture.getexif().get(_ORIENTATION, 1))


def _opaque(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Bring any mode to 8-bit grey ("L") or RGB, transparent parts over the background."""
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip instead of scale
        return _from_16_bit(picture, background)
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
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


def _fit(picture: Image.Image, turn: Image.Transpose | None, fit: Fit) -> Image.Image:
    """Resize, turn the small result instead of the large picture, cut out the middle."""
    picture = _middle(picture)
    width, height = picture.size
    short = min(width, height)
    small = picture.resize((width * fit.resize // short, height * fit.resize // short), Image.Resampling.BICUBIC)
    if turn is not None:
        small = small.transpose(turn)
    left, top = (small.width - fit.crop) // 2, (small.height - fit.crop) // 2
    return small.crop((left, top, left + fit.crop, top + fit.crop))


def _middle(picture: Image.Image) -> Image.Image:
    """Cut off what can never show of a long thin picture: resized, one of 1 x 50,000 pixels would take gigabytes."""
    width, height = picture.size
    most = _MOST_ELONGATED * min(width, height)
    if max(width, height) <= most:
        return picture
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return picture.crop((left, top, width - left, height - top))
