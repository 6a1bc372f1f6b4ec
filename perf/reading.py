"""Reading, against rapidocr itself and against a caller that does the gateway's steps and calls Triton directly.

    python -m perf.reading                  the table of docs/tasks/reading.md: twenty pages (perf/reading_pages.py)
    python -m perf.reading --golden         writes tests/data/reading: small pages, and what rapidocr reads on them

rapidocr gets a virtual environment of its own in the cache. The fonts are those of Debian's fonts-dejavu,
fonts-liberation and fonts-noto-cjk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import yaml
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

from gateway.artifacts import cache_folder
from gateway.models import catalogue
from gateway.steps import Columns, LocalStep, ModelCall, Part, PipelineSpec, batches, build_pipeline, datatype_of, take
from gateway.steps.reading.text import reading_order
from gateway.triton import LocalTriton
from gateway.v1 import reading_pb2, reading_pb2_grpc
from perf.reading_pages import PAGES, SMALL, SMALL_SIDE, drawn

CHECKOUT = Path(__file__).parents[1]
CONFIG = CHECKOUT / "deploy/examples/reading.yaml"
MODELS = ("ocr_detection", "ocr_direction", "ocr_recognition")
GOLDEN = CHECKOUT / "tests/data/reading"
_PINS = ("rapidocr==3.10.0", "onnxruntime==1.31.1")

_THEIRS = """
import json, sys, time
from pathlib import Path
from rapidocr import RapidOCR
options = {"Det.limit_side_len": int(sys.argv[2]), "EngineConfig.onnxruntime.intra_op_num_threads": 1}
reader = RapidOCR(params={"Global.log_level": "error", **options})
said = {}
for again in range(2):
    for file in sorted(Path(sys.argv[1]).glob("*.jpg")):
        began = time.perf_counter()
        read = reader(file.read_bytes())
        boxes = [] if read.boxes is None else read.boxes.tolist()
        lines = [list(line) for line in zip(read.txts or (), map(float, read.scores or ()), boxes)]
        said[file.stem] = {"seconds": time.perf_counter() - began, "lines": lines}
print(json.dumps(said))
"""


@dataclass(frozen=True)
class Read:
    """What one reader made of one page: text, score and box of each line, and the seconds that it took."""

    lines: list[tuple[str, float, list[list[float]]]]
    seconds: float

    def in_order(self) -> list[str]:
        """The texts, for every reader in the gateway's order."""
        order = reading_order(np.array([box for _, _, box in self.lines], np.float32).reshape(-1, 4, 2))
        return [self.lines[number][0] for number in order]


def by_rapidocr(pages: Path, least_side: int = 736) -> dict[str, Read]:
    """What rapidocr reads on each page of a folder, by the file's name. least_side: its default."""
    home = cache_folder() / "rapidocr-3.10.0"
    python = home / "bin/python"
    if not (home / ".ready").exists():
        venv.create(home, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *_PINS], check=True)
        (home / ".ready").touch()
    run = subprocess.run([python, "-c", _THEIRS, str(pages), str(least_side)], check=True, stdout=subprocess.PIPE)
    return {
        name: Read([tuple(line) for line in one["lines"]], one["seconds"])
        for name, one in json.loads(run.stdout).items()
    }


class Direct:
    """A caller with the gateway's steps in its own process, which calls Triton by tritonclient, one call at a time."""

    def __init__(self, triton: str) -> None:
        config = yaml.safe_load(CONFIG.read_text("utf-8"))
        self._models = {
            name: model["variants"]["cpu"]["model"] for name, model in config["models"].items() if "variants" in model
        }
        declared = PipelineSpec.model_validate(config["models"]["page-text"]["pipeline"])
        self._pipeline = build_pipeline("page-text", declared, lambda path: (CONFIG.parent / path).read_bytes())
        self._client = InferenceServerClient(triton)

    def read(self, page: bytes) -> list[tuple[str, float, list[list[float]]]]:
        row = np.empty((1, 1), np.object_)
        row[0, 0] = page
        made = self._pipeline.answer(self._run(self._pipeline.parts, {"page": row}, 1, self._pipeline.max_batch_size))
        texts = [text.decode() for text in made["text"][0]]
        return list(zip(texts, made["score"][0].tolist(), made["box"][0].tolist(), strict=True))

    def _run(self, parts: Sequence[Part], tensors: Columns, rows: int, most: int) -> dict[str, Any]:
        working = dict(tensors)
        for part in parts:
            if isinstance(part, LocalStep):
                working |= part.run(working)
            elif isinstance(part, ModelCall):
                sent = part.arguments(working)
                answers = [(batch, self._call(part, take(sent, batch))) for batch in batches(sent, rows, most)]
                working |= part.merged(answers, rows)
            else:
                items = part.split.start(working, 1, part.bounds).run()
                inside = self._run(part.parts, items.columns, len(items), part.max_batch_size) if len(items) else {}
                working |= part.gather(items, inside, rows)
        return working

    def _call(self, part: ModelCall, arrays: dict[str, Any]) -> dict[str, Any]:
        inputs = []
        for name, array in arrays.items():
            inputs.append(InferInput(name, array.shape, datatype_of(array)))
            inputs[-1].set_data_from_numpy(np.ascontiguousarray(array))
        asked = [InferRequestedOutput(name) for name in part.requested]
        answer = self._client.infer(self._models[part.model], inputs, outputs=asked)
        rows = len(next(iter(arrays.values())))
        return part.results({name: answer.as_numpy(name) for name in part.requested}, rows)


class Gateway:
    """The gateway as users start it, over one Triton."""

    def __init__(self, triton: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "gateway", "serve", "--config", str(CONFIG), "--listen", self.address]
        self._process = subprocess.Popen(
            [*command, "--admin-listen", "127.0.0.1:0"],
            env={**os.environ, "TRITON_ENDPOINT": triton},
            stdout=subprocess.DEVNULL,
            stderr=(folder / "gateway.log").open("wb"),
        )
        self._channel = grpc.insecure_channel(self.address)
        self._stub = reading_pb2_grpc.ReadingServiceStub(self._channel)

    def read(self, page: bytes) -> list[tuple[str, float, list[list[float]]]]:
        request = reading_pb2.ReadRequest(model="page-text", page=page)
        answer = self._stub.Read(request, timeout=60, wait_for_ready=True)
        return [(line.text, line.score, [[at.x, at.y] for at in line.corners]) for line in answer.lines]

    def close(self) -> None:
        self._channel.close()
        self._process.terminate()
        self._process.wait()


def timed(readers: Sequence[Callable[[bytes], Any]], pages: Path) -> list[dict[str, Read]]:
    """What each reader makes of each page. They read in turn, twice, and the second time counts: in the first, room is
    found and code is loaded.
    """
    made: list[dict[str, Read]] = [{} for _ in readers]
    for _ in range(2):
        for file in sorted(pages.glob("*.jpg")):
            for read, into in zip(readers, made, strict=True):
                began = time.perf_counter()
                lines = read(file.read_bytes())
                into[file.stem] = Read(lines, time.perf_counter() - began)
    return made


def distance(one: str, other: str) -> int:
    """Characters to insert, delete or replace (Levenshtein)."""
    before = list(range(len(other) + 1))
    for number, character in enumerate(one, 1):
        now = [number]
        for place, compared in enumerate(other):
            now.append(min(before[place + 1] + 1, now[place] + 1, before[place] + (character != compared)))
        before = now
    return before[-1]


def table(ours: dict[str, Read], theirs: dict[str, Read], direct: dict[str, Read]) -> str:
    """Markdown: lines and wrong characters (blanks not counted) of each page, and seconds."""
    rows = ["| page | lines | the same | wrong characters: gateway, rapidocr | seconds: gateway, direct, rapidocr |"]
    rows.append("| --- | --- | --- | --- | --- |")
    sums = np.zeros(7)
    for page, name in zip(PAGES, sorted(ours), strict=True):
        mine, other = ours[name].in_order(), theirs[name].in_order()
        truth = "".join(page.texts).replace(" ", "")
        wrong = [distance("".join(lines).replace(" ", ""), truth) for lines in (mine, other)]
        same = sum(line in other for line in mine)
        seconds = [each[name].seconds for each in (ours, direct, theirs)]
        sums += [len(other), same, *wrong, *seconds]
        shown = ", ".join(f"{each:.2f}" for each in seconds)
        rows.append(f"| {page.name} | {len(mine)} of {len(other)} | {same} | {wrong[0]}, {wrong[1]} | {shown} |")
    total = sum(len("".join(page.texts).replace(" ", "")) for page in PAGES)
    rates = ", ".join(f"{wrong / total:.2%}" for wrong in sums[2:4])
    shown = ", ".join(f"{each:.1f}" for each in sums[4:])
    rows.append(
        f"| **all** | {sums[0]:.0f} | {sums[1]:.0f} | {sums[2]:.0f}, {sums[3]:.0f} of {total} ({rates}) | {shown} |"
    )
    return "\n".join(rows)


def write_golden() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for page in SMALL:
        (GOLDEN / f"{page.name.replace(' ', '_')}.jpg").write_bytes(drawn(page))
    said = {name: [list(line) for line in read.lines] for name, read in by_rapidocr(GOLDEN, SMALL_SIDE).items()}
    text = json.dumps(said, ensure_ascii=False, indent=1) + "\n"
    (GOLDEN / "golden.json").write_text(text, encoding="utf-8")


async def compare(folder: Path) -> str:
    for number, page in enumerate(PAGES):
        (folder / f"{number:02}.jpg").write_bytes(drawn(page))
    catalogue.build(MODELS, CHECKOUT / "model_repository")
    async with LocalTriton(CHECKOUT / "model_repository", models=MODELS) as triton:
        gateway = Gateway(triton.grpc_address, folder)
        try:
            readers = (gateway.read, Direct(triton.grpc_address).read)
            ours, direct = await asyncio.to_thread(timed, readers, folder)
        finally:
            gateway.close()
    return table(ours, await asyncio.to_thread(by_rapidocr, folder), direct)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", action="store_true", help="write tests/data/reading instead")
    if parser.parse_args().golden:
        write_golden()
        return
    with tempfile.TemporaryDirectory() as folder:
        print(asyncio.run(compare(Path(folder))))


if __name__ == "__main__":
    main()
