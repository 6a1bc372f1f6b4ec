"""Triton answers for an ensemble once a step has failed, while others read the request's tensors: these stay there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from patience import wait_until
from test_placed_tensors import gateway_to, in_use, placed
from triton_fixture import FAST_START
from v2_calls import call, channel_to, infer
from v2_gateways import endpoint_of

from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

CONFIG = """
backend: "python"
input [ { name: "IN" data_type: TYPE_INT32 dims: [ -1 ] } ]
output [ { name: "OUT" data_type: TYPE_INT32 dims: [ -1 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
ENSEMBLE = """
platform: "ensemble"
input [ { name: "IN" data_type: TYPE_INT32 dims: [ -1 ] } ]
output [ { name: "A" data_type: TYPE_INT32 dims: [ -1 ] }, { name: "B" data_type: TYPE_INT32 dims: [ -1 ] } ]
ensemble_scheduling { step [
  { model_name: "refuses" model_version: -1 input_map { key: "IN" value: "IN" } output_map { key: "OUT" value: "A" } },
  { model_name: "works" model_version: -1 input_map { key: "IN" value: "IN" } output_map { key: "OUT" value: "B" } }
] }
"""
REFUSES = """
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        error = pb_utils.TritonError("I will not", pb_utils.TritonError.INVALID_ARG)
        return [pb_utils.InferenceResponse(error=error) for _ in requests]
"""
WORKS = """
import os, time
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            numbers = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
            with open(SEEN, "a") as seen:
                seen.write(" ".join(map(str, sorted(set(numbers.tolist())))) + chr(10))
            while not os.path.exists(GO):
                time.sleep(0.01)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", numbers)]))
        return answers
"""
COUNT = 50_000


def of(model: str, number: int) -> Any:
    return infer(model, np.full(COUNT, number, np.int32), "INT32")


@pytest.fixture
async def ensembles(tmp_path: Path) -> AsyncIterator[LocalTriton]:
    models = tmp_path / "models"
    sources = {
        "refuses": REFUSES,
        "works": f"SEEN, GO = {str(tmp_path / 'seen')!r}, {str(tmp_path / 'go')!r}\n{WORKS}",
        "both": "",
    }
    for name, source in sources.items():
        (models / name / "1").mkdir(parents=True)
        (models / name / "config.pbtxt").write_text(CONFIG if source else ENSEMBLE)
        if source:
            (models / name / "1" / "model.py").write_text(source)
    server = LocalTriton(models, models=tuple(sources), extra=FAST_START)
    await server.start()
    yield server
    await server.kill()
    await server.aclose()


async def test_what_a_step_reads_after_its_ensemble_has_failed_is_not_overwritten(
    ensembles: LocalTriton, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    async with gateway_to(tmp_path, ensembles.grpc_address) as gateway, channel_to(gateway.listen) as channel:
        memory = await in_use(gateway)
        # The ensemble's step waits behind this one.
        first = asyncio.ensure_future(call(channel, of("works", 1), timeout=30))
        await wait_until(seen.exists)
        outcome = await call(channel, of("both", 2))
        assert (outcome.code, outcome.text) == (grpc.StatusCode.INVALID_ARGUMENT, "in ensemble 'both', I will not")
        assert seen.read_text().split() == ["1"]
        assert memory.now().slots == 2
        assert endpoint_of(gateway, "main").in_flight == 1
        after = asyncio.ensure_future(call(channel, of("works", 3), timeout=30))
        (tmp_path / "go").touch()
        assert (await first).code is (await after).code is grpc.StatusCode.OK
        assert seen.read_text().split() == ["1", "2", "3"]
        assert placed(memory) == 3
        assert not memory.suits("both")  # it is not asked again: Triton 2.51 may never answer such a call
        memory.unheard.failed_in_step("works")
        assert (await call(channel, of("works", 4))).code is grpc.StatusCode.OK
        assert placed(memory) == 3
        assert memory.now().slots == 1
        assert memory.now().registrations == {"registered": 1}
