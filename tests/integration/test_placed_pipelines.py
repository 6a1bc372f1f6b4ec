"""What a pipeline's step makes lies where the model reads it; answers, endings and what is held stay as they are."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from patience import wait_until
from shared_regions import PROBES, end_by_their_deadline, in_use, memory_of, nothing_held, placed, stopped
from triton_fixture import DTYPES, TritonFactory
from tritonclient.grpc import service_pb2 as pb
from v2_calls import Outcome, call, channel_to
from v2_gateways import gateway_of

from gateway.app import Gateway
from gateway.config import load
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

_STEPS = '''
import threading
from collections.abc import Iterable

import numpy as np
from pydantic import Field

from gateway.steps import BadTensor, Params, RowStep, SplitStep, Step, TensorSpec, dtype_of

RUNNING = []
GO_ON = threading.Event()


class FillParams(Params):
    datatype: str = Field(default="FP32", description="Of what it makes.")
    size: int = Field(default=1, description="Elements of a row.")
    waits: bool = Field(default=False, description="Does a row take until GO_ON is set?")


class Fill(RowStep[FillParams]):
    """Fills rows with what their seeds say."""

    params_type = FillParams

    def __init__(self, params, read):
        self.reads = (TensorSpec("seed", "INT32", (1,)),)
        self.writes = (TensorSpec("x", params.datatype, (params.size,)),)
        self._params = params

    def fill(self, tensors, out, rows):
        for row in rows:
            if tensors["seed"][row, 0] < 0:
                raise (BadTensor("seed", "negative", row) if tensors["seed"][row, 0] == -1 else ValueError())
            RUNNING.append(row)
            out["x"][row] = made(self._params.datatype, self._params.size, int(tensors["seed"][row, 0]))
            if self._params.waits:
                GO_ON.wait()
            out["x"][row] = made(self._params.datatype, self._params.size, int(tensors["seed"][row, 0]))
            RUNNING.pop()


class Whole(Step[FillParams]):
    """As Fill, in an array of its own."""

    params_type = FillParams
    __init__ = Fill.__init__

    def __call__(self, tensors):
        seeds = tensors["seed"][:, 0]
        return {"x": np.stack([made(self._params.datatype, self._params.size, int(seed)) for seed in seeds])}


class Count(SplitStep[Params]):
    """As many items as the seed says, each with a seed."""

    params_type = Params

    def __init__(self, params, read):
        self.reads = self.writes = (TensorSpec("seed", "INT32", (1,)),)

    def split(self, row):
        for number in range(int(row["seed"][0])):
            yield {"seed": np.array([number], np.int32)}


def made(datatype, size, seed):
    random = np.random.default_rng(seed)
    if datatype == "BYTES":
        return np.array([random.bytes(seed % 5) for _ in range(size)], np.object_)
    if datatype == "BOOL":
        return random.integers(0, 2, size).astype(np.bool_)
    return random.integers(0, 100, size).astype(dtype_of(datatype))
'''


def _pipeline(step: str, datatype: str, size: int, *, waits: bool = False) -> str:
    return f"""
    pipeline:
      inputs: [{{name: seed, datatype: INT32, shape: [1]}}]
      outputs: [{{name: OUT, datatype: {datatype}, shape: [-1]}}]
      max_batch_size: 8
      steps:
        - {{step: "shared_filling:{step}", with: {{datatype: {datatype}, size: {size}, waits: {json.dumps(waits)}}}}}
        - {{call: m-identity_{datatype.lower()}, inputs: {{IN: x}}, outputs: {{OUT: OUT}}}}
"""


_SLEEPING = """
    pipeline:
      inputs: [{name: seed, datatype: INT32, shape: [1]}]
      outputs: [{name: OUT, datatype: INT32, shape: [1]}]
      max_batch_size: 1
      steps:
        - {step: "shared_filling:Sleep", with: {datatype: INT32}}
        - {call: m-slow, inputs: {IN: x}, outputs: {OUT: OUT}}
"""

_SLEEP = '''

class Sleep(Fill):
    """How long the model is to sleep: what the seed says."""

    def fill(self, tensors, out, rows):
        out["x"][rows.start : rows.stop] = tensors["seed"][rows.start : rows.stop]
'''

_FAN_OUT = """
    pipeline:
      inputs: [{name: seed, datatype: INT32, shape: [1]}]
      outputs: [{name: items, datatype: FP32, shape: [-1, 50000]}, {name: count, datatype: INT32, shape: [1]}]
      max_batch_size: 2
      steps:
        - fan_out:
            step: "shared_filling:Count"
            steps:
              - {step: "shared_filling:Fill", with: {size: 50000}}
              - {call: m-identity_fp32, inputs: {IN: x}, outputs: {OUT: items}}
            outputs: [{name: items, datatype: FP32, shape: [50000]}]
            count: count
            max_batch_size: 2
            most: 20
"""


@contextlib.asynccontextmanager
async def gateway_with(folder: Path, address: str, pipelines: dict[str, str]) -> AsyncIterator[Gateway]:
    (folder / "shared_filling.py").write_text(_STEPS + _SLEEP)
    sys.modules.pop("shared_filling", None)
    called = sorted(set(re.findall(r"call: m-(\w+)", "".join(pipelines.values()))) - {name[2:] for name in pipelines})
    models = "".join(f"  m-{name}: {{variants: {{only: {{upstream: main, model: {name}}}}}}}\n" for name in called)
    models += "".join(f"  {name}:{text}" for name, text in pipelines.items())
    file = folder / "gateway.yaml"
    file.write_text(
        f"""
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
telemetry: {{access_log: {{destination: none}}}}
upstreams: {{main: {{endpoints: ["{address}"], shared_memory: auto, {PROBES}}}}}
direct: {{models: all}}
models:
{models}
"""
    )
    async with gateway_of(load(file, {})) as running:
        yield running


def of_seeds(model: str, *seeds: int) -> Any:
    raw = np.array(seeds, np.int32).tobytes()
    request = pb.ModelInferRequest(model_name=model, id="mine", raw_input_contents=[raw])
    request.inputs.add(name="seed", datatype="INT32", shape=[len(seeds), 1])
    return request


def made_by_step(dtype: str, size: int, seed: int) -> Any:
    return sys.modules["shared_filling"].made(dtype, size, seed)


def running() -> bool:
    return bool(sys.modules["shared_filling"].RUNNING)


def go_on() -> None:
    sys.modules["shared_filling"].GO_ON.set()


@pytest.fixture(autouse=True)
def without_collections() -> Iterator[None]:
    """What is held is let go of when nobody has it any more, and not when Python next looks for cycles."""
    gc.disable()
    yield
    gc.enable()


async def with_and_without(gateway: Gateway, through: Any, request: Any) -> Outcome:
    """The answer, which is the same with shared memory and without."""
    memory = await in_use(gateway)
    memory.least, before = 1, placed(memory)
    ours = await call(through, request)
    assert ours.code is grpc.StatusCode.OK, ours.text
    memory.least, after = 1 << 40, placed(memory)
    as_bytes = await call(through, request)
    assert placed(memory) == after > before
    assert (ours.code, ours.body) == (as_bytes.code, as_bytes.body)
    await nothing_held(memory)
    return ours


@pytest.mark.parametrize("step", ["Fill", "Whole"])
async def test_every_datatype_is_answered_the_same_with_it_and_without(
    triton: LocalTriton, tmp_path: Path, step: str
) -> None:
    kinds = [(dtype, size) for dtype in DTYPES for size in (1, 7, 50_000) if dtype != "BF16"]  # which no step makes
    kinds.remove(("BYTES", 50_000))  # which takes long
    pipelines = {f"p-{dtype}-{size}": _pipeline(step, dtype, size) for dtype, size in kinds}
    async with (
        gateway_with(tmp_path, triton.grpc_address, pipelines) as gateway,
        channel_to(gateway.listen) as through,
    ):
        for dtype, size in kinds:
            answer = await with_and_without(gateway, through, of_seeds(f"p-{dtype}-{size}", 3, 4, 5))
            if dtype != "BYTES":
                made = np.stack([made_by_step(dtype, size, seed) for seed in (3, 4, 5)])
                assert answer.response.raw_output_contents[0] == made.tobytes()


async def test_the_last_step_writes_where_the_model_reads(triton: LocalTriton, tmp_path: Path) -> None:
    """Nothing else is taken than what holds the array; what a step makes in an array of its own takes no more."""
    pipelines = {
        "in-place": _pipeline("Fill", "FP32", 50_000, waits=True),
        "copied": _pipeline("Whole", "FP32", 50_000),
    }
    async with (
        gateway_with(tmp_path, triton.grpc_address, pipelines) as gateway,
        channel_to(gateway.listen) as through,
    ):
        memory = await in_use(gateway)
        asked = asyncio.ensure_future(call(through, of_seeds("in-place", 1)))
        await wait_until(lambda: memory.now().slots == 1)
        assert placed(memory) == 0  # while the step runs
        go_on()
        assert (await asked).code is grpc.StatusCode.OK
        assert placed(memory) == 1
        assert (await call(through, of_seeds("copied", 1))).code is grpc.StatusCode.OK
        assert placed(memory) == 2
        await nothing_held(memory)


async def test_one_slot_that_several_calls_read_is_free_after_the_last(triton: LocalTriton, tmp_path: Path) -> None:
    async with (
        gateway_with(tmp_path, triton.grpc_address, {"fan": _FAN_OUT}) as gateway,
        channel_to(gateway.listen) as through,
    ):
        answer = await with_and_without(gateway, through, of_seeds("fan", 3, 4))
        memory = memory_of(gateway)
        assert placed(memory) == 4  # of two items each, or one
        assert answer.response.outputs[0].shape == [2, 4, 50_000]


async def test_a_step_that_outlives_its_call_keeps_its_memory_until_it_ends(
    triton: LocalTriton, tmp_path: Path
) -> None:
    """It still writes there: a step cannot be stopped."""
    pipelines = {"late": _pipeline("Fill", "FP32", 50_000, waits=True), "good": _pipeline("Fill", "FP32", 50_000)}
    async with (
        gateway_with(tmp_path, triton.grpc_address, pipelines) as gateway,
        channel_to(gateway.listen) as through,
    ):
        memory = await in_use(gateway)
        await end_by_their_deadline(through, of_seeds("late", 1), lambda: bool(running()))
        assert memory.now().slots == 1
        made = made_by_step("FP32", 50_000, 9).tobytes()
        for _ in range(20):
            outcome = await call(through, of_seeds("good", 9))
            assert outcome.response.raw_output_contents[0] == made
        assert memory.now().slots == 1
        go_on()
        await nothing_held(memory)
        assert memory.now().state == "in use"


@pytest.mark.parametrize("seed", [-1, -2])
async def test_a_step_that_fails_holds_nothing(triton: LocalTriton, tmp_path: Path, seed: int) -> None:
    """By a fault of its caller, or of its own."""
    async with (
        gateway_with(tmp_path, triton.grpc_address, {"p": _pipeline("Fill", "FP32", 50_000)}) as gateway,
        channel_to(gateway.listen) as through,
    ):
        memory = await in_use(gateway)
        for _ in range(3):
            outcome = await call(through, of_seeds("p", 1, seed))
            assert outcome.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)
        await nothing_held(memory)


async def test_a_caller_who_goes_away_frees_nothing_that_triton_reads(
    triton_factory: TritonFactory, tmp_path: Path
) -> None:
    triton = await triton_factory(["slow"])
    async with (
        gateway_with(tmp_path, triton.grpc_address, {"sleeping": _SLEEPING}) as gateway,
        channel_to(gateway.listen) as through,
    ):
        memory = await in_use(gateway)
        memory.least = 1
        with stopped(triton):
            given_up = asyncio.ensure_future(call(through, of_seeds("sleeping", 100)))
            await wait_until(lambda: placed(memory) == 1)
            given_up.cancel()
            await asyncio.sleep(0.3)
            assert memory.now().slots == 1
        await nothing_held(memory)
        assert memory.now().registrations == {"registered": 1}


async def test_a_region_that_triton_forgot_costs_no_call(triton: LocalTriton, tmp_path: Path) -> None:
    """The message is made of what lies in the memory, which stays valid as long as it is held."""
    pipelines = {"in-place": _pipeline("Fill", "FP32", 50_000)}
    async with (
        gateway_with(tmp_path, triton.grpc_address, pipelines) as gateway,
        channel_to(gateway.listen) as through,
        channel_to(triton.grpc_address) as direct,
    ):
        memory = await in_use(gateway)
        await call(direct, pb.SystemSharedMemoryUnregisterRequest(), "SystemSharedMemoryUnregister")
        outcome = await call(through, of_seeds("in-place", 5))
        assert outcome.response.raw_output_contents[0] == made_by_step("FP32", 50_000, 5).tobytes()
        assert outcome.trailers["gateway-attempts"] == "1"
        assert memory.now().registrations == {"registered": 1, "lost": 1}
        await nothing_held(memory)


_LOOKED_AT = """
    variants: {wrong: {upstream: main, model: faulty}, right: {upstream: main, model: add_one_a}}
    split: {wrong: 1}
    fallback: [right]
    answers: {finite: fallback}
    shadow: {right: {share: 1}}
"""

_LOOKED_AT_PIPELINE = """
    pipeline:
      inputs: [{name: seed, datatype: INT32, shape: [1]}]
      outputs: [{name: OUT, datatype: FP32, shape: [-1]}]
      max_batch_size: 8
      steps:
        - {step: "shared_filling:Sleep", with: {datatype: FP32, size: 50000}}
        - {call: m-looked-at, inputs: {IN: x}, outputs: {OUT: OUT}}
"""


async def test_another_variant_and_a_shadow_get_the_same_tensor(triton: LocalTriton, tmp_path: Path) -> None:
    """What the first one read in memory, they get as bytes."""
    pipelines = {"m-looked-at": _LOOKED_AT, "p": _LOOKED_AT_PIPELINE}
    async with (
        gateway_with(tmp_path, triton.grpc_address, pipelines) as gateway,
        channel_to(gateway.listen) as through,
    ):
        memory = await in_use(gateway)
        outcome = await call(through, of_seeds("p", 5))  # which `faulty` answers as it should
        values = np.frombuffer(outcome.response.raw_output_contents[0], np.float32)
        assert len(values) == 50_000
        assert (values == 6).all()
        await wait_until(lambda: sum(each.results["agreed"] for each in gateway._shadows.now()) == 1)
        assert placed(memory) == 1
        outcome = await call(through, of_seeds("p", -1))  # with not a number
        values = np.frombuffer(outcome.response.raw_output_contents[0], np.float32)
        assert len(values) == 50_000
        assert (values == 0).all()
        assert outcome.trailers["gateway-attempts"] == "2"
        await nothing_held(memory)


async def test_a_killed_triton_ends_the_call_and_what_it_held(triton_factory: TritonFactory, tmp_path: Path) -> None:
    triton = await triton_factory(["slow"])
    async with (
        gateway_with(tmp_path, triton.grpc_address, {"sleeping": _SLEEPING}) as gateway,
        channel_to(gateway.listen) as through,
    ):
        memory = await in_use(gateway)
        memory.least = 1
        stuck = asyncio.ensure_future(call(through, of_seeds("sleeping", 60_000), timeout=60))
        await wait_until(lambda: placed(memory) == 1)
        await triton.kill()
        assert (await stuck).code is grpc.StatusCode.UNAVAILABLE
        await triton.start()
        await wait_until(lambda: memory.now().state == "in use")
        memory.least = 1
        assert (await call(through, of_seeds("sleeping", 1))).code is grpc.StatusCode.OK
        await nothing_held(memory)


async def test_without_room_it_is_sent_as_bytes_and_counted(triton: LocalTriton, tmp_path: Path) -> None:
    pipelines = {"much": _pipeline("Fill", "FP32", 2_000_000)}  # 64 MB in eight rows, of a region of 32
    async with (
        gateway_with(tmp_path, triton.grpc_address, pipelines) as gateway,
        channel_to(gateway.listen) as through,
    ):
        memory = await in_use(gateway)
        assert (await call(through, of_seeds("much", *range(6)), timeout=60)).code is grpc.StatusCode.OK
        assert memory.now().requests == {"no_slot": 1}
        assert memory.now().slots == 0
