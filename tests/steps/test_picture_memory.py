"""What decoding takes is known before it is taken, and is taken out of one budget for all pictures of a process.

Real pictures are decoded by Pillow in processes of their own, whose peak of resident memory is the judge.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import encode
from PIL import Image

from gateway.errors import Overloaded
from gateway.steps.budget import MEMORY, MIB, Budget, TooLarge
from gateway.steps.header import BadPicture, read_header
from gateway.steps.picture import Fit, decode

DECODER = """
import sys
from gateway.steps import budget
from gateway.steps.header import read_header
from gateway.steps.picture import Fit, decode

def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

taken = []
budget.MEMORY._take = lambda size, what, patience: taken.append(size)
for path in sys.argv[2:]:
    data = open(path, "rb").read()
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS:")
    decode(data, read_header(data), Fit(256, 224, draft=sys.argv[1] == "draft"))
    print(taken[-1], resident("VmHWM:") - before)
"""


PAGES = """
import sys
import numpy as np
from gateway.steps import budget
from gateway.steps.reading.page import PagePixels, PagePixelsParams

def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

taken = []
budget.MEMORY._take = lambda size, what, patience: taken.append(size)
step = PagePixels(PagePixelsParams(most_side=900, least_short_side=300), lambda path: b"")
for path in sys.argv[2:]:
    page = np.empty((1, 1), object)
    page[0, 0] = open(path, "rb").read()
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS:")
    step({"page": page})
    print(taken[-1], resident("VmHWM:") - before)
"""
"""The same for pages, which are kept whole."""


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 255, (64, 64, 4), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def palette(picture: Image.Image) -> Image.Image:
    made = Image.fromarray(np.asarray(picture.convert("L")) // 4, "P")
    made.putpalette([number % 256 for number in range(3 * 64)])
    return made


def deep(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


KINDS: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg grey": lambda i: encode(i.convert("L"), "JPEG"),
    "jpeg": lambda i: encode(i.convert("RGB"), "JPEG"),
    "jpeg progressive": lambda i: encode(i.convert("RGB"), "JPEG", progressive=True),
    "jpeg progressive 444": lambda i: encode(i.convert("RGB"), "JPEG", progressive=True, subsampling=0),
    "jpeg cmyk": lambda i: encode(i.convert("CMYK"), "JPEG"),
    "jpeg cmyk progressive": lambda i: encode(i.convert("CMYK"), "JPEG", progressive=True, subsampling=0),
    "png 1": lambda i: encode(i.convert("1"), compress_level=1),
    "png grey": lambda i: encode(i.convert("L"), compress_level=1),
    "png grey see-through": lambda i: encode(i.convert("L"), compress_level=1, transparency=3),
    "png grey alpha": lambda i: encode(i.convert("LA"), compress_level=1),
    "png 16 bits": lambda i: encode(deep(i), compress_level=1),
    "png 16 bits see-through": lambda i: encode(deep(i), compress_level=1, transparency=0),
    "png palette": lambda i: encode(palette(i), compress_level=1),
    "png palette see-through": lambda i: encode(palette(i), compress_level=1, transparency=3),
    "png": lambda i: encode(i.convert("RGB"), compress_level=1),
    "png see-through": lambda i: encode(i.convert("RGB"), compress_level=1, transparency=(1, 2, 3)),
    "png alpha": lambda i: encode(i, compress_level=1),
    "webp": lambda i: encode(i.convert("RGB"), "WebP", method=0),
    "webp alpha": lambda i: encode(i, "WebP", method=0),
    "webp lossless": lambda i: encode(i.convert("RGB"), "WebP", lossless=True, method=0, quality=0),
    "webp lossless alpha": lambda i: encode(i, "WebP", lossless=True, method=0, quality=0),
}


def turned(picture: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture, "JPEG", exif=exif)


TURNED: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg turned": lambda i: turned(i.convert("RGB")),
    "jpeg grey turned": lambda i: turned(i.convert("L")),
}


@pytest.mark.parametrize("draft", ["whole", "draft", "page"])
def test_no_kind_of_picture_takes_more_than_is_taken_for_it(draft: str, tmp_path: Path) -> None:
    """Nor is it counted as twice as much, which would refuse pictures that fit."""
    kinds = {name: make for name, make in KINDS.items() if draft != "draft" or name.startswith("jpeg")} | TURNED
    small, large = noise(300, 300), noise(1800, 1800)
    files: list[Path] = []
    for number, make in enumerate(kinds.values()):
        for size, picture in (("small", small), ("large", large)):  # the small one loads what is loaded once
            files.append(tmp_path / f"{number}-{size}")
            files[-1].write_bytes(make(picture))
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # so that each gives back what it took
    run = subprocess.run(
        [sys.executable, "-c", PAGES if draft == "page" else DECODER, draft, *files],
        capture_output=True,
        text=True,
        check=True,
        env=environ,
    )
    wrong: list[str] = []
    for name, line in zip(kinds, run.stdout.splitlines()[1::2], strict=True):
        counted, peak = map(int, line.split())
        if not peak - MIB <= counted <= 2.2 * peak + 4 * MIB:
            wrong.append(f"{name}: {counted / MIB:.1f} MiB are counted, {peak / MIB:.1f} are taken")
    assert not wrong


@pytest.fixture
def budget() -> Iterator[Callable[[int], None]]:
    """Sets the budget of this process, until the test ends."""

    def limit(size: int) -> None:
        MEMORY.most = size

    yield limit
    assert MEMORY.held == 0
    MEMORY.most = None


def test_few_bytes_that_claim_many_pixels_are_refused_while_they_are_few(budget: Any) -> None:
    budget(512 * MIB)
    flat = encode(Image.new("RGBA", (8192, 6400)), "WebP", lossless=True, method=0, quality=0)
    assert len(flat) < 100
    with pytest.raises(
        BadPicture, match=r"8192x6400 pixels takes 1102 MiB; at most 448 MiB .* send it smaller, or as JPEG"
    ):
        decode(flat, read_header(flat), Fit(256, 224))


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_the_photo_of_a_phone_of_fifty_megapixels_is_decoded_with_half_of_one_gibibyte(
    budget: Any, options: dict[str, Any]
) -> None:
    budget(512 * MIB)
    photo = encode(noise(8160, 6120).convert("RGB"), "JPEG", **options)
    assert decode(photo, read_header(photo), Fit(256, 224, draft=True)).shape == (3, 224, 224)


def test_a_jpeg_in_one_scan_for_each_component_counts_as_one_that_is_kept_whole() -> None:
    """Progressive or not: libjpeg keeps all coefficients until the last scan. The scan says how many it is of."""
    data = bytearray(encode(noise(64, 64).convert("RGB"), "JPEG", subsampling=0))
    assert read_header(bytes(data)).coefficients == 0
    data[data.index(b"\xff\xda") + 4] = 1
    assert read_header(bytes(data)).coefficients == 3


class Taker:
    """Threads that take something, in the order in which they are begun, and keep it until they are released."""

    def __init__(self, shared: Budget) -> None:
        self._shared = shared
        self._release = threading.Event()
        self._threads: list[threading.Thread] = []
        self.took: list[str] = []

    def begin(self, name: str, size: int, queued: int) -> None:
        """Return when it has taken it, or is one of so many that queue."""

        def take() -> None:
            with self._shared.hold(size, name, patience=30):
                self.took.append(name)
                assert self._release.wait(30)

        self._threads.append(threading.Thread(target=take))
        self._threads[-1].start()
        until = time.monotonic() + 30
        while name not in self.took and len(self._shared._waiting) < queued:
            assert time.monotonic() < until

    def release(self) -> list[str]:
        self._release.set()
        for each in self._threads:
            each.join(30)
        assert self._shared.held == 0
        return self.took


def test_large_ones_wait_in_their_turn_and_small_ones_pass_them() -> None:
    taker = Taker(Budget(1000))
    taker.begin("first", 600, queued=0)
    taker.begin("larger", 800, queued=1)
    taker.begin("large", 200, queued=2)
    assert taker.took == ["first"], "what came later does not pass, though there is room for it"
    for number in range(6):
        taker.begin(f"small {number}", 60, queued=9)
    assert taker.took == ["first", *(f"small {number}" for number in range(6))]
    assert taker.release()[-2:] == ["larger", "large"]


def test_who_waits_too_long_is_told_that_it_is_busy_and_who_never_fits_that_it_is_too_large() -> None:
    shared = Budget(16 * MIB)
    with shared.hold(9 * MIB, "a picture"):
        with pytest.raises(Overloaded, match=r"takes 6 MiB, and others .*: 9 MiB of 16 MiB \(pipelines.memory\)"):
            shared.hold(6 * MIB, "a picture", patience=0.01).__enter__()
        with pytest.raises(TooLarge, match="takes 15 MiB; at most 14 MiB are allowed"):
            shared.hold(15 * MIB, "a picture").__enter__()
    assert shared.held == 0
