"""stages (pure): one encoded picture → its pixels. May use Pillow, numpy, header; knows no tensors.

Pillow sees only what `header` has passed, and never reads EXIF: some of its versions spend gigabytes on a hostile one,
of a JPEG as soon as it is opened.
"""

from __future__ import annotations

import io
import threading
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from gateway.stages.header import BadPicture, Format, Header, strip_jpeg

MOST_PIXELS = 89_000_000
"""What a limit on pixels can be at most: just below the size at which Pillow begins to warn (2^30 / 12 pixels)."""

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

    returns:  (crop, crop, 3) RGB, or (crop, crop, 1) if the picture is grey.
    raises:   BadPicture if the data is damaged or incomplete.
    """
    try:
        # Pillow documents no closed set of what damaged data makes it raise; nothing but Pillow runs in here.
        with _open(data, header) as picture:
            if fit.draft and header.format == "JPEG":
                picture.draft(None, (2 * fit.resize, 2 * fit.resize))
            picture.load()
            small = _fit(_opaque(picture, fit.background), _TURNS.get(header.orientation), fit)
            return np.asarray(small).reshape(fit.crop, fit.crop, -1)
    except (BadPicture, MemoryError):
        raise
    except Exception as exc:
        raise BadPicture(f"the {header.format} data is damaged or incomplete") from exc


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
