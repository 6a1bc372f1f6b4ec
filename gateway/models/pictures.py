"""Real pictures out of pinned wheels: the demo's photo, and what the int8 model is calibrated on.

`to_input` is the preprocessing that `model_repository/README.md` describes, in its plainest form; building and
measuring use it. The request path has its own, faster and for pictures of any kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gateway.artifacts import fetch
from gateway.models.efficientnet import SIDE
from gateway.models.sources import PICTURES

SHORT_SIDE = 256  # pixels, before the centre is cut out
_MIDDLE, _SPAN = 127.0, 128.0

CALIBRATION = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "camera.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "brick.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "ihc.png",
    "moon.png",
    "horse.png",
    "page.png",
    "color.png",
)
"""Photos, micrographs, textures, a drawing and a page: an activation's range depends on how varied they are."""


def sample_photo() -> bytes:
    """A JPEG of 600 × 400 pixels: a cup of coffee (ImageNet's `espresso`).

    :raises FetchFailed: if its wheel cannot be fetched.
    """
    encoded = BytesIO()
    picture(fetch(PICTURES), "coffee.png").save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def picture(wheel: Path, name: str) -> Image.Image:
    """One of the sample pictures, as RGB.

    wheel:  the folder with the unpacked `sources.PICTURES`.
    """
    with Image.open(wheel / "skimage/data" / name) as image:
        return image.convert("RGB")


def to_input(image: Image.Image) -> NDArray[np.float32]:
    """The tensor of an upright RGB picture: [3, 224, 224]."""
    width, height = image.size
    short = min(width, height)
    size = (int(width * SHORT_SIDE / short), int(height * SHORT_SIDE / short))
    small = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    pixels = np.asarray(small.crop((left, top, left + SIDE, top + SIDE)), np.float32)
    return np.ascontiguousarray(((pixels - _MIDDLE) / _SPAN).transpose(2, 0, 1))


def views(image: Image.Image) -> Iterator[Image.Image]:
    """The picture itself and its four corners (four fifths of each side), each also mirrored: ten pictures."""
    width, height = image.size
    w, h = width * 4 // 5, height * 4 // 5
    corners = [(0, 0), (width - w, 0), (0, height - h), (width - w, height - h)]
    for view in (image, *(image.crop((x, y, x + w, y + h)) for x, y in corners)):
        yield view
        yield view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def calibration_inputs(wheel: Path) -> NDArray[np.float32]:
    """Every view of every calibration picture: [180, 3, 224, 224].

    wheel:  the folder with the unpacked `sources.PICTURES`.
    """
    return np.stack([to_input(view) for name in CALIBRATION for view in views(picture(wheel, name))])
