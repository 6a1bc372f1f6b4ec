"""What many samples say: medians, and ratios taken within each round. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

DIRECT, ENVOY, NGINX, HAPROXY = "direct", "Envoy", "nginx", "HAProxy"
GATEWAY, GRPC_AIO, MERGING, KSERVE = "gateway", "grpc.aio relay", "merging gateway", "KServe transformer"
SHARING, NULL = "gateway with shared memory", "null server"
SYSTEMS = (DIRECT, ENVOY, NGINX, HAPROXY, GRPC_AIO, GATEWAY, MERGING, SHARING, NULL)
"""What takes part in every load. KServe does only in that of pictures."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One scenario on one system in one round.

    rate: answers per second. p50, p99: µs. cpu: µs per answer, of the proxy; 0 where there is none.
    client_cpu, triton_cpu: µs per answer, of the load generator and of Triton.
    late: of an open loop, the share of requests that were sent more than a millisecond after they were due.
    """

    scenario: str
    system: str
    round: int
    rate: float
    p50: float
    p99: float
    cpu: float
    client_cpu: float = 0.0
    triton_cpu: float = 0.0
    late: float = 0.0

    @property
    def served_cpu(self) -> float:
        """µs per answer, of the proxy and Triton together."""
        return self.cpu + self.triton_cpu


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its extremes."""

    middle: float
    low: float
    high: float
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    """None if there are no values."""
    known = sorted(values)
    return Spread(median(known), known[0], known[-1], len(known)) if known else None


def of(samples: Iterable[Sample], scenario: str, system: str, field: str) -> Spread | None:
    """A system's figure in a scenario, over the rounds."""
    return spread(getattr(each, field) for each in samples if each.scenario == scenario and each.system == system)


def ratio(samples: Sequence[Sample], scenario: str, field: str, above: str, below: str) -> Spread | None:
    """`above` ÷ `below`, in each round that has both; so what slows down a whole round falls out."""
    upper, lower = (
        {each.round: float(getattr(each, field)) for each in samples if (each.scenario, each.system) == (scenario, who)}
        for who in (above, below)
    )
    return spread(upper[number] / lower[number] for number in upper if lower.get(number))


def in_order(values: Iterable[str]) -> list[str]:
    """Each once, in the order of first appearance."""
    return list(dict.fromkeys(values))
