"""Pages are read through the gateway as the package reads them, by real models on a real Triton."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from reading_gateways import CHECKOUT, MODELS, PAGES, REPOSITORY, reading_gateway
from real_models import png_claiming
from v2_calls import channel_to

from gateway.app import Gateway
from gateway.forwarding.messages import build_request, parse_response
from gateway.models import catalogue
from gateway.steps import FanOut
from gateway.triton import LocalTriton
from gateway.v1 import reading_pb2, reading_pb2_grpc

pytestmark = pytest.mark.integration

Code = grpc.StatusCode
GOLDEN = json.loads((PAGES / "golden.json").read_text("utf-8"))
"""By page, what rapidocr 3.10.0 reads: text, score and corners of each line. `python -m perf.reading --golden` wrote
it, with a detector that sees pages enlarged to SIDE pixels only."""

SIDE = 320


@pytest.fixture(scope="session")
async def triton() -> AsyncIterator[LocalTriton]:
    catalogue.build(MODELS, REPOSITORY)
    server = LocalTriton(REPOSITORY, models=MODELS)
    await server.start()
    yield server
    await server.kill()  # nothing is in flight
    await server.aclose()


@pytest.fixture(scope="session")
async def gateway(triton: LocalTriton, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    folder = tmp_path_factory.mktemp("reading")
    async with reading_gateway(folder, triton.grpc_address, least_short_side=SIDE) as running:
        yield running


def page(name: str) -> bytes:
    return (PAGES / f"{name}.jpg").read_bytes()


async def read(gateway: Gateway, data: bytes, model: str = "page-text") -> Any:
    async with channel_to(gateway.listen) as channel:
        stub = reading_pb2_grpc.ReadingServiceStub(channel)
        return await stub.Read(reading_pb2.ReadRequest(model=model, page=data), timeout=60)


async def refused(gateway: Gateway, data: bytes, model: str = "page-text") -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(gateway, data, model)
    return caught.value.code(), caught.value.details() or ""


def unspaced(texts: list[str]) -> list[str]:
    """Whether there is a blank between two words differs with the padding of a line, in the package too."""
    return ["".join(text.split()) for text in texts]


def expected_texts(name: str) -> list[str]:
    return unspaced([text for text, _, _ in GOLDEN[name]])


@pytest.mark.parametrize("name", GOLDEN)
async def test_a_page_is_read_as_the_package_reads_it(gateway: Gateway, name: str) -> None:
    answer = await read(gateway, page(name))
    assert unspaced([line.text for line in answer.lines]) == expected_texts(name)
    for line, (_, score, corners) in zip(answer.lines, GOLDEN[name], strict=True):
        assert line.score == pytest.approx(score, abs=0.05)
        assert np.abs(np.array([(at.x, at.y) for at in line.corners]) - corners).max() <= 4
    assert answer.served.model == "page-text"


async def test_pages_of_one_request_get_their_own_lines(gateway: Gateway) -> None:
    """Over V2: four pages of three sizes, one of them without text."""
    names = ["chinese", "nothing_on_it", "flat", "chinese"]
    pages = np.array([[page(name)] for name in names], np.object_)
    async with channel_to(gateway.listen) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        body = await call(build_request("page-text", {"page": pages}), timeout=60)
    made = {name: array for name, (_, array) in parse_response(body).items()}
    for row, name in enumerate(names):
        (count,) = made["lines"][row]
        texts = [text.decode() for text in made["text"][row, :count]]
        assert unspaced(texts) == expected_texts(name)
        assert not made["text"][row, count:].any()


def encoded(size: tuple[int, int], form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "white").save(out, form)
    return out.getvalue()


BAD = {
    "empty": (b"", "page is empty; send an encoded picture: JPEG, PNG or WebP"),
    "no picture": (b"%PDF-1.7 and so on", "input 'page', row 0: not a JPEG, PNG or WebP picture"),
    "damaged": (encoded((64, 64))[:-40], "input 'page', row 0: the PNG data is damaged or incomplete"),
    "too large": (png_claiming(9000, 9000), "9000x9000 = 81000000 pixels; at most 52428800 are allowed"),
    "too thin": (encoded((2, 400)), "2x400 pixels; one side may be 100 times as long as the other"),
}


@pytest.mark.parametrize(("data", "wrong"), BAD.values(), ids=BAD)
async def test_a_bad_page_is_its_callers_fault_and_says_what_is_wrong(
    gateway: Gateway, data: bytes, wrong: str
) -> None:
    code, text = await refused(gateway, data)
    assert code is Code.INVALID_ARGUMENT
    assert wrong in text


async def test_a_page_with_more_lines_than_allowed_is_refused_with_its_row(triton: LocalTriton, tmp_path: Path) -> None:
    async with reading_gateway(tmp_path, triton.grpc_address, least_short_side=SIDE, most=2) as small:
        code, text = await refused(small, page("chinese"))
        assert code is Code.INVALID_ARGUMENT
        assert "row 0: 'text_regions' finds more than 2 items in it (fan_out.most)" in text
        assert (await read(small, page("flat"))).lines


@pytest.mark.parametrize(
    ("model", "code", "wrong"),
    [
        ("", Code.INVALID_ARGUMENT, "model is empty; pipelines: page-text"),
        ("page-txt", Code.NOT_FOUND, "page-txt"),
        ("line-text", Code.INVALID_ARGUMENT, "'line-text' is no pipeline; pipelines: page-text"),
    ],
)
async def test_only_a_reading_pipeline_reads(gateway: Gateway, model: str, code: grpc.StatusCode, wrong: str) -> None:
    found, text = await refused(gateway, page("flat"), model)
    assert (found, wrong in text) == (code, True), text


async def test_an_endpoint_dies_between_detection_and_recognition(triton: LocalTriton, tmp_path: Path) -> None:
    """The lines of a page go to the endpoint that is left, and nobody sees that the other died. Where none is left the
    caller gets UNAVAILABLE, and nothing of its page stays.
    """
    other = LocalTriton(REPOSITORY, models=MODELS)
    await other.start()
    for name in ("both", "alone"):
        (tmp_path / name).mkdir()
    async with (
        reading_gateway(tmp_path / "both", other.grpc_address, triton.grpc_address, least_short_side=SIDE) as both,
        reading_gateway(tmp_path / "alone", other.grpc_address, least_short_side=SIDE) as alone,
    ):
        try:
            with Halt(both) as on_both, Halt(alone) as on_alone:
                answered = asyncio.ensure_future(read(both, page("latin")))
                failed = asyncio.ensure_future(refused(alone, page("latin")))
                await asyncio.gather(on_both.reached(), on_alone.reached())
                await other.kill()
            assert unspaced([line.text for line in (await answered).lines]) == expected_texts("latin")
            code, text = await failed
            assert code is Code.UNAVAILABLE, text
            (model,) = alone._topology.now.pipelines.values()
            assert (model._threads.room.held, model.faults) == (0, [])
        finally:
            await other.kill()
            await other.aclose()


class Halt:
    """Holds up the step between detection and the other models, until it is left."""

    def __init__(self, gateway: Gateway) -> None:
        (model,) = gateway._topology.now.pipelines.values()
        (self._part,) = [part for part in model.pipeline.parts if isinstance(part, FanOut)]
        self._was_reached = threading.Event()
        self._go_on = threading.Event()

    def __enter__(self) -> Halt:
        self._split = split = self._part.split.step.split

        def halting(row: Any) -> Any:
            self._was_reached.set()
            assert self._go_on.wait(60)
            return split(row)

        self._part.split.step.split = halting  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._go_on.set()

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._was_reached.wait, 60)


def test_the_shipped_config_names_the_committed_alphabet() -> None:
    """A check of the config needs no build."""
    assert "model_repository/ocr_recognition/alphabet.txt" in (CHECKOUT / "deploy/examples/reading.yaml").read_text()
