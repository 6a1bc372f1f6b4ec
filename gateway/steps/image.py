"""steps (pure): `decode_image`, from encoded pictures to a model's pixels. May use header, picture, step, numpy."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from annotated_types import Gt
from pydantic import Field, model_validator

from gateway.steps.header import BadPicture, Header, read_header
from gateway.steps.picture import MOST_PIXELS, Fit, decode
from gateway.steps.step import BadTensor, Params, Read, RowStep
from gateway.v2.spec import Array, Tensors, TensorSpec

MEBI = 1 << 20

Three = tuple[float, float, float]
PositiveThree = tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)], Annotated[float, Gt(0)]]
_BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}


class DecodeImageParams(Params):
    """How pictures become a model's input: value = (pixel x scale - mean) / std, per channel."""

    size: int = Field(
        default=224,
        ge=8,
        le=2048,
        description="Width and height, in pixels, of what the model takes. Most ImageNet models want 224.",
    )
    resize: int = Field(
        default=256,
        ge=8,
        le=4096,
        description="Length, in pixels, of the short side before the middle is cut out (bicubic); at least `size`. "
        "256 for 224 is what most ImageNet models are evaluated with.",
    )
    scale: float = Field(
        default=1.0,
        gt=0,
        description="What a pixel value (0 to 255) is multiplied by first; 0.00392156862745098 (1/255) where `mean` "
        "and `std` are given for values between 0 and 1.",
    )
    mean: float | Three = Field(
        default=127.0, description="Subtracted then: one number, or one each for red, green and blue."
    )
    std: Annotated[float, Gt(0)] | PositiveThree = Field(
        default=128.0, description="Divided by last: one number, or one each for red, green and blue; above 0."
    )
    layout: Literal["NCHW", "NHWC"] = Field(
        default="NCHW",
        description="Order of the axes: channels first (as PyTorch has it) or last (as TensorFlow has it).",
    )
    background: Literal["white", "black"] = Field(
        default="white",
        description="What shows through the transparent parts of a picture. White is what cut-out pictures are mostly "
        "made to stand on.",
    )
    draft: bool = Field(
        default=True,
        description="Decode a JPEG at 1/2, 1/4 or 1/8 of its size where that is still twice `resize`. Several times "
        "faster for a photo of many megapixels; pixel values change by half a level of 255 on average, ten at most in "
        "photos. `false` decodes every pixel.",
    )
    max_bytes: int = Field(
        default=32 * MEBI,
        ge=1,
        description="Largest encoded picture, in bytes. The default, 32 MiB, is above what cameras make as JPEG.",
    )
    max_pixels: int = Field(
        default=50 * MEBI,
        ge=1,
        le=MOST_PIXELS,
        description="Largest picture, width times height. A few kilobytes can claim to be billions of pixels; "
        "while it is decoded, each takes 2 to 8 bytes (JPEG; with `draft` less than one, or 3 if it is progressive), 2 "
        "to 14 (PNG) or 22 (WebP), out of `pipelines.memory`. The default, 50 Mi, lets the photo of a 50-megapixel "
        "phone pass.",
    )

    @model_validator(mode="after")
    def _crop_is_inside(self) -> DecodeImageParams:
        if self.resize < self.size:
            raise ValueError(f"resize ({self.resize}) must be at least size ({self.size})")
        return self


class DecodeImage(RowStep[DecodeImageParams]):
    """Encoded pictures (JPEG, PNG, WebP) → a model's pixels.

    Understands EXIF rotation, grey, palette, CMYK, 16 bits, transparency; of an animation the first frame counts.
    Colour profiles are not applied.
    """

    params_type = DecodeImageParams

    def __init__(self, params: DecodeImageParams, read: Read) -> None:
        shape = (3, params.size, params.size) if params.layout == "NCHW" else (params.size, params.size, 3)
        self.reads = (TensorSpec("image", "BYTES", (1,)),)
        self.writes = (TensorSpec("image", "FP32", shape),)
        self._fit = Fit(params.resize, params.size, _BACKGROUNDS[params.background], params.draft)
        self._max_bytes, self._max_pixels = params.max_bytes, params.max_pixels
        self._channel_axis = 0 if params.layout == "NCHW" else -1
        self._factor, self._offset = _line(params)

    def fill(self, tensors: Tensors, out: Tensors, rows: range) -> None:
        pictures, target = tensors["image"], out["image"]
        headers = [self._check(pictures[row, 0], row) for row in rows]  # checks all of them before decoding the first
        for row, header in zip(rows, headers, strict=True):
            try:
                pixels = decode(pictures[row, 0], header, self._fit)
            except BadPicture as exc:
                raise BadTensor("image", str(exc), row) from exc
            self._normalise(pixels, target[row])

    def _check(self, data: bytes, row: int) -> Header:
        if len(data) > self._max_bytes:
            raise BadTensor("image", f"{len(data)} bytes; at most {self._max_bytes} are allowed", row)
        try:
            header = read_header(data)
        except BadPicture as exc:
            raise BadTensor("image", str(exc), row) from exc
        pixels = header.width * header.height
        if pixels > self._max_pixels:
            size = f"{header.width}x{header.height} = {pixels} pixels"
            raise BadTensor("image", f"{size}; at most {self._max_pixels} are allowed", row)
        return header

    def _normalise(self, pixels: Array, target: Array) -> None:
        planes = np.moveaxis(target, self._channel_axis, 0)
        planes[...] = pixels  # grey fills all three channels
        np.multiply(planes, self._factor, out=planes)
        np.add(planes, self._offset, out=planes)


def _line(params: DecodeImageParams) -> tuple[Array, Array]:
    """Factor and offset of each channel, (3, 1, 1) float32: value = pixel x factor + offset."""
    mean, std = (np.broadcast_to(np.asarray(value, np.float64), 3) for value in (params.mean, params.std))
    factor, offset = (each.astype(np.float32).reshape(3, 1, 1) for each in (params.scale / std, -mean / std))
    return factor, offset
