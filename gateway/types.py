"""Values: the frozen values that rooms exchange. No behaviour beyond what their fields imply, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from gateway.status import Meaning

MetadataValue = str | bytes
Metadata = Sequence[tuple[str, MetadataValue]]
"""gRPC metadata in order; keys are lower case, `-bin` keys have bytes."""

Buffer = bytes | bytearray | memoryview
"""Bytes wherever they lie. A memoryview must be one of unsigned bytes (format "B")."""

Parameter = bool | int | float | str
"""A value of the V2 protocol's `InferParameter`."""

EXPERIMENT: Final = "experiment:"
"""Begins the reason of a plan by an experiment, whose name follows."""

ROLLOUT: Final = "rollout:"
"""Begins the reason of a plan by a rollout, likewise."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One loaded Triton model on one upstream that can answer for a public model."""

    name: str
    upstream: str
    model: str
    version: str = ""  # "" leaves the choice to the server's version policy
    attempt_timeout: float = 0.0  # seconds for one attempt; 0: until the deadline of the call


@dataclass(frozen=True, slots=True)
class Retry:
    """When a request that the model may have run already is sent again, and how often."""

    on: frozenset[Meaning] = frozenset(
        {Meaning.LOST, Meaning.LATE}
    )  # meanings among `status.MAY_HAVE_RUN` after which it is sent again
    most: int = 1  # most times for one call


@dataclass(slots=True)  # not frozen: one is made for every request, and that would triple its price
class Facts:
    """What routing may know of a request. It must not be changed."""

    metadata: Mapping[str, str] = field(default_factory=dict)  # lower-case keys, first value wins, no `-bin` keys
    parameters: Mapping[str, Parameter] = field(default_factory=dict)  # of the V2 request
    version: str = ""  # explicit model version, "" if none


@dataclass(frozen=True, slots=True)
class Plan:
    """Which variants to try, in order, and why the first one is first."""

    targets: tuple[Variant, ...]
    reason: str  # "rule:<name>", "experiment:<name>", "holdout:<name>", "waiting:<name>", "stopped:<name>",
    # "rollout:<name>", "sticky", "split", "only", "version", "direct", "sequence", "fallback"
    instead_of: str = ""  # the variant that was chosen, if the reason is "fallback"


@dataclass(frozen=True, slots=True)
class Served:
    """Who answered a call, for trailing metadata, the typed API and telemetry."""

    model: str  # public name
    variant: str
    model_version: str  # the version that the server named
    endpoint: str
    attempts: int
    fallback_from: str = ""  # the variant that was chosen, if another one answered in its place
    fallback_reason: str = ""  # why: what its failure meant, or a word of `forwarding.attempts`
    reused: str = ""  # "hit": a remembered answer; "coalesced": another call's, that was in flight
