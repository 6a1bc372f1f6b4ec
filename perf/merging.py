"""What merging small requests is for: a busy model, a single caller, requests that come anyhow, and a real model."""

from __future__ import annotations

from collections.abc import Sequence

from perf.bench import Bench
from perf.scenarios import BUSY, EFFICIENTNET, SINGLE, Scenario, open_loop
from perf.stack import System
from perf.summary import DIRECT, ENVOY, GATEWAY, MERGING, NULL, SHARING, Sample, of

_LOAD = 0.8  # of what direct callers can have answered at most
_PAIRS = 3  # times as many rounds for the single caller, of whom a difference of 3 % must be seen


def measure(bench: Bench, systems: Sequence[System], rounds: int, samples: Sequence[Sample]) -> list[Scenario]:
    """samples: what `bench` has found so far, and goes on to find. Answers the scenarios.

    BUSY is not measured again if it was (the group `tiny` does): the bars take it from there.
    """
    measured = {each.scenario for each in samples}
    scenarios = [each for each in BUSY if each.name not in measured]
    bench.rounds(scenarios, _named(systems, DIRECT, NULL, ENVOY, GATEWAY, MERGING), rounds)
    rate = most(samples)
    if rate is None:
        bench.miss("open-loop: there is no rate of direct calls to go by")
    else:
        scenarios.append(open_loop(_LOAD * rate, f"{_LOAD:g} × what direct calls reach"))
        bench.rounds(scenarios[-1:], _named(systems, DIRECT, ENVOY, MERGING), rounds)
    bench.rounds([SINGLE], _named(systems, GATEWAY, MERGING), _PAIRS * rounds)
    bench.rounds([EFFICIENTNET], _named(systems, DIRECT, ENVOY, MERGING, SHARING), rounds)
    return [*scenarios, SINGLE, EFFICIENTNET]


def most(samples: Sequence[Sample]) -> float | None:
    """The rate that direct calls reach in a closed loop: of the busy scenarios' medians the larger."""
    found = [of(samples, each.name, DIRECT, "rate") for each in BUSY]
    return max((each.middle for each in found if each), default=None)


def _named(systems: Sequence[System], *names: str) -> list[System]:
    return [each for each in systems if each.name in names]
