"""What decoding takes is known before it is taken, and is taken out of one budget for all pictures of a process.

Real pictures are decoded by Pillow in processes of their own, whose peak of resident memory is the judge.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import encode
from PIL import Image

from gateway.errors import Overloaded
from gateway.stages.budget import MEMORY, MIB, Budget, TooLarge
from gateway.stages.header import BadPicture, read_header
from gateway.stages.picture import Fit, decode

DECODER = """
import sys
from gateway.stages import budget
from gateway.stages.header import read_header
from gateway.stages.picture import Fit, decode

def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

for path in sys.argv[2:]:
    data = open(path, "rb").read()
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS:")
    taken = []
    budget.MEMORY._take = lambda size, what, patience: taken.append(size)
    decode(data, read_header(data), Fit(256, 224, draft=sys.argv[1] == "draft"))
    print(taken[0], resident("VmHWM:") - before)
"""


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 255, (64, 64, 4), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


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
    "png palette": lambda i: encode(i.convert("RGB").quantize(64), compress_level=1),
    "png palette see-through": lambda i: encode(i.convert("RGB").quantize(64), compress_level=1, transparency=3),
    "png": lambda i: encode(i.convert("RGB"), compress_level=1),
    "png see-through": lambda i: encode(i.convert("RGB"), compress_level=1, transparency=(1, 2, 3)),
    "png alpha": lambda i: encode(i, compress_level=1),
    "webp": lambda i: encode(i.convert("RGB"), "WebP", method=0),
    "webp alpha": lambda i: encode(i, "WebP", method=0),
    "webp lossless": lambda i: encode(i.convert("RGB"), "WebP", lossless=True, method=0, quality=0),
    "webp lossless alpha": lambda i: encode(i, "WebP", lossless=True, method=0, quality=0),
}


@pytest.mark.parametrize("draft", ["whole", "draft"])
def test_no_kind_of_picture_takes_more_than_is_taken_for_it(draft: str, tmp_path: Path) -> None:
    """Nor is it counted as twice as much, which would refuse pictures that fit."""
    wrong: list[str] = []
    for name, make in KINDS.items():
        if draft == "draft" and not name.startswith("jpeg"):
            continue
        files = [tmp_path / "small", tmp_path / "large"]  # the first one loads what is loaded once
        for file, size in zip(files, ((300, 300), (2600, 2600)), strict=True):
            file.write_bytes(make(noise(*size)))
        run = subprocess.run([sys.executable, "-c", DECODER, draft, *files], capture_output=True, text=True, check=True)
        counted, peak = map(int, run.stdout.splitlines()[-1].split())
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
    with pytest.raises(BadPicture, match=r"8192x6400 pixels takes 1102 MiB; 512 MiB .* send it smaller, or as JPEG"):
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


def test_who_comes_while_all_is_held_waits_for_it_in_its_turn() -> None:
    shared, order, begun = Budget(100), [], threading.Event()
    release = threading.Event()

    def take(name: str, size: int) -> None:
        with shared.hold(size, name, patience=30):
            order.append(name)
            if name == "first":
                begun.set()
                assert release.wait(30)

    first = threading.Thread(target=take, args=("first", 60))
    first.start()
    assert begun.wait(30)
    large = threading.Thread(target=take, args=("large", 100))
    large.start()
    while len(shared._waiting) < 1:
        pass
    small = threading.Thread(target=take, args=("small", 1))
    small.start()
    while len(shared._waiting) < 2:
        pass
    assert order == ["first"], "a small one does not pass a large one that came before"
    release.set()
    for each in (first, large, small):
        each.join(30)
    assert order == ["first", "large", "small"]
    assert shared.held == 0


def test_who_waits_too_long_is_told_that_it_is_busy_and_who_never_fits_that_it_is_too_large() -> None:
    shared = Budget(10 * MIB)
    with shared.hold(6 * MIB, "a picture"):
        with pytest.raises(Overloaded, match=r"takes 6 MiB, which others hold: 6 MiB of 10 MiB \(pipelines.memory\)"):
            shared.hold(6 * MIB, "a picture", patience=0.01).__enter__()
        with pytest.raises(TooLarge, match="takes 11 MiB; 10 MiB are there for all"):
            shared.hold(11 * MIB, "a picture").__enter__()
    assert shared.held == 0
