"""Values: the events that the core reports while it works, and the interfaces of those who receive them.

Every method returns at once and never raises: telemetry must not be able to fail or delay a call. Instants are seconds
on the clock of `time.monotonic()`. What is reported of every call is not frozen, since that makes it three times as
expensive to make; nobody changes it. It writes its `__init__` itself, since only then it is compiled, and says that it
is no part of a cycle, so that the collector need not know it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from mypy_extensions import mypyc_attr

from gateway.status import Code, Meaning
from gateway.types import Facts, Metadata, Served

_NO_FACTS: Final = Facts()


@mypyc_attr(acyclic=True)
@dataclass(init=False, slots=True)
class CallStarted:
    """A call, or one message of a ModelStreamInfer, has arrived, and the model that it names has been read."""

    method: str  # "ModelInfer", "ModelStreamInfer", "ClassifyImage", …
    model: str  # the name that the caller used, which may be any text
    known: bool  # is `model` a name of the config? Only then may it become the value of a metric label
    request_id: str  # the id of the V2 request, "" if there is none
    peer: str
    at: float
    facts: Facts
    rows: int  # of the request, where usage is counted; else 1

    def __init__(
        self,
        method: str,
        model: str,
        known: bool,
        request_id: str,
        peer: str,
        at: float,
        facts: Facts = _NO_FACTS,
        rows: int = 1,
    ) -> None:
        self.rows = rows
        self.method = method
        self.model = model
        self.known = known
        self.request_id = request_id
        self.peer = peer
        self.at = at
        self.facts = facts


@mypyc_attr(acyclic=True)
@dataclass(init=False, slots=True)
class AttemptStarted:
    """A call is about to be sent to one endpoint."""

    model: str  # the public name
    variant: str
    upstream: str
    endpoint: str
    number: int  # 1 for the first
    why: str  # the reason of the plan for the first attempt; "fallback", "retry" or "hedge" for later ones
    at: float
    instead_of: str  # the variant in whose place this one is asked, if `why` is "fallback"
    reason: str  # why, then: what that one's failure meant ("unreachable", …), "unavailable", "limited" or "sample"
    planned: str  # the reason of the plan, whichever attempt this is

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
        reason: str = "",
        planned: str = "",
    ) -> None:
        self.model = model
        self.variant = variant
        self.upstream = upstream
        self.endpoint = endpoint
        self.number = number
        self.why = why
        self.at = at
        self.instead_of = instead_of
        self.reason = reason
        self.planned = planned


@dataclass(slots=True)
class AttemptMerged:
    """The attempt of a traced call was merged with those of other calls into one request."""

    requests: int  # how many were merged
    carrier: str  # traceparent of the attempt, of this or another call, that the server saw


@mypyc_attr(acyclic=True)
@dataclass(init=False, slots=True)
class AttemptEnded:
    """The endpoint of an attempt has answered or failed."""

    code: Code
    text: str
    meaning: Meaning | None  # None if the attempt succeeded
    at: float

    def __init__(self, code: Code, text: str, meaning: Meaning | None, at: float) -> None:
        self.code = code
        self.text = text
        self.meaning = meaning
        self.at = at


@dataclass(frozen=True, slots=True)
class StepEnded:
    """One local step of a pipeline has ended."""

    step: str
    rows: int
    started: float
    at: float
    error: str = ""


@mypyc_attr(acyclic=True)
@dataclass(init=False, slots=True)
class CallEnded:
    """A call has ended. This is reported once for each call."""

    code: Code
    text: str
    served: Served | None  # None if no endpoint answered
    request_bytes: int
    response_bytes: int
    at: float
    callers_fault: bool  # the caller's fault, although neither the code nor an attempt says so
    waited: float  # seconds of waiting, for another call's answer or for a place at a limited model

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
    """Everything that was reported of one call.

    The entries of `attempts` and `outcomes` correspond; if the call ended during an attempt, that has no outcome.
    """

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
    tried: of the models that it is tried out with, by inferences, whether these go well.
    """

    upstream: str
    endpoint: str
    ready: bool
    models: tuple[str, ...]
    reason: str
    at: float
    gone: bool = False
    tried: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BreakerChanged:
    """A variant that has a fallback gets no calls any more, or some, or all."""

    model: str  # public
    variant: str
    state: str  # "admitting", "tripped" or "probing"
    at: float


@dataclass(frozen=True, slots=True)
class EndpointEjected:
    """An endpoint was ejected for a model, since it fails calls that its peers answer; or the ejection has ended."""

    upstream: str
    endpoint: str
    model: str  # the Triton model
    seconds: float  # seconds until the endpoint gets a trial call; 0: the ejection has ended
    at: float


@dataclass(frozen=True, slots=True)
class RetryRefused:
    """A call was not sent again, because the retry budget, or its caller's part of it, is used up."""

    model: str  # the public name


@dataclass(frozen=True, slots=True)
class ConfigChanged:
    """A config came into force, or was refused: then `findings` says why, and the old one stays in force."""

    source: str
    digest: str
    accepted: bool
    findings: tuple[str, ...]
    at: float
    expiries: Mapping[str, float] = field(
        default_factory=dict
    )  # when each certificate expires, in Unix time, by config key
    upstreams: tuple[str, ...] = ()  # the names of all upstreams


@dataclass(frozen=True, slots=True)
class ConnectionFull:
    """A caller's connection has as many open calls as it may have: the client must hold back the next one."""

    peer: str
    calls: int


@dataclass(frozen=True, slots=True)
class StepNow:
    """The tasks of one step of a pipeline, now."""

    pipeline: str
    step: str
    running: int  # tasks that have a thread
    waiting: int  # tasks that wait for one
    oldest: float  # seconds that the longest-running task has run


@dataclass(frozen=True, slots=True)
class PipelinesNow:
    """What pipelines use now, and how many faults they have. Metrics ask for it; it is not an event."""

    steps: Sequence[StepNow]
    memory_held: int  # bytes held by pictures that are being decoded
    memory_most: int
    faults: Mapping[str, int]  # by pipeline: mismatches between its config and the models that it calls


@dataclass(frozen=True, slots=True)
class GateNow:
    """The limit of calls to one model of one upstream, now."""

    upstream: str
    model: str  # the Triton model
    limit: int  # most calls in flight
    in_flight: int
    waiting: int
    latency: float  # seconds that recent answers took; 0 if not measured yet
    rate: float  # recent answers per second; 0 if not measured yet
    refused: Mapping[str, int]  # calls since the start, by reason


@dataclass(frozen=True, slots=True)
class SharedNow:
    """What identical requests of one public model have shared since its settings were put in force."""

    model: str
    hits: int  # calls answered from memory
    coalesced: int  # calls answered with another one's answer, which was in flight
    executed: int  # calls that a server was asked for
    answers: int  # that are remembered now
    held: int  # bytes of them
    most: int  # bytes that there may be
    evictions: int  # answers forgotten to make room


@dataclass(frozen=True, slots=True)
class HedgesNow:
    """What became of second attempts of one public model since its settings were put in force."""

    model: str
    sent: int
    won: int  # their answer was the first
    refused: int  # not sent, because their budget was used up
    after: float  # seconds that a call may take before it is sent a second time; 0: not known yet


@dataclass(frozen=True, slots=True)
class AnswersNow:
    """What was found in the answers of one variant of a public model whose answers are looked at."""

    model: str
    variant: str
    results: Mapping[str, int]  # answers by a word of `forwarding.checks`


@dataclass(frozen=True, slots=True)
class ParityNow:
    """Whether a shadow may stand in for other variants."""

    is_open: bool
    compared: int  # of the last `copies`
    agreed: int
    copies: int  # that must have been compared
    agreement: float  # the share of them that must agree


@dataclass(frozen=True, slots=True)
class ShadowNow:
    """What became of the copies of one public model's requests at one variant, since its settings are in force."""

    model: str
    variant: str
    results: Mapping[str, int]  # by a word of `forwarding.shadowing`
    dropped: Mapping[str, int]  # by reason
    wrong: int  # answers of the shadow with NaN or infinity
    wrong_here: int  # answers to callers with them, of those that were compared
    seconds: float  # that its answers took, in all
    measures: Mapping[str, float]  # the mean of each measure of the comparison
    parity: ParityNow | None = None  # None: it may always stand in


@dataclass(frozen=True, slots=True)
class BanditNow:
    """How the shares of an experiment follow its reward, as this worker knows it."""

    epoch: int  # how many have begun
    epochs: int
    shares: Mapping[str, float]  # by arm, of units of the latest one; empty before the first
    since: float  # Unix time of the latest one's begin
    overdue: float  # seconds for which another one has been due
    decides: bool  # does this worker?
    age: float  # seconds since the store was read
    trouble: str
    waits: str  # for what another one waits that is due, if this worker decides
    history: Sequence[tuple[float, int, Mapping[str, float]]]  # of each epoch: when, by how many units' rewards, shares


@dataclass(frozen=True, slots=True)
class ArmGuardrailNow:
    """A guardrail of an experiment, of one of its arms."""

    arm: str
    outcome: str
    state: str  # "held", "breached", "undecided"
    distance: float  # what is left until it is breached, as its limit is stated; NaN if nothing can be told
    text: str  # for people


@dataclass(frozen=True, slots=True)
class VerdictNow:
    """What an experiment says so far, as this worker knows it."""

    age: float  # seconds since it was found, or since this worker looks for one
    decides: bool  # does this worker find it?
    judgements: Sequence[tuple[str, str, str]] = ()  # of the primary outcome: arm, outcome, word
    guardrails: Sequence[ArmGuardrailNow] = ()


@dataclass(frozen=True, slots=True)
class ExperimentNow:
    """An experiment of the config, now."""

    name: str
    model: str
    exposures: int  # told by this worker since its start
    units: Mapping[str, int]  # in the store, by arm; empty if not known
    sample_ratio: float | None  # the p-value of the sample ratio; None if not known
    is_mismatched: bool  # is it an alarm?
    stopped_with: str = ""  # the arm that everybody gets since it was stopped
    bandit: BanditNow | None = None  # None: shares stay
    verdict: VerdictNow | None = None  # None: it was stopped, or none is found anywhere


@dataclass(frozen=True, slots=True)
class GuardrailNow:
    """A guardrail of a rollout's step."""

    name: str
    state: str  # "held", "breached", "undecided"
    distance: float  # what is left until it is breached, as its limit is stated; NaN if nothing can be told
    text: str  # for people


@dataclass(frozen=True, slots=True)
class RolloutNow:
    """A rollout of the config, as this worker knows it."""

    name: str
    model: str
    before: str
    after: str
    phase: str  # a word of `experiments.rollout.Phase`, or "unknown" before the store was read
    step: int  # from 1 on
    steps: int
    share: float  # of the new variant, in force here
    since: float  # Unix time
    reason: str
    waits: Sequence[str]  # for what, if this worker decides
    guardrails: Sequence[GuardrailNow]  # likewise
    units: int  # of the new variant, in this step; likewise
    decides: bool  # does this worker?
    age: float  # seconds since the store was read
    overdue: float  # seconds that it has been in its step beyond the soak time
    trouble: str
    history: Sequence[tuple[float, str, float, str]]  # when, phase, share, reason; the latest last


@dataclass(frozen=True, slots=True)
class StoreNow:
    """The store of experiments, as this worker sees it."""

    name: str
    is_away: bool
    why: str
    waiting: int  # records
    written: int
    dropped: Mapping[str, int]  # records, by reason
    reports: int  # outcomes that were reported and taken
    reports_refused: int  # for lack of room
    duplicates: int  # outcomes that were known already


@dataclass(frozen=True, slots=True)
class QuotasNow:
    """What quotas have refused, and how the store that gateways share them by is."""

    refused: Sequence[tuple[str, str, str, int]] = ()  # caller, model ("": of all), reason, calls since the start
    is_store_away: bool = False


@dataclass(frozen=True, slots=True)
class UsageNow:
    """What one caller has used of one model since the start."""

    caller: str
    model: str
    requests: int
    rows: int
    request_bytes: int
    response_bytes: int
    upstream_seconds: float


@dataclass(frozen=True, slots=True)
class MemoryNow:
    """The memory of the container, or of this process where nothing limits it, and what is done about it."""

    step: int  # `gateway.process.ladder.Step`
    refuses: str  # what that means, for people
    used: int  # bytes
    limit: int
    resets: int  # connections closed on account of it, since the start


@dataclass(frozen=True, slots=True)
class SharedMemoryNow:
    """What one endpoint shares with this worker."""

    upstream: str
    address: str
    state: str  # "in use", or why not
    size: int  # bytes of regions, those that are retired too
    taken: int  # bytes of them in slots
    slots: int
    given_up: int  # requests that nobody waits for any more, and that are being computed
    requests: Mapping[str, int]  # by what became of them: `placed`, or why not
    registrations: Mapping[str, int]  # by how regions came and went


@dataclass(frozen=True, slots=True)
class Watched:
    """What telemetry asks at each reading. All are called from any thread."""

    pipelines: Callable[[], PipelinesNow]
    gates: Callable[[], Sequence[GateNow]] = tuple
    shares: Callable[[], Sequence[SharedNow]] = tuple
    hedges: Callable[[], Sequence[HedgesNow]] = tuple
    shadows: Callable[[], Sequence[ShadowNow]] = tuple
    answers: Callable[[], Sequence[AnswersNow]] = tuple
    memory: Callable[[], MemoryNow] | None = None
    retries_left: Callable[[], Mapping[str, int]] = dict
    experiments: Callable[[], Sequence[ExperimentNow]] = tuple
    store: Callable[[], StoreNow | None] | None = None
    rollouts: Callable[[], Sequence[RolloutNow]] = tuple
    quotas: Callable[[], QuotasNow] = QuotasNow
    usage: Callable[[], Sequence[UsageNow]] = tuple
    shared_memory: Callable[[], Sequence[SharedMemoryNow]] = tuple
    forgotten: Callable[[], Sequence[str]] = tuple
    """Models whose series end, since the last reading."""


@mypyc_attr(allow_interpreted_subclasses=True)
class CallObserver(Protocol):
    """Gets the events of one call, in the order in which they happen."""

    def attempt_started(self, event: AttemptStarted) -> Metadata:
        """Returns the metadata to add upstream: a `traceparent` if the call is sampled, else ()."""
        ...

    def attempt_merged(self, event: AttemptMerged) -> None: ...

    def attempt_ended(self, event: AttemptEnded) -> None: ...

    def step_ended(self, event: StepEnded) -> None: ...

    def ended(self, event: CallEnded) -> None: ...


@mypyc_attr(allow_interpreted_subclasses=True)
class Hooks(Protocol):
    """The receiver of the core's events."""

    traces: bool
    """Does the gateway trace calls? Observers then return the trace context for upstream; else the caller's is used."""

    def call_started(self, event: CallStarted) -> CallObserver: ...

    def endpoint_changed(self, event: EndpointChanged) -> None: ...

    def endpoint_ejected(self, event: EndpointEjected) -> None: ...

    def breaker_changed(self, event: BreakerChanged) -> None: ...

    def retry_refused(self, event: RetryRefused) -> None: ...

    def config_changed(self, event: ConfigChanged) -> None: ...

    def connection_full(self, event: ConnectionFull) -> None: ...


@mypyc_attr(allow_interpreted_subclasses=True)
class Listener(Protocol):
    """One of several receivers of the core's events, behind `Hooks` that call all of them."""

    def call_started(self, event: CallStarted) -> CallObserver | None:
        """Returns an observer that needs the call's events while it runs; None if its history is enough."""
        ...

    def call_ended(self, call: CallHistory) -> None: ...

    def endpoint_changed(self, event: EndpointChanged) -> None: ...

    def endpoint_ejected(self, event: EndpointEjected) -> None: ...

    def breaker_changed(self, event: BreakerChanged) -> None: ...

    def retry_refused(self, event: RetryRefused) -> None: ...

    def config_changed(self, event: ConfigChanged) -> None: ...

    def connection_full(self, event: ConnectionFull) -> None: ...


@mypyc_attr(allow_interpreted_subclasses=True)
class NoObserver(CallObserver):
    """Ignores all events of a call."""

    def attempt_started(self, event: AttemptStarted) -> Metadata:
        return ()

    def attempt_merged(self, event: AttemptMerged) -> None: ...

    def attempt_ended(self, event: AttemptEnded) -> None: ...

    def step_ended(self, event: StepEnded) -> None: ...

    def ended(self, event: CallEnded) -> None: ...


@mypyc_attr(allow_interpreted_subclasses=True)
class NoHooks(Hooks):
    """Ignores all events: for tools and tests that need no telemetry."""

    traces: bool = False

    def call_started(self, event: CallStarted) -> CallObserver:
        return NoObserver()

    def endpoint_changed(self, event: EndpointChanged) -> None: ...

    def endpoint_ejected(self, event: EndpointEjected) -> None: ...

    def breaker_changed(self, event: BreakerChanged) -> None: ...

    def retry_refused(self, event: RetryRefused) -> None: ...

    def config_changed(self, event: ConfigChanged) -> None: ...

    def connection_full(self, event: ConnectionFull) -> None: ...


@mypyc_attr(allow_interpreted_subclasses=True)
class NoListener(Listener):
    """Ignores all events: a base for listeners that need only some of them."""

    traces: bool = False  # does it trace calls?

    def call_started(self, event: CallStarted) -> CallObserver | None:
        return None

    def call_ended(self, call: CallHistory) -> None: ...

    def endpoint_changed(self, event: EndpointChanged) -> None: ...

    def endpoint_ejected(self, event: EndpointEjected) -> None: ...

    def breaker_changed(self, event: BreakerChanged) -> None: ...

    def retry_refused(self, event: RetryRefused) -> None: ...

    def config_changed(self, event: ConfigChanged) -> None: ...

    def connection_full(self, event: ConnectionFull) -> None: ...
