"""Large tensors go to a Triton on this host by memory that it shares with the gateway; answers stay as they are."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from command_line import free_address
from patience import wait_until
from shared_regions import PROBES, end_by_their_deadline, in_use, memory_of, of_bytes, placed, stopped
from slow_reader import SlowReader, slow_reader
from triton_fixture import DTYPES, TritonFactory
from tritonclient.grpc import service_pb2 as pb
from v2_calls import Outcome, call, channel_to, infer
from v2_gateways import Script, endpoint_of, gateway_of

from gateway.app import Gateway
from gateway.assemble import LEAST_PLACED
from gateway.config import load
from gateway.http2.limits import UPSTREAM
from gateway.triton import LocalTriton
from gateway.upstream.answer_place import KnownAnswer
from gateway.upstream.ask import Asker
from gateway.upstream.shared_memory import SharedMemory
from gateway.upstream.slots import GRAIN
from gateway.v2.layout import SIZES
from gateway.v2.placing import ALIGNMENT, read_front
from gateway.v2.shared_memory import RESERVED

pytestmark = pytest.mark.integration

SHM = Path("/dev/shm")
MIB = 1 << 20


@contextlib.asynccontextmanager
async def gateway_to(folder: Path, address: str, shared: str = "auto", more: str = "") -> AsyncIterator[Gateway]:
    file = folder / "gateway.yaml"
    file.write_text(
        f"""
        listen: 127.0.0.1:0
        admin: {{listen: "127.0.0.1:0"}}
        server: {{control: all}}
        telemetry: {{access_log: {{destination: none}}}}
        upstreams: {{main: {{endpoints: ["{address}"], shared_memory: {shared}, {PROBES}}}}}
        direct: {{models: all}}
        {more}
        """
    )
    async with gateway_of(load(file, {})) as running:
        yield running


def files() -> set[str]:
    """Those of gateways in this process: others on this host may have some, by whom their files are locked."""
    locks = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    ours = {each[5].rpartition(":")[2] for each in locks if each[1] == "FLOCK" and int(each[4]) == os.getpid()}
    found = {}
    for path in SHM.glob(f"{RESERVED}*"):
        with contextlib.suppress(FileNotFoundError):  # another gateway has just removed its own
            found[path.name] = str(path.stat().st_ino)
    return {name for name, inode in found.items() if inode in ours}


@pytest.fixture
async def gateway(triton: LocalTriton, tmp_path: Path) -> AsyncIterator[Gateway]:
    before = files()
    async with gateway_to(tmp_path, triton.grpc_address) as running:
        await in_use(running)
        yield running
    assert files() == before


async def both(gateway: Gateway, triton: LocalTriton, request: Any) -> tuple[Outcome, Outcome]:
    """What the gateway answers, and what Triton does."""
    async with channel_to(gateway.listen) as through, channel_to(triton.grpc_address) as direct:
        return await call(through, request), await call(direct, request)


REGION = 2 * MIB
THRESHOLDS = {
    "a tensor's alignment": (ALIGNMENT, 1),
    "a slot's grain": (GRAIN, 1),
    "passed on as it arrives": (UPSTREAM.whole_bytes, 1),
    "laid into memory": (LEAST_PLACED, LEAST_PLACED),
    "room for it": (REGION - ALIGNMENT, LEAST_PLACED),
}
"""Bytes of a tensor, or of a whole message, at which something changes; and of a request that is laid into memory."""


@pytest.mark.parametrize("shared", ["off", f"{{bytes: {REGION}}}"], ids=["as bytes", "in shared memory"])
async def test_every_byte_of_every_datatype_is_as_tritons_own_around_each_threshold(
    triton: LocalTriton, tmp_path: Path, shared: str
) -> None:
    async with (
        gateway_to(tmp_path, triton.grpc_address, shared) as gateway,
        channel_to(gateway.listen) as through,
        channel_to(triton.grpc_address) as direct,
    ):
        memory = None if shared == "off" else await in_use(gateway)
        for dtype in DTYPES:
            for what, (at, least) in THRESHOLDS.items():
                if memory is not None:
                    memory.least = least
                step = SIZES.get(dtype, 1)
                front = of_bytes(dtype, at).ByteSize() - at
                for size in (1, at - front - step, at - front, at - front + step, at - step, at, at + step):
                    request = of_bytes(dtype, max(size, step))
                    ours, theirs = await call(through, request), await call(direct, request)
                    assert theirs.code is grpc.StatusCode.OK
                    assert (ours.code, ours.text, ours.body) == (theirs.code, theirs.text, theirs.body), (what, size)
        if memory is not None:
            assert placed(memory) > 20 * len(DTYPES)
            assert memory.now().requests["no_slot"] > 0
            assert memory.now().slots == memory.now().taken == 0


def wrong_size(request: Any) -> None:
    request.inputs[0].shape[1] += 1


def wrong_name(request: Any) -> None:
    request.inputs[0].name = "OTHER"


def wrong_datatype(request: Any) -> None:
    request.inputs[0].datatype = "INT64"


def one_tensor_more(request: Any) -> None:
    request.raw_input_contents.append(b"more")


def unknown_version(request: Any) -> None:
    request.model_version = "9"


def unknown_output(request: Any) -> None:
    request.outputs.add(name="NONE")


@pytest.mark.parametrize(
    "spoil", [wrong_size, wrong_name, wrong_datatype, one_tensor_more, unknown_version, unknown_output]
)
async def test_what_is_odd_ends_as_with_triton(
    gateway: Gateway, triton: LocalTriton, spoil: Callable[[Any], None]
) -> None:
    request = of_bytes("FP32", 2 * LEAST_PLACED)
    spoil(request)
    ours, theirs = await both(gateway, triton, request)
    assert (ours.code, ours.text, ours.body) == (theirs.code, theirs.text, theirs.body)


async def test_strings_that_do_not_fit_are_refused_in_tritons_words(gateway: Gateway, triton: LocalTriton) -> None:
    request = of_bytes("BYTES", 2 * LEAST_PLACED)
    request.raw_input_contents[0] = request.raw_input_contents[0][:-1]
    ours, theirs = await both(gateway, triton, request)
    assert (ours.code, ours.text) == (theirs.code, theirs.text)
    assert theirs.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_tensor_without_bytes_costs_nobody_the_memory(gateway: Gateway, triton: LocalTriton) -> None:
    """Triton refuses to look for one in shared memory, in words that name the region."""
    memory = memory_of(gateway)
    memory.least = 1
    for dtype in ("FP32", "BYTES"):
        request = of_bytes(dtype, 8)
        request.inputs[0].shape[1] = 0
        request.raw_input_contents[0] = b""
        ours, theirs = await both(gateway, triton, request)
        assert (ours.code, ours.text, ours.body) == (theirs.code, theirs.text, theirs.body)
        assert theirs.code is grpc.StatusCode.OK
    assert memory.now().registrations == {"registered": 1}
    assert memory.now().requests == {"unsuited": 2}
    assert memory.now().state == "in use"


async def test_parameters_and_requested_outputs_stay(gateway: Gateway, triton: LocalTriton) -> None:
    memory = memory_of(gateway)
    memory.least = 1
    request = infer("classifier", [[1, 3, 2, 4]], id="mine", parameters={"note": "x"})
    request.outputs.add(name="OUT").parameters["classification"].int64_param = 2
    ours, theirs = await both(gateway, triton, request)
    assert placed(memory) == 1
    assert (ours.code, ours.body) == (theirs.code, theirs.body)
    assert theirs.code is grpc.StatusCode.OK


def answers(memory: SharedMemory) -> tuple[int, int]:
    """How many had a place in the memory, and of how many it was too small."""
    counts = memory.now().requests
    return counts.get("answer", 0), counts.get("larger_answer", 0)


@pytest.mark.parametrize("is_large", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
async def test_an_answer_like_the_one_before_is_taken_from_the_memory(
    gateway: Gateway, triton: LocalTriton, dtype: str, is_large: bool
) -> None:
    """Of a request whose own tensors lie there too, and of one whose tensors are bytes."""
    memory = memory_of(gateway)
    larger = 3 * MIB + 8 if is_large else LEAST_PLACED // 2 + 800  # a larger one comes in parts, which is another way
    sizes = (LEAST_PLACED // 2, LEAST_PLACED // 2, LEAST_PLACED // 2, larger, larger)
    async with channel_to(gateway.listen) as through, channel_to(triton.grpc_address) as direct:
        for turn, size in enumerate(sizes):
            memory.least = 1 if is_large or turn in (0, 3) else 100 * MIB
            request = of_bytes(dtype, size)
            request.outputs.add(name="OUT")
            request.id = f"turn {turn}"
            ours, theirs = await call(through, request), await call(direct, request)
            assert theirs.code is grpc.StatusCode.OK
            assert (ours.code, ours.text, ours.body) == (theirs.code, theirs.text, theirs.body), turn
    assert answers(memory) == ((0, 0) if dtype == "BYTES" else (3, 0))
    assert memory.now().slots == memory.now().taken == 0


@pytest.mark.parametrize("is_large", [True, False])
async def test_one_that_is_larger_is_asked_for_once_more_as_bytes(
    gateway: Gateway, triton: LocalTriton, is_large: bool
) -> None:
    memory = memory_of(gateway)
    memory.least = 1
    request = of_bytes("FP32", 2 * LEAST_PLACED if is_large else LEAST_PLACED // 2)
    request.outputs.add(name="OUT")
    async with channel_to(gateway.listen) as through, channel_to(triton.grpc_address) as direct:
        theirs = await call(direct, request)
        assert (await call(through, request)).body == theirs.body
        for known in memory.answers._models["identity_fp32"].values():
            known.sizes = [size - 4 for size in known.sizes]  # as if the last one had been smaller
        memory.least = 1 if is_large else 100 * MIB
        for _ in range(3):
            ours = await call(through, request)
            assert (ours.code, ours.body) == (theirs.code, theirs.body)
    assert answers(memory) == (1, 1)  # after that its size is known to vary
    assert memory.now().slots == memory.now().taken == 0
    assert memory.now().state == "in use"


@pytest.mark.parametrize("is_large", [True, False])
async def test_an_answer_of_another_datatype_than_before_is_asked_for_once_more_as_bytes(
    gateway: Gateway, triton: LocalTriton, is_large: bool
) -> None:
    """As of a model that was loaded anew. Triton writes strings there too, and nothing tells how many bytes."""
    memory = memory_of(gateway)
    memory.least = 1 if is_large else 100 * MIB
    request = of_bytes("BYTES", 2 * LEAST_PLACED if is_large else LEAST_PLACED // 2)
    request.outputs.add(name="OUT")
    front = read_front(request.SerializeToString())
    assert front is not None
    memory.answers._models["identity_bytes"] = {(b"", *front.key): KnownAnswer([b"OUT"], [4 * LEAST_PLACED])}
    async with channel_to(gateway.listen) as through, channel_to(triton.grpc_address) as direct:
        theirs = await call(direct, request)
        for _ in range(3):
            ours = await call(through, request)
            assert (ours.code, ours.body) == (theirs.code, theirs.body)
            assert ours.trailers["gateway-attempts"] == "1"
    assert (memory.now().requests["answer"], memory.now().requests["other_answer"]) == (1, 1)
    assert memory.now().slots == memory.now().taken == 0
    assert endpoint_of(gateway, "main").in_flight == 0


async def test_fields_behind_the_tensors_of_a_small_request_are_tritons_affair(
    triton: LocalTriton, tmp_path: Path
) -> None:
    """No serializer writes them there. A name there counts in place of the one in front, and Triton knows no alias."""
    more = "models: {alias: {variants: {only: {upstream: main, model: identity_fp32}}}}"
    async with gateway_to(tmp_path, triton.grpc_address, more=more) as gateway, channel_to(gateway.listen) as through:
        memory = await in_use(gateway)
        memory.least = 1
        request = of_bytes("FP32", LEAST_PLACED // 2)
        request.model_name = "alias"
        request.outputs.add(name="OUT")
        first = await call(through, request)
        memory.least = 100 * MIB
        odd = request.SerializeToString() + pb.ModelInferRequest(model_name="alias").SerializeToString()
        ask = through.unary_unary("/inference.GRPCInferenceService/ModelInfer")  # bytes in and out
        assert await ask(odd, timeout=10) == first.body
        assert answers(memory)[0] == 0


async def test_a_model_that_must_not_run_twice_answers_as_bytes(triton: LocalTriton, tmp_path: Path) -> None:
    more = "models: {once: {variants: {only: {upstream: main, model: identity_fp32}}, retry: {on: []}}}"
    async with gateway_to(tmp_path, triton.grpc_address, more=more) as gateway:
        memory = await in_use(gateway)
        request = of_bytes("FP32", 2 * LEAST_PLACED)
        request.model_name = "once"
        request.outputs.add(name="OUT")
        async with channel_to(gateway.listen) as through:
            for _ in range(3):
                assert (await call(through, request)).code is grpc.StatusCode.OK
        assert (placed(memory), answers(memory)) == (3, (0, 0))


async def test_answers_of_many_at_once_are_never_each_others(gateway: Gateway) -> None:
    memory = memory_of(gateway)
    async with channel_to(gateway.listen) as through:

        async def one(number: int) -> None:
            request = infer("add_one_a", np.full((1, 300_000), number, np.float32))
            request.outputs.add(name="OUT")
            outcome = await call(through, request, timeout=60)
            assert outcome.code is grpc.StatusCode.OK, outcome.text
            values = np.frombuffer(outcome.response.raw_output_contents[0], np.float32)
            assert (values == number + 1).all()

        await one(0)
        await asyncio.gather(*(one(number) for number in range(40)))
    assert answers(memory)[0] > 5
    assert memory.now().taken == 0


async def test_an_answer_that_nobody_waits_for_keeps_its_place_until_triton_has_written_it(
    triton_factory: TritonFactory, tmp_path: Path
) -> None:
    triton = await triton_factory(["slow"])
    async with gateway_to(tmp_path, triton.grpc_address) as gateway, channel_to(gateway.listen) as through:
        memory = await in_use(gateway)
        memory.least = 1
        request = infer("slow", [[100]], "INT32")
        request.outputs.add(name="OUT")
        front = request.SerializeToString()
        outcome = await call(through, request)
        assert outcome.code is grpc.StatusCode.OK
        memory.answers.learn("slow", "", front, outcome.body)  # itself it learns of large ones only
        with stopped(triton):
            await end_by_their_deadline(through, request, lambda: memory.now().slots == 2)
        await wait_until(lambda: memory.now().slots == 0)


@pytest.mark.parametrize("is_output", [False, True])
async def test_triton_does_not_let_go_of_memory_that_it_is_to_read_or_write(
    triton_factory: TritonFactory, tmp_path: Path, is_output: bool
) -> None:
    """What the gateway relies on when it unregisters a region of which it does not know."""
    triton = await triton_factory(["slow"])
    for seconds in (3, 12, 48):  # on a busy machine the call may not have begun, or have ended, when Triton is told to
        async with gateway_to(tmp_path, triton.grpc_address) as gateway, channel_to(triton.grpc_address) as direct:
            memory = await in_use(gateway)
            asked = asyncio.ensure_future(call(direct, in_region(memory, seconds, is_output), timeout=100))
            await asyncio.sleep(seconds / 6)
            is_let_go = await is_unregistered(memory)
            was_running = not asked.done()
            outcome = await asked
            if was_running and outcome.code is grpc.StatusCode.OK:
                assert not is_let_go
                for _ in range(1000):  # it lets go a little after its answer
                    if await is_unregistered(memory):
                        return
                    await asyncio.sleep(0.05)
                pytest.fail("it does not let go after its answer either")
    pytest.fail(f"no call was running when Triton was told to let go: {outcome}")


def in_region(memory: SharedMemory, seconds: int, is_output: bool) -> Any:
    """A request that takes so long, and has its input or its output in the gateway's region."""
    request = infer("slow", [[1000 * seconds]], "INT32")
    region = memory.registration._region
    assert region is not None
    region.memory[:4] = (1000 * seconds).to_bytes(4, "little")
    if is_output:
        where = request.outputs.add(name="OUT").parameters
    else:
        del request.raw_input_contents[:]
        where = request.inputs[0].parameters
    where["shared_memory_region"].string_param = region.name
    where["shared_memory_byte_size"].int64_param = 4
    return request


async def is_unregistered(memory: SharedMemory) -> bool:
    assert memory.registration._region is not None
    return await memory.registration._unregister(memory.registration._region, Asker(timeout=20.0))


async def test_typed_contents_pass_as_before(gateway: Gateway, triton: LocalTriton) -> None:
    request = of_bytes("FP32", 2 * LEAST_PLACED)
    values = np.frombuffer(request.raw_input_contents.pop(), np.uint8).astype(np.float32)
    request.inputs[0].shape[1] = values.size
    request.inputs[0].contents.fp32_contents.extend(values.tolist())
    ours, theirs = await both(gateway, triton, request)
    assert (ours.code, ours.body) == (theirs.code, theirs.body)
    assert placed(memory_of(gateway)) == 0


async def test_many_at_once_never_get_each_others_tensors(gateway: Gateway) -> None:
    """More than fit the memory: some find no slot, and all get their own."""
    memory = memory_of(gateway)
    async with channel_to(gateway.listen) as through:

        async def one(number: int) -> None:
            request = infer("add_one_a", np.full((1, 500_000), number, np.float32))
            outcome = await call(through, request, timeout=60)
            assert outcome.code is grpc.StatusCode.OK, outcome.text
            values = np.frombuffer(outcome.response.raw_output_contents[0], np.float32)
            assert (values == number + 1).all()

        await asyncio.gather(*(one(number) for number in range(40)))
    assert placed(memory) > 10
    assert memory.now().taken == 0


async def test_a_call_that_is_given_up_keeps_its_memory_until_triton_has_answered(
    triton_factory: TritonFactory, tmp_path: Path
) -> None:
    """By its deadline, and by a caller who goes away. Its slot is not another's meanwhile."""
    triton = await triton_factory(["slow"])
    async with gateway_to(tmp_path, triton.grpc_address) as gateway, channel_to(gateway.listen) as through:
        memory = await in_use(gateway)
        memory.least = 1
        request = infer("slow", [[100]], "INT32")
        with stopped(triton):
            await end_by_their_deadline(through, request, lambda: memory.now().slots == 1)
            given_up = asyncio.ensure_future(call(through, request))
            await wait_until(lambda: memory.now().slots == 2)
            given_up.cancel()
            await asyncio.sleep(0.3)
            assert memory.now().slots == 2
        await wait_until(lambda: memory.now().slots == 0)
        assert memory.now().state == "in use"
        assert memory.now().registrations == {"registered": 1}


@contextlib.asynccontextmanager
async def slowly(address: str, pause: float, answers: float = 0) -> AsyncIterator[str]:
    """An address whose calls reach another one in pieces of 16 KiB, with pauses between them, as do answers."""
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pause: float) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(16_384):
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(pause if len(data) == 16_384 else 0)
        writer.transport.abort()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*address.split(":"))
        writers.extend((writer, back))
        tasks.add(asyncio.ensure_future(carry(reader, back, pause)))
        tasks.add(asyncio.ensure_future(carry(there, writer, answers)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    for writer in writers:
        writer.transport.abort()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_what_was_laid_in_vain_keeps_its_place_until_it_ends(triton: LocalTriton, gateway: Gateway) -> None:
    """So no more of it is in the gateway's own memory than there is memory that is shared."""
    memory = memory_of(gateway)
    request = of_bytes("UINT8", 2 * MIB).SerializeToString() + b"\x7a\x05stray"  # an unknown field behind the tensors
    async with channel_to(gateway.listen) as through:
        os.kill(triton.pid, signal.SIGSTOP)  # so that it does not end before it was looked at
        try:
            asked = asyncio.ensure_future(call(through, request))
            await wait_until(lambda: memory.now().requests == {"unsuited": 1})
            assert memory.now().slots == 1
        finally:
            os.kill(triton.pid, signal.SIGCONT)
        ours = await asked
    async with channel_to(triton.grpc_address) as direct:
        theirs = await call(direct, request)
    assert (ours.code, ours.body) == (theirs.code, theirs.body)
    assert memory.now().slots == memory.now().taken == 0


async def test_a_request_that_comes_slowly_is_laid_as_it_comes(gateway: Gateway, triton: LocalTriton) -> None:
    memory = memory_of(gateway)
    request = of_bytes("UINT8", 602_112)
    async with slowly(gateway.listen, 0.02) as address, channel_to(address) as slow:
        ours = asyncio.ensure_future(call(slow, request))
        await wait_until(lambda: memory.now().slots == 1)
        assert placed(memory) == 0  # it is not all there
        async with channel_to(triton.grpc_address) as direct:
            assert (await ours).body == (await call(direct, request)).body
    assert placed(memory) == 1
    assert memory.now().slots == 0


async def test_who_reads_his_answer_slowly_holds_no_memory(gateway: Gateway) -> None:
    memory = memory_of(gateway)
    async with slowly(gateway.listen, 0, answers=0.05) as address, channel_to(address) as slow:
        given_up = asyncio.ensure_future(call(slow, of_bytes("UINT8", 16 * MIB), timeout=60))
        await wait_until(lambda: placed(memory) == 1)
        await wait_until(lambda: memory.now().slots == 0)
        assert not given_up.done()
        given_up.cancel()
    assert memory.now().state == "in use"


def asked(number: int) -> Any:
    """A request whose answer has as many bytes as others', which are its own."""
    request = pb.ModelInferRequest(model_name="identity_uint8", id=f"number {number}")
    request.inputs.add(name="IN", datatype="UINT8", shape=[1, 2 * MIB])
    request.outputs.add(name="OUT")
    request.raw_input_contents.append(np.random.default_rng(number).bytes(2 * MIB))
    return request


async def test_an_answer_that_is_read_slowly_keeps_its_place_for_a_moment_and_stays_its_own(
    gateway: Gateway, triton: LocalTriton
) -> None:
    """It is sent from where Triton has written it. What its caller has not taken after a second or two is copied."""
    memory = memory_of(gateway)
    async with (
        slow_reader(gateway.listen) as slow,
        channel_to(gateway.listen) as through,
        channel_to(triton.grpc_address) as direct,
    ):
        theirs = [(await call(direct, asked(number))).body for number in range(5)]
        assert [(await call(through, asked(number))).body for number in (0, 1)] == theirs[:2]
        assert answers(memory) == (1, 0)
        await slow.ask(asked(2))
        await wait_until(lambda: answers(memory) == (2, 0) and memory.now().slots == 1)
        assert [(await call(through, asked(number))).body for number in (3, 4)] == theirs[3:]
        await wait_until(lambda: memory.now().slots == 0)
        assert [(await call(through, asked(number))).body for number in (3, 4)] == theirs[3:]
        assert await slow.take() == theirs[2]
    assert answers(memory) == (6, 0)
    assert memory.now().taken == 0


@pytest.mark.parametrize("end", [SlowReader.reset, SlowReader.break_off])
async def test_an_answer_that_nobody_wants_any_more_leaves_its_place(
    gateway: Gateway, end: Callable[[SlowReader], None]
) -> None:
    memory = memory_of(gateway)
    async with slow_reader(gateway.listen) as slow, channel_to(gateway.listen) as through:
        for number in range(2):
            await call(through, asked(number))
        await slow.ask(asked(2))
        await wait_until(lambda: answers(memory) == (2, 0) and memory.now().slots == 1)
        end(slow)
        await wait_until(lambda: memory.now().slots == 0)
    assert memory.now().taken == 0


@pytest.mark.parametrize("end", ["the caller goes away", "its time ends here"])
async def test_a_request_that_never_comes_whole_leaves_nothing(triton: LocalTriton, tmp_path: Path, end: str) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(
        f"""
        listen: 127.0.0.1:0
        admin: {{listen: "127.0.0.1:0"}}
        server: {{default_deadline: {"3s" if end == "its time ends here" else "1m"}}}
        telemetry: {{access_log: {{destination: none}}}}
        upstreams: {{main: {{endpoints: ["{triton.grpc_address}"], shared_memory: auto}}}}
        direct: {{models: all}}
        """
    )
    async with (
        gateway_of(load(file, {})) as gateway,
        slowly(gateway.listen, 0.05) as address,
        channel_to(address) as slow,
    ):
        memory = await in_use(gateway)
        given_up = asyncio.ensure_future(call(slow, of_bytes("UINT8", 2 * MIB), timeout=None))
        await wait_until(lambda: memory.now().slots == 1)
        if end == "its time ends here":
            assert (await given_up).code is grpc.StatusCode.DEADLINE_EXCEEDED
        else:
            given_up.cancel()  # which is told behind what is on its way
        await wait_until(lambda: memory.now().slots == 0)
        assert memory.now().taken == placed(memory) == 0
        assert memory.now().state == "in use"


async def test_a_killed_triton_frees_all_and_gets_memory_again_when_it_is_back(
    triton_factory: TritonFactory, tmp_path: Path
) -> None:
    triton = await triton_factory(["slow", "add_two"])
    before = files()
    async with gateway_to(tmp_path, triton.grpc_address) as gateway, channel_to(gateway.listen) as through:
        memory = await in_use(gateway)
        memory.least = 1
        request = infer("slow", [[60_000]], "INT32")
        stuck = asyncio.ensure_future(call(through, request, timeout=60))
        await wait_until(lambda: memory.now().slots == 1)
        await triton.kill()
        assert (await stuck).code is grpc.StatusCode.UNAVAILABLE
        assert memory.now().state != "in use"
        await triton.start()
        await wait_until(lambda: memory.now().state == "in use")
        assert memory.now().slots == memory.now().taken == 0
        assert len(files() - before) == 1
        outcome = await call(through, infer("add_two", np.ones((1, 100_000), np.float32)))
        assert (np.frombuffer(outcome.response.raw_output_contents[0], np.float32) == 3).all()
        assert placed(memory) == 2


async def test_memory_that_somebody_has_unregistered_costs_no_call(triton: LocalTriton, gateway: Gateway) -> None:
    """Triton says that it does not know the region; the request goes to it again as bytes, which is no attempt."""
    memory = memory_of(gateway)
    async with channel_to(triton.grpc_address) as direct, channel_to(gateway.listen) as through:
        await call(direct, pb.SystemSharedMemoryUnregisterRequest(), "SystemSharedMemoryUnregister")
        for size in (602_112, LEAST_PLACED + 100):
            request = of_bytes("FP32", size)
            ours, theirs = await call(through, request), await call(direct, request)
            assert (ours.code, ours.body) == (theirs.code, theirs.body)
            assert ours.trailers["gateway-attempts"] == "1"
    assert memory.now().registrations == {"registered": 1, "lost": 1}
    assert memory.now().requests["placed"] == 1
    assert memory.now().taken == 0


async def test_a_connection_that_breaks_has_the_memory_wait_for_triton(
    triton_factory: TritonFactory, tmp_path: Path
) -> None:
    """Nobody knows whether Triton still reads: nothing is used again until it lets go of the region."""
    triton = await triton_factory(["slow", "add_two"])
    async with gateway_to(tmp_path, triton.grpc_address) as gateway, channel_to(gateway.listen) as through:
        memory = await in_use(gateway)
        memory.least = 1
        request = infer("slow", [[5000]], "INT32")
        broken = asyncio.ensure_future(call(through, request))
        await wait_until(lambda: memory.now().slots == 1)
        await asyncio.sleep(0.5)  # until the model computes: what only waits is let go of at once
        connection: Any = endpoint_of(gateway, "main").connection
        for edge in list(connection._edges):
            edge.transport.abort()
        assert (await broken).code is grpc.StatusCode.UNAVAILABLE
        waits = "waits until Triton has let go of memory that it may be reading"
        await wait_until(lambda: memory.now().state == waits)
        await wait_until(lambda: endpoint_of(gateway, "main").state.value == "ready")  # it is connected anew
        outcome = await call(through, infer("add_two", np.ones((1, 100_000), np.float32)))
        assert outcome.code is grpc.StatusCode.OK  # as bytes
        assert memory.now().requests["no_region"] == 1
        await wait_until(lambda: memory.now().state == "in use")
        assert memory.now().registrations == {"registered": 2, "retired": 1, "unregistered": 1}


@pytest.mark.parametrize(
    ("code", "text", "is_retired"),
    [
        (grpc.StatusCode.UNAVAILABLE, "upstream connect error or disconnect/reset before headers", True),
        (grpc.StatusCode.UNKNOWN, "Unexpected <class 'OSError'>", True),
        (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size", False),
        (grpc.StatusCode.INTERNAL, "the model failed", False),
    ],
)
async def test_only_tritons_own_word_frees_a_place(
    tmp_path: Path, code: grpc.StatusCode, text: str, is_retired: bool
) -> None:
    """A proxy's does not: behind it Triton may read on. What a caller can have a model say costs nobody the memory."""

    async def fail(body: bytes, context: Any) -> bytes:
        await context.abort(code, text)
        raise AssertionError

    def said(answer: Any) -> Any:
        async def say(body: bytes, context: Any) -> bytes:
            return bytes(answer.SerializeToString())

        return say

    others = {"ServerMetadata": said(pb.ServerMetadataResponse(name="triton", version="2.68.0"))}
    for what in ("Register", "Unregister", "Status"):
        others[f"SystemSharedMemory{what}"] = said(getattr(pb, f"SystemSharedMemory{what}Response")())
    async with Script(infer=fail, others=others).serve() as address, gateway_to(tmp_path, address) as gateway:
        memory = await in_use(gateway)
        async with channel_to(gateway.listen) as through:
            assert (await call(through, of_bytes("FP32", 602_112))).code is not grpc.StatusCode.OK
        assert placed(memory) == 1
        assert memory.now().registrations.get("retired", 0) == is_retired
        await wait_until(lambda: memory.now().slots == 0)


async def test_callers_neither_see_nor_unregister_it(gateway: Gateway, triton: LocalTriton) -> None:
    memory = memory_of(gateway)
    async with channel_to(gateway.listen) as through, channel_to(triton.grpc_address) as direct:
        for channel, count in ((direct, 1), (through, 0)):
            status = await call(channel, pb.SystemSharedMemoryStatusRequest(), "SystemSharedMemoryStatus")
            assert len(pb.SystemSharedMemoryStatusResponse.FromString(status.body).regions) == count
        await call(through, pb.SystemSharedMemoryUnregisterRequest(), "SystemSharedMemoryUnregister")
        assert (await call(through, of_bytes("FP32", 602_112))).code is grpc.StatusCode.OK
    assert placed(memory) == 1
    assert memory.now().registrations == {"registered": 1}


async def test_what_a_killed_gateway_left_is_swept_and_what_a_living_one_has_is_not(
    triton: LocalTriton, tmp_path: Path
) -> None:
    """Its file, and what Triton has registered of it: nobody holds the lock of a dead gateway's file."""

    async def registered(wanted: int | None = None) -> set[str]:
        """wanted: how many to wait for."""
        while True:
            status = await call(direct, pb.SystemSharedMemoryStatusRequest(), "SystemSharedMemoryStatus")
            found = set(pb.SystemSharedMemoryStatusResponse.FromString(status.body).regions)
            if wanted in (None, len(found)):
                return found
            await asyncio.sleep(0.05)

    before = files()  # gateways of other tests may live as long as all tests

    def own() -> set[str]:
        return files() - before

    async with channel_to(triton.grpc_address) as direct, gateway_to(tmp_path, triton.grpc_address) as living:
        await in_use(living)
        await wait_until(lambda: len(own()) == 1)  # a first one may have been refused in time, on a busy machine
        (kept,) = own()
        listen = free_address()
        serve = [sys.executable, "-m", "gateway", "serve", "--config", str(tmp_path / "gateway.yaml")]
        killed = await asyncio.create_subprocess_exec(*serve, "--listen", listen, stderr=asyncio.subprocess.DEVNULL)
        try:
            await registered(2)
            async with channel_to(listen) as through:  # on uvloop, as users run it
                for size in (LEAST_PLACED, 602_112, 602_112, 8 * MIB):
                    request = of_bytes("UINT8", size)
                    ours, theirs = await call(through, request), await call(direct, request)
                    assert (ours.text, ours.body) == ("", theirs.body)
        finally:
            killed.kill()
            await killed.wait()
        assert len(await registered()) == 2
        async with gateway_to(tmp_path, triton.grpc_address) as following:
            await in_use(following)
            assert kept in own() == await registered(2)
        assert own() == await registered() == {kept}
    async with channel_to(triton.grpc_address) as direct:
        assert not await registered() | own()


@pytest.mark.parametrize("shared", ["off", "auto"])
async def test_without_it_nothing_is_asked(tmp_path: Path, shared: str) -> None:
    """Not by default, and not of endpoints that are elsewhere."""
    before = files()
    async with Script().serve() as address:
        elsewhere = address if shared == "off" else address.replace("127.0.0.1", "0.0.0.0")
        async with gateway_to(tmp_path, elsewhere, shared) as gateway, channel_to(gateway.listen) as through:
            await wait_until(lambda: endpoint_of(gateway, "main").state.value == "ready")
            assert (await call(through, of_bytes("FP32", 602_112))).code is grpc.StatusCode.OK
            memory = endpoint_of(gateway, "main").memory
            assert memory is None or memory.now().state == "the endpoint is not on this host"
    assert files() == before


async def test_a_server_that_refuses_it_gets_bytes_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def metadata(body: bytes, context: Any) -> bytes:
        return bytes(pb.ServerMetadataResponse(name="triton", version="2.68.0").SerializeToString())

    async def refuse(body: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "shared memory is not allowed")
        raise AssertionError

    script = Script(others={"ServerMetadata": metadata, "SystemSharedMemoryRegister": refuse})
    async with script.serve() as address, gateway_to(tmp_path, address) as gateway:
        memory = memory_of(gateway)
        await wait_until(lambda: memory.now().registrations.get("refused", 0) == 1)
        async with channel_to(gateway.listen) as through:
            assert (await call(through, of_bytes("FP32", 602_112))).code is grpc.StatusCode.OK
        await asyncio.sleep(0.5)
        assert memory.now().registrations == {"refused": 1}
        assert memory.now().requests == {"no_region": 1}
    said = [record.message for record in caplog.records if "shared memory" in record.message]
    assert len(said) == 1
    assert "--allow-client-shm=true" in said[0]
    assert RESERVED not in said[0]
