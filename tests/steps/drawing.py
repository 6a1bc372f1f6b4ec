"""Pictures for tests: made with Pillow, in any mode and format, or of raw bytes where Pillow would not write them."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def photo(width: int = 320, height: int = 240) -> Image.Image:
    """Smooth colours that differ in every corner, so that no turn or crop of it is mistaken for another."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / max(1, width - 1), 255 * y / max(1, height - 1)
    blue = 127.5 + 60 * np.sin(x / 17) + 60 * np.cos(y / 11)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def encode(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def expected(picture: Image.Image, resize: int = 256, crop: int = 224) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The plain recipe, for an upright RGB picture: (3, crop, crop)."""
    short = min(picture.size)
    small = picture.resize(
        (picture.width * resize // short, picture.height * resize // short), Image.Resampling.BICUBIC
    )
    left, top = (small.width - crop) // 2, (small.height - crop) // 2
    pixels = np.asarray(small.crop((left, top, left + crop, top + crop)), np.float32)
    return ((pixels - 127) / 128).transpose(2, 0, 1)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: tuple[bytes, bytes], idat: bytes = b"") -> bytes:
    """An 8-bit RGB PNG of any claimed size."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    more = b"".join(png_chunk(kind, data) for kind, data in chunks)
    pixels = png_chunk(b"IDAT", idat or zlib.compress(bytes(1 + 3 * min(width, 1000))))
    return b"\x89PNG\r\n\x1a\n" + header + more + pixels + png_chunk(b"IEND", b"")


def webp_canvas(width: int, height: int) -> bytes:
    """An extended WebP that claims a canvas and has next to nothing on it."""
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", len(canvas)) + canvas + bytes(64)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_claiming(width: int, height: int) -> bytes:
    """A small JPEG whose frame header has been changed to claim a size."""
    data = bytearray(encode(photo(16, 16), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)
