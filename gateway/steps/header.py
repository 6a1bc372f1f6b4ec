"""steps (pure): reads what an encoded picture says about itself before it is decoded. Bytes in, values out.

A picture that is too large, or made to cost more than its size, is refused here while it is still small, and whatever
Pillow's own limits and warnings, which are global to the process, would say never comes into play.

Sources: ITU-T T.81 (JPEG) annex B; PNG 3rd edition, 5.3 and 11.2; RFC 9649 (WebP) 2.3 to 2.7; CIPA DC-008 (EXIF) 4.5.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

Format = Literal["JPEG", "PNG", "WebP"]
Chunks = Iterator[tuple[bytes, int, int]]  # kind, where the content begins, size of the content in bytes

MOST_SCANS = 100
"""Most scans of a JPEG. Progressive ones have about ten; a scan of 70 bytes may take 20 ms at 50 million pixels."""

MOST_SEGMENTS = 10_000
"""Most segments of a JPEG, or chunks of a PNG or WebP: Pillow reads them one by one in Python. A PNG of 32 MiB in
chunks of 4 KiB has 8,200; an ICC profile and EXIF with previews take tens."""

# JPEG markers. Within the coded pixels FF is followed by 00 or by a restart marker, D0 to D7.
_SCAN = re.compile(rb"\xff\xda")
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of a frame (SOF); the others are DHT, JPG, DAC
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_STANDALONE = frozenset({0x01, 0xD8})  # TEM and SOI have no length field
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_APP1 = 0xE1
_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF})  # APP1 to APP15 but APP14, which tells whether CMYK is inverted

_ORIENTATION, _SHORT = 0x0112, 3


class BadPicture(Exception):
    """The bytes are not a picture that can be used. The text says why, and may be shown to the caller."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a picture says about itself."""

    format: Format
    width: int  # pixels, as stored, before turning
    height: int
    orientation: int = 1  # EXIF orientation, 1 to 8; 1 is upright
    coefficients: float = 0  # per pixel, of a JPEG with several scans: they are all kept until the last scan


def read_header(data: bytes) -> Header:
    """Read the header of a picture.

    raises:  BadPicture if it is not a JPEG, PNG or WebP, or its header is damaged, or it has more scans or segments
             than any honest one.
    """
    if not data:
        raise BadPicture("empty")
    if data.startswith(b"\xff\xd8\xff"):
        header = _jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        header = _png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        header = _webp(data)
    else:
        raise BadPicture(f"not a JPEG, PNG or WebP picture; it starts with {data[:8]!r}")
    if header.width == 0 or header.height == 0:
        raise BadPicture(f"the {header.format} header says {header.width}x{header.height} pixels")
    return header


def strip_jpeg(data: bytes) -> bytes:
    """The JPEG without EXIF, XMP, colour profile and pointers to more pictures.

    data:  one that `read_header` has passed.
    """
    kept, start = [data[:2]], 2
    for marker, at in _segments(data):
        if marker == _START_OF_SCAN:
            break
        end = at + int.from_bytes(data[at : at + 2], "big")
        if marker in _METADATA:
            kept.append(data[start : at - 2])
            start = end
    return b"".join([*kept, data[start:]])


# JPEG


def _jpeg(data: bytes) -> Header:
    # More scans are rare, though what is appended to a photo, such as a film, may look like some. A regex finds two
    # bytes in noise three times as fast as `data.count`, and can stop early.
    if next(islice(_SCAN.finditer(data), MOST_SCANS, None), None) is not None:
        _check_scans(data)
    size, exif, in_scans, components, samples = None, b"", False, 0, 0.0
    for marker, at in _segments(data):
        if marker in _FRAMES and size is None and at + 8 <= len(data):
            size = struct.unpack_from(">HH", data, at + 3)
            components, samples = data[at + 7], _samples(data, at + 7)
            in_scans = marker in _PROGRESSIVE
        elif marker == _APP1 and not exif and data[at + 2 : at + 8] == b"Exif\0\0":
            exif = data[at + 8 : at + int.from_bytes(data[at : at + 2], "big")]
        elif marker in (_START_OF_SCAN, _END_OF_IMAGE):
            in_scans = in_scans or data[at + 2 : at + 3] != bytes([components])
            break
    if size is None:
        raise _damaged("JPEG")
    return Header("JPEG", size[1], size[0], _orientation(exif), samples if in_scans else 0)


def _samples(data: bytes, at: int) -> float:
    """Samples per pixel, of all components: 3 without subsampling, 1.5 where four pixels share their colour (4:2:0)."""
    factors = [(each >> 4, each & 15) for each in data[at + 2 : at + 1 + 3 * data[at] : 3]]
    across, down = (max((each[axis] for each in factors), default=1) or 1 for axis in (0, 1))
    return sum(wide * high for wide, high in factors) / (across * down)


def _check_scans(data: bytes) -> None:
    scans = 0
    for marker, _ in _segments(data):
        scans += marker == _START_OF_SCAN
        if marker == _END_OF_IMAGE:
            return
        if scans > MOST_SCANS:
            raise BadPicture(f"more than {MOST_SCANS} scans")


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Markers outside the coded pixels, and where their segments begin."""
    at = 2
    for _ in range(MOST_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None:
            return
        marker, at = data[found.end() - 1], found.end()
        yield marker, at
        if marker not in _STANDALONE:
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
    raise BadPicture(f"more than {MOST_SEGMENTS} segments")


# PNG


def _png(data: bytes) -> Header:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise _damaged("PNG")
    width, height = struct.unpack_from(">II", data, 16)
    return Header("PNG", width, height, _orientation(_find(data, _png_chunks(data), b"eXIf")))


def _png_chunks(data: bytes) -> Chunks:
    at = 8
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at + 8, size
        at += 12 + size  # a checksum of 4 bytes follows the content


# WebP


def _webp(data: bytes) -> Header:
    if len(data) < 30:
        raise _damaged("WebP")
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        return Header("WebP", width, height, _orientation(_find(data, _riff_chunks(data), b"EXIF")))
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return Header("WebP", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("WebP", width & 0x3FFF, height & 0x3FFF)
    raise _damaged("WebP")


def _riff_chunks(data: bytes) -> Chunks:
    at = 12
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        yield kind, at + 8, size
        at += 8 + size + (size & 1)  # padded to an even size


# Shared by the formats


def _find(data: bytes, chunks: Chunks, wanted: bytes) -> bytes:
    """The content of the first chunk of this kind; b"" if there is none."""
    found = b""
    for number, (kind, at, size) in enumerate(chunks, start=1):
        if number > MOST_SEGMENTS:
            raise BadPicture(f"more than {MOST_SEGMENTS} chunks")
        if kind == wanted and not found:
            found = data[at : at + size]
    return found


def _orientation(exif: bytes) -> int:
    """The orientation in the first directory of an EXIF block; 1 if it can't be read."""
    exif = exif.removeprefix(b"Exif\0\0")  # only JPEG needs this prefix, but some WebP writers keep it
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 8:
        return 1
    start = struct.unpack_from(order + "I", exif, 4)[0]
    if start + 2 > len(exif):
        return 1
    entries = struct.unpack_from(order + "H", exif, start)[0]
    for at in range(start + 2, min(start + 2 + 12 * entries, len(exif) - 11), 12):
        tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, at)
        if tag == _ORIENTATION:
            return int(value) if kind == _SHORT and 1 <= value <= 8 else 1
    return 1


def _damaged(form: Format) -> BadPicture:
    return BadPicture(f"the {form} header is damaged or incomplete")
