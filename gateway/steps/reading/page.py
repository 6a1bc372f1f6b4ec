"""steps (pure): `page_pixels`, from an encoded page to what finds text on it. May use header, picture, step, numpy.

The sizes are those of rapidocr 3.10.0: a page is brought to a size in bounds, a flat one gets room above and below, and
the detector sees it enlarged if it is small, in whole blocks of 32 pixels.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from PIL import Image
from pydantic import Field

from gateway.steps.header import BadPicture, read_header
from gateway.steps.picture import MOST_PIXELS, decode_whole
from gateway.steps.rows import Column, column_of
from gateway.steps.step import BadTensor, Params, Read, Step
from gateway.v2.spec import Array, Tensors, TensorSpec

MEBI: Final = 1 << 20

_BLOCK: Final = 32  # pixels: the detector halves its input five times
_LEAST_HEIGHT: Final = 30  # pixels; lower pages get room above and below
_FLAT: Final = 8  # so do pages that are wider than so many times their height
_MOST_ELONGATED: Final = 100  # long side to short side
_KEPT_BYTES: Final = 7  # a pixel of the page in bounds takes: the picture, if it was made smaller, and the tensor
_SEEN_BYTES: Final = 19  # a pixel that the detector sees takes: the picture, its bytes, the tensor


class PagePixelsParams(Params):
    """How large a page is when text is looked for."""

    most_side: int = Field(
        default=2000,
        ge=64,
        le=8192,
        description="Longest side of a page, in pixels; a larger one is made smaller first. The default is A4 at "
        "170 dpi.",
    )
    least_short_side: int = Field(
        default=736,
        ge=32,
        le=4096,
        description="Shortest side of what the detector sees, in pixels: smaller pages are enlarged for it. What it "
        "was trained with.",
    )
    most_seen: int | None = Field(
        default=None,
        ge=4096,
        description="Most pixels that the detector sees, width times height: it sees a larger page made smaller, and "
        "lines are cut out of the page itself. What the detector takes of memory and time goes by it, some 160 bytes a "
        "pixel. The default is `most_side` times itself.",
    )
    max_bytes: int = Field(default=32 * MEBI, ge=1, description="Largest encoded page, in bytes.")
    max_pixels: int = Field(
        default=50 * MEBI,
        ge=1,
        le=MOST_PIXELS,
        description="Largest page, width times height; see `decode_image`.",
    )


class PagePixels(Step[PagePixelsParams]):
    """Encoded pages (JPEG, PNG, WebP) → the page in bounds, and what the text detector takes.

    `frame` is how to come back to the page as it was sent: width and height of a pixel there, pixels added above, and
    its width and height when it is turned upright (EXIF).
    """

    params_type = PagePixelsParams

    def __init__(self, params: PagePixelsParams, read: Read) -> None:
        self.reads = (TensorSpec("page", "BYTES", (1,)),)
        self.writes = (
            TensorSpec("page", "UINT8", (-1, -1, 3)),
            TensorSpec("pixels", "FP32", (3, -1, -1)),
            TensorSpec("frame", "FP32", (5,)),
        )
        self._params = params

    def __call__(self, tensors: Tensors) -> dict[str, Column]:
        pages, pixels, frames = [], [], []
        for row, data in enumerate(tensors["page"][:, 0]):
            try:
                page, seen, frame = self._page(data)
            except BadPicture as exc:
                raise BadTensor("page", str(exc), row) from exc
            pages.append(page)
            pixels.append(seen)
            frames.append(frame)
        return {"page": column_of(pages), "pixels": column_of(pixels), "frame": column_of(frames)}

    def _page(self, data: bytes) -> tuple[Array, Array, Array]:
        """The page, what the detector sees of it, and its frame. raises: BadPicture if it can't be read."""
        if len(data) > self._params.max_bytes:
            raise BadPicture(f"{len(data)} bytes; at most {self._params.max_bytes} are allowed")
        header = read_header(data)
        width, height = header.width, header.height
        if width * height > self._params.max_pixels:
            size = f"{width}x{height} = {width * height} pixels"
            raise BadPicture(f"{size}; at most {self._params.max_pixels} are allowed")
        if max(width, height) > _MOST_ELONGATED * min(width, height):
            raise BadPicture(f"{width}x{height} pixels; one side may be {_MOST_ELONGATED} times as long as the other")
        return decode_whole(data, header, self._params.most_side, self._memory(width, height), self._made)

    def _memory(self, width: int, height: int) -> int:
        """Bytes that `_made` takes of a page of this size."""
        scale = min(1.0, self._params.most_side / max(width, height))
        kept = width * height * scale * scale
        ratio = self._ratio(width * scale, height * scale)
        return int(_KEPT_BYTES * kept + _SEEN_BYTES * kept * ratio * ratio)

    def _made(self, page: Image.Image, size: tuple[int, int]) -> tuple[Array, Array, Array]:
        width, height = size
        page = _enlarged(_reduced(page, self._params.most_side))
        scale = width / page.width, height / page.height
        page, above = _with_room(page)
        return np.asarray(page), self._pixels(page), np.array([*scale, above, width, height], np.float32)

    def _pixels(self, page: Image.Image) -> Array:
        """What the detector takes: blue, green, red, each (value / 255 - 0.5) / 0.5."""
        ratio = self._ratio(*page.size)
        size = _blocks(int(page.width * ratio)), _blocks(int(page.height * ratio))
        seen = sampled(page, size) if ratio >= 1 else page.resize(size, Image.Resampling.BILINEAR)
        return normalised(np.asarray(seen))

    def _ratio(self, width: float, height: float) -> float:
        """A side as the detector sees it, to that of the page."""
        params, pixels = self._params, width * height
        ratio = max(1.0, params.least_short_side / min(width, height))
        most = max(params.most_side, params.least_short_side) ** 2
        ratio = min(ratio, max(1.0, math.sqrt(most / pixels)))
        return ratio if params.most_seen is None else min(ratio, math.sqrt(params.most_seen / pixels))


def normalised(picture: Array) -> Array:
    """(rows, columns, red-green-blue) UINT8 → (blue-green-red, rows, columns) FP32 in [-1, 1]."""
    planes = np.empty((3, *picture.shape[:2]), np.float32)
    planes[...] = picture[:, :, ::-1].transpose(2, 0, 1)
    planes *= np.float32(1 / 127.5)
    planes -= np.float32(1)
    return planes


def sampled(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at this size by bilinear sampling as OpenCV has it; Pillow's own blurs as it shrinks."""
    if picture.size == size:
        return picture
    across, down = picture.width / size[0], picture.height / size[1]
    matrix = (across, 0.0, 0.0, 0.0, down, 0.0)
    return picture.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _blocks(length: int) -> int:
    return max(_BLOCK, round(length / _BLOCK) * _BLOCK)


def _reduced(page: Image.Image, most: int) -> Image.Image:
    longest = max(page.size)
    if longest <= most:
        return page
    width, height = (_blocks(int(side * most / longest)) for side in page.size)
    return page.resize((width, height), Image.Resampling.BILINEAR)


def _enlarged(page: Image.Image) -> Image.Image:
    short = min(page.size)
    if short >= _LEAST_HEIGHT:
        return page
    width, height = (_blocks(int(side * _LEAST_HEIGHT / short)) for side in page.size)
    return sampled(page, (width, height))


def _with_room(page: Image.Image) -> tuple[Image.Image, int]:
    """A flat page with black above and below, and how many rows that is on either side."""
    if page.height > _LEAST_HEIGHT and page.width <= _FLAT * page.height:
        return page, 0
    high = max(int(page.width / _FLAT), _LEAST_HEIGHT) * 2
    above = abs(high - page.height) // 2
    roomy = Image.new("RGB", (page.width, page.height + 2 * above))
    roomy.paste(page, (0, above))
    return roomy, above
