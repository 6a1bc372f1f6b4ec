"""Whatever a caller sends, it gets what Triton itself answers: directly, through `serve --triton`, through a public
model, through one that merges while others call it too, and by memory that gateway and Triton share.

Invariant: same codes, same texts, same bytes, but for `ways.ALLOWED`, which is the table in docs/errors.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from drawn_requests import MODELS, UNARY, Asked, Step, large_and_even, load_config, put, rounds, sequences
from hypothesis import Phase, given, settings
from triton_fixture import FAST_START
from tritonclient.grpc import service_pb2 as pb
from v2_calls import Outcome, batch_of, call, numbers
from v2_gateways import Script
from ways import ALLOWED, PUBLIC, SECONDS, Way, direct_to, public, same, sharing, simple, transparent

from gateway.triton import LocalTriton

TIMES = max(1, int(os.environ.get("SOAK_SECONDS", "60")) // 360)
"""`make soak` draws more, and other examples each time: some ten minutes in an hour's run."""

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300 * TIMES)]

ERRORS = Path(__file__).parents[2] / "docs" / "errors.md"
FORWARDED = "x-told-who"  # Triton makes a parameter of it
Code = grpc.StatusCode


@dataclass(frozen=True)
class Ways:
    direct: Way
    transparent: Way
    public: Way
    merged: Way
    sharing: Way | None = None  # where the server can

    @property
    def through(self) -> tuple[Way, ...]:
        always = self.transparent, self.public, self.merged
        return always if self.sharing is None else (*always, self.sharing)


@pytest.fixture(scope="module")
async def own_triton(triton_repository: Path) -> AsyncIterator[LocalTriton]:
    """One that forwards headers, and whose models may be loaded anew."""
    extra = (*FAST_START, f"--grpc-header-forward-pattern={FORWARDED}")
    server = LocalTriton(triton_repository, models=MODELS, extra=extra)
    await server.start()
    yield server
    await server.kill()
    await server.aclose()


@pytest.fixture(scope="module")
async def ways(own_triton: LocalTriton, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ways]:
    address = own_triton.grpc_address
    folder = tmp_path_factory.mktemp("ways")
    async with (
        direct_to(address) as direct,
        transparent(address) as bare,
        public(folder, address) as (plain, merged),
        sharing(folder, address) as shared,
    ):
        yield Ways(direct, bare, plain, merged, shared)


async def differences(round_: list[Asked], ways: Ways, copies: int = 3) -> list[str]:
    """Of what several callers get who ask the same at the same time, on the first way that has any."""
    for way in ways.through:
        several = round_ * copies
        outcomes = await way.ask_all(several)
        told = [await same(asked, got, way, ways.direct) for asked, got in zip(several, outcomes, strict=True)]
        if found := [text for text in told if text]:
            return found
    return []


def test_what_may_differ_is_in_the_docs() -> None:
    section = ERRORS.read_text().partition("## Where answers differ from Triton's own")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \|", section, re.MULTILINE)
    assert rows[2:] == list(ALLOWED)


# Drawn: what fails is a few requests already, and what hangs must not hang again and again


@settings(max_examples=120 * TIMES, phases=[Phase.generate], derandomize=TIMES == 1)
@given(rounds())
async def test_any_request_gets_tritons_own_answer_whichever_way_it_takes(ways: Ways, round_: list[Asked]) -> None:
    assert not await differences(round_, ways)


@settings(max_examples=80 * TIMES, phases=[Phase.generate], derandomize=TIMES == 1)
@given(rounds())
async def test_a_stream_gets_tritons_own_answers_whichever_way_it_takes(ways: Ways, round_: list[Asked]) -> None:
    round_ = _one_decoupled(round_)
    _tell_apart(round_)
    expected = (await ways.direct.stream_all(round_)).under(ways.direct)
    for way in ways.through:
        got = (await way.stream_all(round_)).under(way)
        assert got == expected, way.name


def _one_decoupled(round_: list[Asked]) -> list[Asked]:
    """Of several requests of a decoupled model on one stream Triton 2.51 dies now and then, without a gateway too."""
    first = next((asked for asked in round_ if asked.message.model_name == "repeat"), None)
    return [asked for asked in round_ if asked is first or asked.message.model_name != "repeat"]


def _tell_apart(round_: list[Asked]) -> None:
    """Of a model that says what id it sees, row "ids on streams" is not to be seen."""
    taken = {""}
    for number, asked in enumerate(round_):
        if asked.message.model_name.endswith("_echo") and asked.message.id in taken:
            asked.message.id = f"other-{number}"
        taken.add(asked.message.id)


_sequence_numbers = itertools.count(1)


def _step(step: Step, sequence: int) -> Asked:
    asked = simple("accumulate", [step.value], id=f"{sequence}")
    parameters = asked.message.parameters
    parameters["sequence_id"].int64_param = sequence
    parameters["sequence_start"].bool_param = step.start
    parameters["sequence_end"].bool_param = step.end
    return asked


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
@settings(max_examples=25 * TIMES, phases=[Phase.generate], derandomize=TIMES == 1)
@given(steps=sequences())
async def test_sequences_are_answered_as_by_triton_itself(ways: Ways, streamed: bool, steps: list[Step]) -> None:
    """Each way has a sequence of its own, of whose number the answers must tell nothing else."""

    async def told(way: Way) -> list[tuple[object, ...]]:
        number = next(_sequence_numbers)
        asked = [_step(step, number) for step in steps]
        called = way.name_of("accumulate")
        if streamed:
            seen = await way.stream_all(asked)
            assert seen.code is Code.OK
            answers = [
                (a.error_message, list(a.infer_response.raw_output_contents))
                for each in seen.answers.values()
                for a in each
            ]
        else:
            outcomes = [await way.ask(one) for one in asked]
            answers = [(o.text, [*o.response.raw_output_contents, o.code.name.encode()]) for o in outcomes]
        return [(text.replace(called, "accumulate").replace(str(number), "N"), raw) for text, raw in answers]

    expected = await told(ways.direct)
    for way in ways.through:
        assert await told(way) == expected, way.name


# By hand


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate], ids=str)
@pytest.mark.parametrize(("what", "array"), [pytest.param(*row, id=row[0]) for row in large_and_even()])
async def test_tensors_that_compress_well_are_taken(
    ways: Ways, what: str, array: np.ndarray, compression: grpc.Compression
) -> None:
    message = pb.ModelInferRequest(model_name="identity_int64")
    put(message, array, "INT64")
    assert not await differences([Asked(message, compression=compression)], ways, copies=1)


@pytest.mark.parametrize("version", ["", "1", "2", "3", "abc"])
async def test_a_version_is_the_one_that_was_asked_for(ways: Ways, version: str) -> None:
    """Beside callers who ask for others."""
    others = [simple("counted", [n], model_version="12"[n % 2]) for n in range(8)]
    asked = [simple("counted", [100 + n], model_version=version) for n in range(4)]
    for _ in range(5):
        assert not await differences([*others, *asked], ways, copies=1)
    assert ways.merged.largest_batch > 1


async def test_merging_happens_where_it_may_and_ids_come_back(ways: Ways) -> None:
    for model in ("counted", "batched_echo", "identity_fp32"):
        merged = replace(ways.merged, largest_batch=1)
        for number in range(5):
            if model == "identity_fp32":
                message = pb.ModelInferRequest(model_name=model, id=f"mine-{number}")
                put(message, [[float(number)]], "FP32")
                round_ = [Asked(message)] * 8
            else:
                round_ = [simple(model, [n], id=f"id-{n}") for n in range(8)]
            outcomes = await merged.ask_all(round_)
            found = [await same(asked, got, merged, ways.direct) for asked, got in zip(round_, outcomes, strict=True)]
            assert not any(found), found
        assert merged.largest_batch > 1


async def test_words_of_one_caller_are_not_anothers(ways: Ways) -> None:
    """An output whose first axis is not the batch, and has as many rows by chance."""
    round_ = []
    for word in ("d", "c", "b", "a", "h", "g"):
        message = pb.ModelInferRequest(model_name="words", id=word)
        put(message, [[word.encode()]], "BYTES")
        round_.append(Asked(message))
    for _ in range(10):
        assert not await differences(round_, ways, copies=2)


async def test_answers_with_parameters_go_to_who_asked(ways: Ways, tmp_path: Path) -> None:
    """Of a server as later Tritons are, whose Python models answer parameters beside tensors: sums of the request."""
    real = ways.direct.channels[0]

    async def infer(body: bytes, _: Any) -> bytes:
        outcome = await call(real, body, timeout=SECONDS)
        response = outcome.response
        response.parameters["sum"].int64_param = int(sum(numbers(response)))
        response.parameters["rows"].string_param = str(response.outputs[0].shape[0])
        return bytes(response.SerializeToString())

    def passed_on(method: str) -> Any:
        async def ask(body: bytes, _: Any) -> bytes:
            return (await call(real, body, method, timeout=SECONDS)).body

        return ask

    methods = ("ModelConfig", "ModelMetadata", "ModelStatistics", "RepositoryIndex", "ServerMetadata", "ServerReady")
    script = Script(infer=infer, others={method: passed_on(method) for method in methods})
    async with (
        script.serve() as address,
        direct_to(address) as direct,
        transparent(address) as bare,
        public(tmp_path, address, ["counted"]) as (plain, merged),
    ):
        for _ in range(5):
            round_ = [simple("counted", [n] * (1 + n % 2)) for n in range(8)]
            assert not await differences(round_, Ways(direct, bare, plain, merged), copies=1)


async def test_metadata_that_triton_forwards_reaches_the_model(
    ways: Ways, own_triton: LocalTriton, tmp_path: Path
) -> None:
    def of(caller: str) -> list[Asked]:
        metadata = ((FORWARDED, caller), ("x-other-bin", b"\0\xff"), ("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01"))
        return [replace(simple("batched_echo", [n]), metadata=metadata) for n in range(2)]

    round_ = [asked for caller in ("me", "you", "two words", "%41") for asked in of(caller)]
    merge = f"{{metadata: [{FORWARDED}]}}"
    async with public(tmp_path, own_triton.grpc_address, ["batched_echo"], merge=merge) as (plain, merged):
        told = replace(ways, public=plain, merged=merged)
        for _ in range(5):
            found = await differences(round_, told, copies=2)
            assert not found, "\n".join(found)
        assert merged.largest_batch > 1


async def test_a_full_queue_is_told_as_the_table_says(ways: Ways) -> None:
    """One at a time, four waiting, and twelve who ask. How many get through directly is chance.

    Of a public model the gateway knows how long the queue is: it has them wait for their turn, or refuses them itself.
    """

    async def outcomes(way: Way) -> set[tuple[str, bool]]:
        got = await way.ask_all([simple("slow", [300]) for _ in range(12)])
        return {(outcome.code.name, outcome.text.endswith("Exceeds maximum queue size")) for outcome in got}

    ok = ("OK", False)
    assert await outcomes(ways.direct) == {ok, ("UNAVAILABLE", True)}
    assert await outcomes(ways.transparent) == {ok, ("UNAVAILABLE", True)}
    for way in (ways.public, ways.merged):
        got = await outcomes(way)
        assert ok in got
        assert got <= {ok, ("RESOURCE_EXHAUSTED", False)}


@pytest.mark.parametrize(
    "body", [b"\xff\xff", b"\x0a\x05ab", b"\x0a\x01\xff", b"\x0a\x07counted\x2a\x01\x08"], ids=repr
)
async def test_bytes_that_are_no_message_get_tritons_code(ways: Ways, body: bytes) -> None:
    direct = await call(ways.direct.channels[0], body)
    for way in ways.through:
        assert (await call(way.channels[0], body)).code is direct.code


READABLE = {
    "group": b"\x43\x4b\x08\x01\x4c\x44",
    "group in a parameter": b"\x22\x0b\x43\x44\x0a\x01a\x12\x04\x10\x05\x43\x44",
    "parameter of many fields": b"\x22\x15" + b"\x0a\x01a" * 3 + b"\x12\x02\x10\x05" * 3,
}
UNREADABLE = {
    "key": b"\x22\x06\x0a\x02\xff\xfe\x12\x00",
    "string": b"\x22\x09\x0a\x01a\x12\x04\x1a\x02\xff\xfe",
    "length": b"\x22\x03\x0a\x09a",
}


@pytest.mark.parametrize("more", READABLE.values(), ids=READABLE)
async def test_what_protobuf_lets_pass_is_answered_alike(ways: Ways, more: bytes) -> None:
    for way in (ways.direct, *ways.through):
        request = simple("counted", [1]).to(way.name_of("counted"))
        outcome = await call(way.channels[0], more + request.SerializeToString())
        assert outcome.code is Code.OK, (way.name, outcome.text)


@pytest.mark.parametrize("more", UNREADABLE.values(), ids=UNREADABLE)
async def test_a_parameter_that_cannot_be_read_is_refused_as_the_table_says(ways: Ways, more: bytes) -> None:
    for way in ways.through:
        request = simple("counted", [1]).to(way.name_of("counted"))
        outcome = await call(way.channels[0], more + request.SerializeToString())
        assert outcome.code is Code.INVALID_ARGUMENT, way.name
        assert outcome.text.startswith("A parameter of the request cannot be read: ")
    direct = await call(ways.direct.channels[0], more + simple("counted", [1]).message.SerializeToString())
    assert (direct.code, direct.text) == (Code.INTERNAL, "Unable to parse request")


EMPTY_FINAL = "triton_enable_empty_final_response"


@pytest.mark.parametrize("kind", ["bool_param", "int64_param", "uint64_param", "string_param", "double_param", ""])
async def test_who_asks_for_the_empty_last_answer_gets_it_or_tritons_refusal(ways: Ways, kind: str) -> None:
    values = {"bool_param": True, "string_param": "true", "double_param": 1.0}
    asked = simple("counted", [1], id="1", parameters={EMPTY_FINAL: pb.InferParameter()})
    if kind:
        setattr(asked.message.parameters[EMPTY_FINAL], kind, values.get(kind, 1))
    assert not await differences([asked], ways, copies=1)
    expected = (await ways.direct.stream_all([asked])).under(ways.direct)
    for way in ways.through:
        assert (await way.stream_all([asked])).under(way) == expected, way.name


async def test_an_empty_message_is_answered_alike(ways: Ways) -> None:
    assert not await differences([Asked(pb.ModelInferRequest())], ways, copies=1)


@pytest.mark.parametrize("length", [1000, 4000])
@pytest.mark.parametrize("where", ["id", "model_name", "model_version", "input", "output"])
async def test_a_long_name_is_answered_alike_or_refused_as_the_table_says(ways: Ways, where: str, length: int) -> None:
    asked = simple("counted", [1])
    long = "9" * length
    if where == "input":
        asked.message.inputs[0].name = long
    elif where == "output":
        asked.message.outputs.add(name=long)
    else:
        setattr(asked.message, where, long)
    for way in ways.through:
        got = await way.ask(asked)
        if where == "id" or not _is_cut(got, await ways.direct.ask(asked)):
            assert not await same(asked, got, way, ways.direct)


def _is_cut(got: Outcome, direct: Outcome) -> bool:
    """Row "long names": refused, or not repeated to its end."""
    refused = got.code is Code.INVALID_ARGUMENT and direct.code is not Code.OK
    return refused or (got.code is direct.code and direct.text.startswith(got.text[:100]))


# Other methods


def _messages(model: str) -> list[tuple[str, Any]]:
    """Methods that tell of one model."""
    return [
        *(("ModelReady", pb.ModelReadyRequest(name=model, version=version)) for version in ("", "1", "9", "abc")),
        *(("ModelMetadata", pb.ModelMetadataRequest(name=model, version=version)) for version in ("", "1", "9", "x")),
        *(("ModelConfig", pb.ModelConfigRequest(name=model, version=version)) for version in ("", "2", "9")),
        ("ModelStatistics", pb.ModelStatisticsRequest(name=model, version="9")),
    ]


SERVER = [
    ("ServerLive", pb.ServerLiveRequest()),
    ("ServerReady", pb.ServerReadyRequest()),
    ("ServerMetadata", pb.ServerMetadataRequest()),
    ("RepositoryIndex", pb.RepositoryIndexRequest(repository_name="nowhere")),
    ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="nobody")),
    ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="nobody")),
    ("TraceSetting", pb.TraceSettingRequest(model_name="nobody")),
    ("TraceSetting", pb.TraceSettingRequest()),
    ("LogSettings", pb.LogSettingsRequest()),
    ("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest(name="nowhere")),
    ("CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusRequest()),
    ("SystemSharedMemoryRegister", pb.SystemSharedMemoryRegisterRequest(name="a", key="/none-such", byte_size=8)),
]


@pytest.mark.parametrize("model", ["counted", "nobody", "repeat", "größe"])
async def test_what_is_told_of_a_model_is_what_triton_tells(ways: Ways, model: str) -> None:
    for method, request in _messages(model):
        expected = await call(ways.direct.channels[0], request, method)
        for way in ways.through:
            called = way.name_of(model)
            request.name = called
            got = await call(way.channels[0], request, method)
            response = getattr(pb, f"{method}Response")
            want, have = (response.FromString(outcome.body) for outcome in (expected, got))
            if method == "ModelMetadata" and got.body:
                have.name = model
            if method == "ModelConfig" and got.body:
                have.config.name = model
            assert (got.code, got.text.replace(called, model)) == (expected.code, expected.text), (way.name, method)
            assert have == want, (way.name, method)


@pytest.mark.parametrize(("method", "request_"), SERVER, ids=[f"{n}-{method}" for n, (method, _) in enumerate(SERVER)])
async def test_what_is_told_of_the_server_is_what_triton_tells(ways: Ways, method: str, request_: Any) -> None:
    expected = await call(ways.direct.channels[0], request_, method)
    for way in (ways.transparent, ways.public):
        got = await call(way.channels[0], request_, method)
        assert (got.code, got.text) == (expected.code, expected.text), way.name
        response = getattr(pb, f"{method}Response")
        assert response.FromString(got.body) == response.FromString(expected.body), way.name


async def test_an_index_has_tritons_models_and_as_the_table_says_the_public_ones(ways: Ways) -> None:
    async def index(way: Way) -> list[Any]:
        answer = await call(way.channels[0], pb.RepositoryIndexRequest(ready=True), "RepositoryIndex")
        return sorted(pb.RepositoryIndexResponse.FromString(answer.body).models, key=lambda model: model.name)

    own = await index(ways.direct)
    assert await index(ways.transparent) == own
    listed = await index(ways.public)
    assert [model for model in listed if not model.name.startswith(("p-", "m-"))] == own
    assert {model.name for model in listed} >= set(PUBLIC.values())


RESTRICTED = "model-repository,model-config,statistics,trace,shared-memory,metadata"


async def test_a_restricted_protocols_key_is_passed_on(triton_repository: Path, tmp_path: Path) -> None:
    extra = (*FAST_START, f"--grpc-restricted-protocol={RESTRICTED}:key=open")
    key = [("triton-grpc-protocol-key", "open")]
    asked = [*_messages("counted"), ("RepositoryIndex", pb.RepositoryIndexRequest()), *SERVER[4:11]]
    async with LocalTriton(triton_repository, models=["counted"], extra=extra) as server:
        address = server.grpc_address
        async with (
            direct_to(address) as direct,
            transparent(address) as bare,
            public(tmp_path, address, ["counted"]) as (plain, _),
        ):
            for method, request in asked:
                for metadata in ([], key):
                    expected = await call(direct.channels[0], request, method, metadata=metadata)
                    for way in (bare, plain):
                        got = await call(way.channels[0], request, method, metadata=metadata)
                        assert (got.code, got.text) == (expected.code, expected.text), (way.name, method, metadata)


async def test_control_that_is_closed_is_told_as_the_table_says(own_triton: LocalTriton, tmp_path: Path) -> None:
    load = pb.RepositoryModelLoadRequest(model_name="counted")
    closed = "server: {control: none}"
    async with public(tmp_path, own_triton.grpc_address, ["counted"], more=closed) as (plain, _):
        got = await call(plain.channels[0], load, "RepositoryModelLoad")
    assert got.code is Code.PERMISSION_DENIED
    assert "server.control" in got.text


# A model that changes


@pytest.mark.parametrize("who", ["loaded through the gateway", "loaded at Triton"])
async def test_a_model_that_changes_under_load_answers_as_it_is(ways: Ways, who: str) -> None:
    """Twelve callers, and batches come to mean something else. Who loads it through the gateway may rely on it at once;
    what happens behind the gateway's back is found out within a bounded time."""
    load = pb.RepositoryModelLoadRequest(model_name="changes")
    channel = (ways.public if who == "loaded through the gateway" else ways.direct).channels[0]
    for batches in (True, False, True):
        load.parameters["config"].string_param = load_config(batches)
        async with _load_on(ways):
            loaded = await call(channel, load, "RepositoryModelLoad", timeout=SECONDS)
            assert loaded.code is Code.OK, loaded.text
        if who == "loaded at Triton":
            await _until_known(ways)
        for number in range(10):
            round_ = [simple("changes", [number, n]) for n in range(12)]
            assert not await differences(round_, ways, copies=1)


@contextlib.asynccontextmanager
async def _load_on(ways: Ways) -> AsyncIterator[None]:
    """Calls that go on meanwhile; each is answered, whatever with."""
    stop = asyncio.Event()

    async def go_on(number: int) -> None:
        while not stop.is_set():
            await ways.merged.ask(simple("changes", [number]), number)

    tasks = [asyncio.create_task(go_on(number)) for number in range(8)]
    await asyncio.sleep(0.3)
    yield
    stop.set()
    await asyncio.gather(*tasks)


async def _until_known(ways: Ways) -> None:
    """At most a minute: until a round is as it should be. Each after that must be."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        round_ = [simple("changes", [1, n]) for n in range(12)]
        if not await differences(round_, ways, copies=1):
            return
        await asyncio.sleep(0.5)


async def test_a_batch_says_how_many_travelled(ways: Ways) -> None:
    """So that the tests above have tried what they are about."""
    largest = 1
    for _ in range(20):  # a model that was loaded anew a moment ago is not merged yet
        outcomes = await ways.merged.ask_all([simple("counted", [n]) for n in range(12)])
        largest = max(largest, *map(batch_of, outcomes))
    assert largest > 1
    assert set(UNARY) <= set(MODELS)
