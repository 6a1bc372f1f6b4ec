"""Values: what the core reports while it works, and the interfaces of whoever listens.

Every method returns at once and never raises: telemetry must not be able to fail or delay a call. Instants are seconds
on the clock of `time.monotonic()`. What is reported of every call is not frozen, since that makes it three times as
expensive to make; nobody changes it. It writes its `__init__` itself, since only then it is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from mypy_extensions import mypyc_attr

from gateway.status import Code, Meaning
from gateway.types import Facts, Metadata, Served

_NO_FACTS: Final = Facts()


@dataclass(init=False, slots=True)
class CallStarted:
    """A call, or one message of a ModelStreamInfer, has arrived and its model is known."""

    method: str  # "ModelInfer", "ModelStreamInfer", "ClassifyImage", …
    model: str  # the name the caller used; may be any text a caller invents
    known: bool  # is `model` public, or a variant's own name? Only then may it become a metric label
    request_id: str  # as the caller gave it, "" if none
    peer: str
    at: float
    facts: Facts

    def __init__(
        self,
        method: str,
        model: str,
        known: bool,
        request_id: str,
        peer: str,
        at: float,
        facts: Facts = _NO_FACTS,
    ) -> None:
        self.method = method
        self.model = model
        self.known = known
        self.request_id = request_id
        self.peer = peer
        self.at = at
        self.facts = facts


@dataclass(init=False, slots=True)
class AttemptStarted:
    """The call is about to be sent to one endpoint."""

    model: str  # public name
    variant: str
    upstream: str
    endpoint: str
    number: int  # 1 for the first
    why: str  # the plan's reason for the first, "fallback" or "retry" later
    at: float
    instead_of: str  # the variant in whose place this one is asked, if `why` is "fallback"

    def __init__(
        self,
        model: str,
        variant: str,
        upstream: str,
        endpoint: str,
        number: int,
        why: str,
        at: float,
        instead_of: str = "",
    ) -> None:
        self.model = model
        self.variant = variant
        self.upstream = upstream
        self.endpoint = endpoint
        self.number = number
        self.why = why
        self.at = at
        self.instead_of = instead_of


@dataclass(slots=True)
class AttemptMerged:
    """The attempt under way travels with those of other calls, as one request. Told of calls that are traced."""

    requests: int  # that travel together
    carrier: str  # traceparent of the attempt, of this or another call, that the server is told of as the parent


@dataclass(init=False, slots=True)
class AttemptEnded:
    """One endpoint has answered, or failed to."""

    code: Code
    text: str
    meaning: Meaning | None  # None if it went well
    at: float

    def __init__(self, code: Code, text: str, meaning: Meaning | None, at: float) -> None:
        self.code = code
        self.text = text
        self.meaning = meaning
        self.at = at


@dataclass(frozen=True, slots=True)
class StepEnded:
    """One step of a pipeline, run on this host, is done."""

    step: str
    rows: int
    started: float
    at: float
    error: str = ""


@dataclass(init=False, slots=True)
class CallEnded:
    """The call's one end."""

    code: Code
    text: str
    served: Served | None  # None if nobody answered
    request_bytes: int
    response_bytes: int
    at: float
    callers_fault: bool  # although its code does not say so, and no attempt does
    waited: float  # seconds, for its turn at a model whose calls are limited

    def __init__(
        self,
        code: Code,
        text: str,
        served: Served | None,
        request_bytes: int,
        response_bytes: int,
        at: float,
        callers_fault: bool = False,
        waited: float = 0.0,
    ) -> None:
        self.callers_fault = callers_fault
        self.waited = waited
        self.code = code
        self.text = text
        self.served = served
        self.request_bytes = request_bytes
        self.response_bytes = response_bytes
        self.at = at


@dataclass(init=False, slots=True)
class CallHistory:
    """All that was reported of one call. `attempts` and `outcomes` belong together in order; if the call ended within
    an attempt, that one has no outcome."""

    start: CallStarted
    attempts: list[AttemptStarted]
    outcomes: list[AttemptEnded]
    steps: Sequence[StepEnded]
    end: CallEnded

    def __init__(
        self,
        start: CallStarted,
        attempts: list[AttemptStarted],
        outcomes: list[AttemptEnded],
        steps: Sequence[StepEnded],
        end: CallEnded,
    ) -> None:
        self.start = start
        self.attempts = attempts
        self.outcomes = outcomes
        self.steps = steps
        self.end = end


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
class EndpointEjected:
    """An endpoint failed calls of a model that its peers answer, and is left alone by it; or it is no longer."""

    upstream: str
    endpoint: str
    model: str  # Triton's
    seconds: float  # until it is tried again; 0: it answers again
    at: float


@dataclass(frozen=True, slots=True)
class RetryRefused:
    """A call was not sent again, because retries have used up their budget."""

    model: str  # public name


@dataclass(frozen=True, slots=True)
class ConfigChanged:
    """A config file was taken over, or refused (then `findings` says why and the old one stays)."""

    source: str
    digest: str
    accepted: bool
    findings: tuple[str, ...]
    at: float
    expiries: Mapping[str, float] = field(default_factory=dict)  # of its certificates, Unix time, by config key
    upstreams: tuple[str, ...] = ()  # the names of all that it has


@dataclass(frozen=True, slots=True)
class ConnectionFull:
    """A caller's connection has as many calls at once as it may: the next one waits at the client."""

    peer: str
    calls: int


@dataclass(frozen=True, slots=True)
class StepNow:
    """What one step of a pipeline takes now."""

    pipeline: str
    step: str
    running: int  # threads
    waiting: int  # tasks without one
    oldest: float  # seconds for which the longest of the running ones has been at it


@dataclass(frozen=True, slots=True)
class PipelinesNow:
    """What pipelines take now, and what is wrong with them. It is asked for and not reported."""

    steps: Sequence[StepNow]
    memory_held: int  # bytes, by pictures that are being decoded
    memory_most: int
    faults: Mapping[str, int]  # by pipeline: between its config and the models that it calls


@dataclass(frozen=True, slots=True)
class GateNow:
    """What calls to one model of one upstream are limited by, for those who want to know why one was refused."""

    upstream: str
    model: str  # as its servers call it
    limit: int  # calls in flight
    in_flight: int
    waiting: int
    latency: float  # seconds, of the last answers; 0 if not measured yet
    rate: float  # answers per second; 0 if not measured yet
    refused: Mapping[str, int]  # calls since the start, by reason


class CallObserver(Protocol):
    """Hears about one call, in the order in which things happen."""

    def attempt_started(self, event: AttemptStarted) -> Metadata:
        """Answers the metadata to add upstream (a `traceparent` if the call is sampled), or ()."""
        ...

    def attempt_merged(self, event: AttemptMerged) -> None: ...

    def attempt_ended(self, event: AttemptEnded) -> None: ...

    def step_ended(self, event: StepEnded) -> None: ...

    def ended(self, event: CallEnded) -> None: ...


class Hooks(Protocol):
    """What the core is given to report to."""

    traces: bool
    """Are calls traced here? Then the observers answer what is said of traces upstream; else callers' own passes."""

    def call_started(self, event: CallStarted) -> CallObserver: ...

    def endpoint_changed(self, event: EndpointChanged) -> None: ...

    def endpoint_ejected(self, event: EndpointEjected) -> None: ...

    def retry_refused(self, event: RetryRefused) -> None: ...

    def config_changed(self, event: ConfigChanged) -> None: ...

    def connection_full(self, event: ConnectionFull) -> None: ...


class Listener(Protocol):
    """Who hears what the core reports, by way of `Hooks` that tell all listeners."""

    def call_started(self, event: CallStarted) -> CallObserver | None:
        """Answers who must hear the call while it runs; None if its history is enough."""
        ...

    def call_ended(self, call: CallHistory) -> None: ...

    def endpoint_changed(self, event: EndpointChanged) -> None: ...

    def endpoint_ejected(self, event: EndpointEjected) -> None: ...

    def retry_refused(self, event: RetryRefused) -> None: ...

    def config_changed(self, event: ConfigChanged) -> None: ...

    def connection_full(self, event: ConnectionFull) -> None: ...


@mypyc_attr(allow_interpreted_subclasses=True)
class NoObserver:
    """Hears nothing."""

    def attempt_started(self, event: AttemptStarted) -> Metadata:
        return ()

    def attempt_merged(self, event: AttemptMerged) -> None: ...

    def attempt_ended(self, event: AttemptEnded) -> None: ...

    def step_ended(self, event: StepEnded) -> None: ...

    def ended(self, event: CallEnded) -> None: ...


@mypyc_attr(allow_interpreted_subclasses=True)
class NoHooks:
    """For tools and tests that need no telemetry."""

    traces: bool = False

    def call_started(self, event: CallStarted) -> CallObserver:
        return NoObserver()

    def endpoint_changed(self, event: EndpointChanged) -> None: ...

    def endpoint_ejected(self, event: EndpointEjected) -> None: ...

    def retry_refused(self, event: RetryRefused) -> None: ...

    def config_changed(self, event: ConfigChanged) -> None: ...

    def connection_full(self, event: ConnectionFull) -> None: ...


@mypyc_attr(allow_interpreted_subclasses=True)
class NoListener:
    """Hears nothing; for those who care about some of it."""

    traces: bool = False  # does it trace calls?

    def call_started(self, event: CallStarted) -> CallObserver | None:
        return None

    def call_ended(self, call: CallHistory) -> None: ...

    def endpoint_changed(self, event: EndpointChanged) -> None: ...

    def endpoint_ejected(self, event: EndpointEjected) -> None: ...

    def retry_refused(self, event: RetryRefused) -> None: ...

    def config_changed(self, event: ConfigChanged) -> None: ...

    def connection_full(self, event: ConnectionFull) -> None: ...
