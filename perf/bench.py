"""Rounds: each system in turn within each round, so that whatever slows the machine down meets them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from perf import gateways
from perf.children import Child
from perf.load import Load, LoadFailed, Loads
from perf.scenarios import ROUTES, VARIANTS, Scenario, growing
from perf.stack import Stack, System
from perf.summary import Sample

Say = Callable[[str], None]
Keep = Callable[[Sample], None]
Miss = Callable[[str], None]

_KEPT_UP = 0.95  # of an open loop's rate


class Bench:
    """Runs scenarios on systems. keep: told of every sample. miss: of what could not be measured."""

    def __init__(self, stack: Stack, loads: Loads, keep: Keep, miss: Miss, say: Say) -> None:
        self.stack = stack
        self.loads = loads
        self.keep = keep
        self.miss = miss
        self.say = say

    def warm_up(self, systems: Sequence[System], scenarios: Sequence[Scenario]) -> None:
        for system in systems:
            for model in dict.fromkeys(scenario.model for scenario in scenarios):
                shape = next(s.load.shape for s in scenarios if s.model == model)
                few = Load(2, shape=shape, requests=8 if shape else 200)
                try:
                    self.loads.run(few, system.address, system.name_of(model), system.served)
                except LoadFailed as error:
                    self.miss(f"warming up {system.name} with {model}: {error}")

    def rounds(self, scenarios: Sequence[Scenario], systems: Sequence[System], count: int) -> None:
        """Every scenario on every system, `count` times."""
        if not systems:
            return
        self.warm_up(systems, scenarios)
        for number in range(count):
            for scenario in scenarios:
                self._turn(scenario, systems, number)

    def _turn(self, scenario: Scenario, systems: Sequence[System], number: int) -> None:
        """Each system once; every round begins with another one."""
        told = []
        for system in (*systems[number % len(systems) :], *systems[: number % len(systems)]):
            sample = self._sample(scenario, system, number)
            if sample is not None:
                self.keep(sample)
                told.append(f"{system.name} {sample.rate:,.0f}/s {sample.cpu:,.0f} µs")
        self.say(f"round {number + 1}  {scenario.name:20} {'  ·  '.join(told)}")

    def _sample(self, scenario: Scenario, system: System, number: int) -> Sample | None:
        triton: Child = self.stack.triton
        before, triton_before = system.cpu_seconds(), triton.cpu_seconds()
        try:
            found = self.loads.run(scenario.load, system.address, system.name_of(scenario.model), system.served)
        except LoadFailed as error:
            self.miss(f"{scenario.name} on {system.name}, round {number + 1}: {error}")
            return None
        asked = scenario.load.rate
        if asked and system.child is None and found.rate < _KEPT_UP * asked:
            # Then the machine, or Triton, was slower than when the rate was chosen, and the comparison says nothing.
            self.miss(f"{scenario.name}, round {number + 1}: {system.name}, only {found.rate:,.0f}/s of {asked:,.0f}/s")
            return None
        each = 1e6 / max(1, found.served)
        return Sample(
            scenario.name,
            system.name,
            number,
            rate=found.rate,
            p50=found.p50,
            p99=found.p99,
            cpu=(system.cpu_seconds() - before) * each,
            client_cpu=found.client_seconds * each,
            triton_cpu=(triton.cpu_seconds() - triton_before) * each,
            late=found.late,
        )

    def growth(self, count: int) -> Iterator[Scenario]:
        """Gateways that differ in how many routes and variants they have, in turn. Answers the scenarios."""
        with ExitStack() as ended:
            pairs = [*self._grown("routes", ROUTES, ended), *self._grown("variants", VARIANTS, ended)]
            for scenario, system in pairs:
                self.warm_up([system], [scenario])
            for number in range(count):
                for scenario, system in pairs:
                    self._turn(scenario, [system], number)
            yield from (scenario for scenario, _ in pairs)

    def _grown(self, what: str, counts: Sequence[int], ended: ExitStack) -> Iterator[tuple[Scenario, System]]:
        for count in counts:
            routes, variants = (count, 2) if what == "routes" else (1, count)
            config = gateways.config(self.stack.triton.port, routes=routes, variants=variants)
            system = self.stack.gateway(f"{what}-{count}", config=config, into=ended)
            yield growing(what, count), System("gateway", system.address, system.child, public=True)
