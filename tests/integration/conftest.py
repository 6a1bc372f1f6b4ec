"""A gateway with public models over the tests' Triton, and a transparent one, both in this process.

`triton` and `other_triton` are two upstreams; what their models do is said in `triton_fixture`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from real_models import changed_gateway, coffee, real_models, real_triton
from triton_fixture import DTYPES, FAST_START, for_the_whole_run, start_again_what_died
from v2_calls import public_name
from v2_gateways import gateway_of, transparent_to

from gateway.app import Gateway
from gateway.config import load
from gateway.triton import LocalTriton

__all__ = ["changed_gateway", "coffee", "real_models", "real_triton"]

OTHER_MODELS = ("add_one_a", "add_two", "accumulate", "repeat", "slow", "identity_bytes")
"""What `other_triton` serves."""

_FRONT = """
listen: 127.0.0.1:0
admin: {listen: "127.0.0.1:0"}
telemetry: {access_log: {destination: none}}
"""

_PUBLIC = """
direct: {models: all, upstream: main}
models:
  adder:                       # two variants, two contracts alike, one endpoint
    variants:
      a: {upstream: main, model: add_one_a}
      b: {upstream: main, model: add_one_b}
    split: {a: 1, b: 1}
    rules:
      - {name: tester, match: {metadata: {x-variant: b}}, variant: b}
      - {name: default, match: {metadata: {x-variant: a}}, variant: a}
  far-adder: {variants: {only: {upstream: other, model: add_two}}}
  counter:                     # decoupled, on two endpoints
    variants:
      here: {upstream: main, model: repeat}
      there: {upstream: other, model: repeat}
    split: {here: 1, there: 1}
    rules:
      - {name: there, match: {parameters: {where: there}}, variant: there}
      - {name: here, match: {parameters: {where: here}}, variant: here}
  waiter: {variants: {only: {upstream: main, model: slow}}}
  far-waiter: {variants: {only: {upstream: other, model: slow}}}
  sums:                        # sequences, on two endpoints
    variants:
      here: {upstream: main, model: accumulate}
      there: {upstream: other, model: accumulate}
    split: {here: 1, there: 1}
  text-sums: {variants: {only: {upstream: main, model: accumulate_text}}}
  labels: {variants: {only: {upstream: main, model: classifier}}}
  echo: {variants: {only: {upstream: main, model: params_echo}}}
  failing: {variants: {only: {upstream: main, model: fails}}}
  best-label:
    pipeline:
      inputs: [{name: scores, datatype: FP32, shape: [4]}]
      outputs: [{name: label, datatype: BYTES, shape: [1]}]
      max_batch_size: 8
      steps:
        - {call: labels, inputs: {IN: scores}, outputs: {OUT: scores}}
        - {step: top_k, with: {k: 1}}
"""


def write_config(folder: Path, main: str, other: str) -> Path:
    """The config of the gateway under test. main, other: the Tritons' addresses."""
    upstreams = f"upstreams:\n  main: {{endpoints: [{main}]}}\n  other: {{endpoints: [{other}]}}\n"
    identities = "".join(
        f"  {public_name(dtype)}: {{variants: {{only: {{upstream: main, model: identity_{dtype.lower()}}}}}}}\n"
        for dtype in DTYPES
    )
    file = folder / "gateway.yaml"
    file.write_text(_FRONT + upstreams + _PUBLIC + identities)
    return file


@pytest.fixture(scope="session")
async def other_triton(triton_repository: Path) -> AsyncIterator[LocalTriton]:
    """A second upstream."""
    async with for_the_whole_run(LocalTriton(triton_repository, models=OTHER_MODELS, extra=FAST_START)) as server:
        yield server


@pytest.fixture(autouse=True)
async def _tritons_that_live() -> None:
    await start_again_what_died()


@pytest.fixture(scope="session")
async def gateway(
    triton: LocalTriton, other_triton: LocalTriton, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    """Public models over both Tritons; the first one's own names can be called too."""
    file = write_config(tmp_path_factory.mktemp("config"), triton.grpc_address, other_triton.grpc_address)
    async with gateway_of(load(file, {})) as running:
        yield running


@pytest.fixture(scope="session")
async def bare(triton: LocalTriton) -> AsyncIterator[Gateway]:
    """`serve --triton`: every model of one Triton, no config file."""
    async with transparent_to(triton.grpc_address) as running:
        yield running
