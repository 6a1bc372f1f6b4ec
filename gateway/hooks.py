"""Values: what the core reports while it works, and the interface of whoever listens.

Every method returns at once and never raises: telemetry must not be able to fail or delay a call. Instants are seconds
on the clock of `time.monotonic()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from gateway.status import Code, Meaning
from gateway.types import Facts, Metadata, Served


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call, or one message of a ModelStreamInfer, has arrived and its model is known."""

    method: str  # "ModelInfer", "ModelStreamInfer", "ClassifyImage", …
    model: str  # the name the caller used; may be any text a caller invents
    known: bool  # is `model` public, or a variant's own name? Only then may it become a metric label
    request_id: str  # as the caller gave it, "" if none
    peer: str
    at: float
    facts: Facts = field(default_factory=Facts)


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """The call is about to be sent to one endpoint."""

    model: str  # public name
    variant: str
    upstream: str
    endpoint: str
    number: int  # 1 for the first
    why: str  # the plan's reason for the first, "fallback" or "retry" later
    at: float
    instead_of: str = ""  # the variant in whose place this one is asked, if `why` is "fallback"


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """One endpoint has answered, or failed to."""

    code: Code
    text: str
    meaning: Meaning | None  # None if it went well
    at: float


@dataclass(frozen=True, slots=True)
class StepEnded:
    """One step of a pipeline, run on this host, is done."""

    step: str
    rows: int
    started: float
    at: float
    error: str = ""


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The call's one end."""

    code: Code
    text: str
    served: Served | None  # None if nobody answered
    request_bytes: int
    response_bytes: int
    at: float


@dataclass(frozen=True, slots=True)
class EndpointChanged:
    """An endpoint became usable or stopped being so; `models` are the Triton models it can serve now.

    gone: it left the config, or its name no longer leads to it; nothing more will be said of it.
    """

    upstream: str
    endpoint: str
    ready: bool
    models: tuple[str, ...]
    reason: str
    at: float
    gone: bool = False


@dataclass(frozen=True, slots=True)
class ConfigChanged:
    """A config file was taken over, or refused (then `findings` says why and the old one stays)."""

    source: str
    digest: str
    accepted: bool
    findings: tuple[str, ...]
    at: float
    expiries: Mapping[str, float] = field(default_factory=dict)  # of its certificates, Unix time, by config key


class CallObserver(Protocol):
    """Hears about one call, in the order in which things happen."""

    def attempt_started(self, event: AttemptStarted) -> Metadata:
        """Answers the metadata to add upstream (a `traceparent` if the call is sampled), or ()."""
        ...

    def attempt_ended(self, event: AttemptEnded) -> None: ...

    def step_ended(self, event: StepEnded) -> None: ...

    def ended(self, event: CallEnded) -> None: ...


class Hooks(Protocol):
    """What the core is given to report to."""

    def call_started(self, event: CallStarted) -> CallObserver: ...

    def endpoint_changed(self, event: EndpointChanged) -> None: ...

    def config_changed(self, event: ConfigChanged) -> None: ...


class NoObserver:
    """Hears nothing."""

    def attempt_started(self, event: AttemptStarted) -> Metadata:
        return ()

    def attempt_ended(self, event: AttemptEnded) -> None: ...

    def step_ended(self, event: StepEnded) -> None: ...

    def ended(self, event: CallEnded) -> None: ...


class NoHooks:
    """For tools and tests that need no telemetry."""

    def call_started(self, event: CallStarted) -> CallObserver:
        return NoObserver()

    def endpoint_changed(self, event: EndpointChanged) -> None: ...

    def config_changed(self, event: ConfigChanged) -> None: ...
