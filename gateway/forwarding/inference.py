"""What is decided for one inference request, and what is learnt from what comes of it: plan, fall back, report.

Knows routing, pools and hooks; knows no transport and does not act: `call` does, and for streams `streams`. Bodies are
serialized V2 messages whose tensors are never parsed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from gateway.bounded import make_room
from gateway.deadline import Deadline
from gateway.errors import (
    DeadlineExceeded,
    GatewayError,
    NoTarget,
    Overloaded,
    SequenceLost,
    UnknownModel,
    UpstreamFailed,
)
from gateway.forwarding.admission import LATE, Gates, Refused
from gateway.forwarding.attempts import Attempt, Attempts
from gateway.forwarding.caller import CallerMetadata
from gateway.forwarding.correlation import traced_id, with_own_id
from gateway.forwarding.metadata import REQUEST_ID, trace_context
from gateway.forwarding.sequences import Pin, SequenceKey, Sequences, draw_for, text_of
from gateway.forwarding.topology import Topology
from gateway.hooks import AttemptEnded, AttemptStarted, CallEnded, CallObserver, CallStarted, Hooks
from gateway.routing import Route, choose, drawn, endpoint_order, plan
from gateway.status import OK, Code, Meaning, Origin, Verdict, code_of, is_queue_full, judge
from gateway.types import Facts, Metadata, Plan, Served, Variant
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import State
from gateway.upstream.pool import Pool
from gateway.v2.peek import (
    RAW_INPUT,
    RAW_OUTPUT,
    Head,
    KnownHeads,
    peek_request,
    peek_response,
    rename_request,
    rename_response,
)
from gateway.v2.versions import maybe_version, read_version


@dataclass(slots=True)
class Decision:
    """What the head and the facts of a request decide, and so for all requests that have the same, in one topology."""

    head: Head
    facts: Facts
    route: Route | None  # None: no such model may be called
    known: bool  # may its name become a metric label?
    request_id: str
    plan: Plan | None  # None: it depends on more than that


@dataclass(init=False, slots=True)
class Work:
    """One request on its way: what was decided for it, and what came of the attempts so far."""

    route: Route
    head: Head
    facts: Facts
    attempts: Attempts
    observer: CallObserver
    sequence: SequenceKey | None
    pin: Pin | None  # where its sequence has been living, if that is known
    upstream_id: str | None  # of the attempt under way, if it is traced
    failures: Sequence[tuple[Attempt, CallFailed, Verdict]]
    refused: Refused | None  # by the gate of the last variant that had no room for it, if any

    def __init__(
        self,
        route: Route,
        head: Head,
        facts: Facts,
        attempts: Attempts,
        observer: CallObserver,
        sequence: SequenceKey | None = None,
        pin: Pin | None = None,
        upstream_id: str | None = None,
        failures: Sequence[tuple[Attempt, CallFailed, Verdict]] = (),
    ) -> None:
        self.route = route
        self.head = head
        self.facts = facts
        self.attempts = attempts
        self.observer = observer
        self.sequence = sequence
        self.pin = pin
        self.upstream_id = upstream_id
        self.failures = failures
        self.refused = None


_DECISIONS_KEPT: Final = 1024  # callers choose what is decided about


class Inference:
    """Decides about inference requests for public models and for variants' own names."""

    def __init__(
        self,
        topology: Topology,
        hooks: Hooks,
        sequences: Sequences,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.topology = topology
        self.hooks = hooks
        self.sequences = sequences
        self.clock = clock
        self._draw = draw
        self.requests = KnownHeads(peek_request, RAW_INPUT)
        self.answers = KnownHeads(peek_response, RAW_OUTPUT)
        self.gates = Gates()
        self._decided_for = topology
        self._decisions: dict[tuple[CallerMetadata, int], Decision] = {}
        self.capture: Mapping[str, Callable[[CallStarted, bytes], None]] = {}  # who keeps requests of a model, if any

    def report(self, method: str, decision: Decision, peer: str, body: bytes) -> CallObserver:
        """Report that a request has arrived. body: whole, if it is here."""
        model = decision.head.model_name
        started = CallStarted(method, model, decision.known, decision.request_id, peer, self.clock(), decision.facts)
        if self.capture:
            take = self.capture.get(model)
            if take is not None:
                take(started, body)
        return self.hooks.call_started(started)

    def refuse(self, method: str, metadata: CallerMetadata, peer: str, error: GatewayError, model: str = "") -> None:
        """Report a call that ended before it could be decided about. model: as the caller named it, if known."""
        now = self.clock()
        facts = Facts(metadata.values)
        request_id = metadata.values.get(REQUEST_ID, "")
        started = CallStarted(method, model, self.topology.is_known(model), request_id, peer, now, facts)
        self.hooks.call_started(started).ended(CallEnded(error.code, error.text, None, 0, 0, now, error.is_callers))

    def decision(self, metadata: CallerMetadata, head: Head) -> Decision:
        """What is decided for these two; made once for all requests that share them.

        :raises BadRequest: if the head has parameters that can't be read.
        """
        if self._decided_for is not self.topology:
            self._decided_for = self.topology
            self._decisions.clear()
        decided = self._decisions.get((metadata, id(head)))
        if decided is None:
            decided = self.decide(head, metadata.facts_with(head))
            if head.fronts is not None and metadata.is_shared:  # else no other request will have these very ones
                make_room(self._decisions, _DECISIONS_KEPT)
                self._decisions[metadata, id(head)] = decided  # which holds the head, so its id stays its own
        return decided

    def decide(self, head: Head, facts: Facts) -> Decision:
        """Everything that does not depend on chance, on other requests or on what is available now."""
        topology, model = self.topology, head.model_name
        route = topology.routes.lookup(model)
        chosen: Plan | None = None
        if route is not None and not facts.parameters.get("sequence_id"):
            chosen = choose(route, facts)
        request_id = head.id or facts.metadata.get(REQUEST_ID, "")
        return Decision(head, facts, route, topology.is_known(model), request_id, chosen)

    def begin(self, decision: Decision, observer: CallObserver) -> Work:
        """Decide where a request may go.

        :raises UnknownModel: if no such model may be called.
        :raises BadRequest: if nobody is to be called, and what the caller asks for is no version.
        :raises SequenceLost: if its sequence's endpoint can't be reached.
        """
        route, head, facts, chosen = decision.route, decision.head, decision.facts, decision.plan
        if route is None:
            read_version(head.model_version)  # as at Triton: what is no version is refused before the name is looked up
            raise UnknownModel(head.model_name)
        if chosen is None:
            sequence = facts.parameters.get("sequence_id")
            if sequence:
                return self._begin_sequence(route, head, facts, observer, (route.model, sequence))
            chosen = drawn(route, facts, self._draw())
        if not chosen.targets:
            raise UnknownModel(route.model, read_version(facts.version))
        return Work(route, head, facts, Attempts(chosen, self.topology.pools, route.attempts), observer)

    def _begin_sequence(self, route: Route, head: Head, facts: Facts, observer: CallObserver, key: SequenceKey) -> Work:
        """A sequence stays where it began: none of its requests is sent anywhere else, not even the first."""
        starts = facts.parameters.get("sequence_start") is True
        known = None if starts else self.sequences.maybe_find(key, self.clock())
        pin = known or self._place(route, facts, key)
        if pin is None or not pin.endpoint.can_serve(pin.variant.model, pin.variant.version):
            raise _nothing_available(route, ()) if starts else _sequence_lost(key)
        only = Pool(pin.variant.upstream, [pin.endpoint])
        attempts = Attempts(Plan((pin.variant,), "sequence"), {pin.variant.upstream: only}, 1)
        self.sequences.pin(key, pin, self.clock())
        return Work(route, head, facts, attempts, observer, key, known)

    def _place(self, route: Route, facts: Facts, key: SequenceKey) -> Pin | None:
        """Where a sequence of this id begins: the same endpoint for every worker that sees the same health."""
        chosen = plan(route, facts, draw=draw_for(key), available=self.is_available)
        if not chosen.targets:
            raise UnknownModel(route.model, read_version(facts.version))
        for variant in chosen.targets:
            pool = self.topology.pools.get(variant.upstream)
            able = [e for e in pool.endpoints if e.can_serve(variant.model, variant.version)] if pool else []
            able = [e for e in able if e.state is not State.SUSPECT] or able
            if able:
                first = endpoint_order(text_of(key), [endpoint.address for endpoint in able])[0]
                return Pin(variant, next(endpoint for endpoint in able if endpoint.address == first))
        return None

    def is_available(self, variant: Variant) -> bool:
        pool = self.topology.pools.get(variant.upstream)
        return pool is not None and pool.is_available(variant.model, variant.version)

    def attempt_started(self, work: Work, attempt: Attempt) -> Metadata:
        """Report it; answers the metadata to add upstream."""
        variant, endpoint = attempt.variant, attempt.endpoint
        extra = work.observer.attempt_started(
            AttemptStarted(
                work.route.model,
                variant.name,
                variant.upstream,
                endpoint.address,
                attempt.number,
                attempt.why,
                self.clock(),
                attempt.instead_of,
            )
        )
        work.upstream_id = traced_id(extra, work.head.id) if extra else None
        return extra

    def context_of(self, facts: Facts) -> Metadata:
        """A caller's own place in a trace, to add upstream: nothing where calls are traced here."""
        if self.hooks.traces or "traceparent" not in facts.metadata:
            return ()
        return trace_context(facts.metadata)

    def attempt_answered(self, work: Work) -> None:
        work.observer.attempt_ended(AttemptEnded(OK, "", None, self.clock()))
        if work.sequence is not None and work.facts.parameters.get("sequence_end") is True:
            self.sequences.end(work.sequence)

    def attempt_failed(self, work: Work, attempt: Attempt, failure: CallFailed, verdict: Verdict | None = None) -> None:
        """Report a failed attempt, and learn from it.

        :raises GatewayError: if the request must not be tried elsewhere.
        """
        if work.upstream_id is not None:
            text = with_own_id(failure.text, work.upstream_id, work.head.id)
            failure = CallFailed(failure.code, text, failure.trailing, origin=failure.origin)
        variant = attempt.variant
        # The version that was asked for: a caller who invents one must not make the model itself count as gone.
        asked = (variant.model, variant.version or maybe_version(work.head.model_version) or "")
        if verdict is None:
            verdict = judge(
                failure.code, failure.text, failure.origin, model=asked[0], version=asked[1], id=work.head.id
            )
        code = code_of(failure.code)
        work.observer.attempt_ended(AttemptEnded(code, failure.text, verdict.meaning, self.clock()))
        attempt.endpoint.failed(asked, verdict, failure.text)
        if not verdict.elsewhere:
            raise last_asked(UpstreamFailed(code, _shown(code, failure), failure.trailing), work)
        work.attempts.failed(attempt, verdict)
        work.failures = (*work.failures, (attempt, failure, verdict))

    def learn_of_overload(self, work: Work) -> None:
        """After a failed attempt: was the server's queue full? Then the model's calls are limited from now on."""
        attempt, failure, verdict = work.failures[-1]
        if not is_queue_full(verdict, failure.text):
            return
        variant = attempt.variant
        pool = self.topology.pools.get(variant.upstream)
        if pool is not None:
            in_flight = sum(endpoint.in_flight for endpoint in pool.endpoints)
            self.gates.overloaded(variant.upstream, variant.model, in_flight, self.clock())

    def given_up(self, work: Work) -> GatewayError:
        """What the caller of a request is told that no attempt answered."""
        error = self._given_up(work) if work.refused is None else _no_room(work.route.model, work.refused)
        return last_asked(error, work)

    def _given_up(self, work: Work) -> GatewayError:
        if work.sequence and work.pin and work.failures and work.failures[-1][2].meaning is not Meaning.OVERLOADED:
            return _sequence_lost(work.sequence)
        if not work.failures:
            return _nothing_available(work.route, ())
        _, failure, _ = work.failures[-1]
        if work.route.model not in self.topology.routes.public and failure.from_server:
            return UpstreamFailed(code_of(failure.code), failure.text, failure.trailing)
        meanings = {verdict.meaning for _, _, verdict in work.failures}
        if Meaning.OVERLOADED in meanings:
            return Overloaded(f"model '{work.route.model}': {_overload_text(work)}")
        if meanings == {Meaning.MODEL_GONE} and work.facts.version:
            return UnknownModel(work.route.model, maybe_version(work.facts.version) or "")
        return _nothing_available(
            work.route, [f"{attempt.variant.name}: {v.meaning.value}" for attempt, _, v in work.failures]
        )

    def remaining(self, deadline: Deadline | None) -> float | None:
        """Seconds left of a call's time; None if it has no end. raises: DeadlineExceeded."""
        if deadline is None:
            return None
        remaining = deadline.remaining(self.clock())
        if remaining <= 0:
            raise DeadlineExceeded("The deadline passed before an answer came.")
        return remaining


def request_for(variant: Variant, body: bytes, head: Head, *, id: str | None = None, extra: bytes = b"") -> bytes:
    """The request as this variant's Triton must see it."""
    if variant.model == head.model_name and variant.version in ("", head.model_version) and id is None and not extra:
        return body
    return rename_request(
        body, head, model_name=variant.model, model_version=variant.version or None, id=id, extra=extra
    )


def as_asked(work: Work, body: bytes, head: Head) -> bytes:
    """The answer with the model's name and the id that the caller used."""
    if head.model_name == work.route.model and work.upstream_id is None:
        return body
    id = None if work.upstream_id is None else work.head.id
    return rename_response(body, head, model_name=work.route.model, id=id)


def last_asked(error: GatewayError, work: Work) -> GatewayError:
    """The error, with who was asked last, if anybody was."""
    last = work.attempts.last
    if last is not None:
        error.served = served_by(work, last, last.variant.version)
    return error


def served_by(work: Work, attempt: Attempt, model_version: str) -> Served:
    return _served(work.route.model, attempt.variant.name, model_version, attempt.endpoint.address, attempt.number)


_served = lru_cache(4096)(Served)  # names of the config, addresses of its upstreams, versions that these have told


def _shown(code: Code, failure: CallFailed) -> str:
    """A failure's text for the caller. What a connection says of itself may tell addresses."""
    if failure.origin is Origin.SERVER:
        return failure.text
    if failure.origin is Origin.ANSWER:
        return f"The endpoint's answer can't be used: {failure.text}"
    if failure.origin is Origin.GIVEN_UP:
        late = code is Code.DEADLINE_EXCEEDED
        return "The deadline passed before an answer came." if late else "The call was cancelled."
    return "The connection to the endpoint failed."


def _overload_text(work: Work) -> str:
    return next(f.text for _, f, v in reversed(work.failures) if v.meaning is Meaning.OVERLOADED)


def _no_room(model: str, refused: Refused) -> Overloaded:
    seconds = refused.retry_after
    if refused.reason == LATE:
        text = "so many calls are before this one that its answer would come after its deadline"
    else:
        text = "there are more calls than its servers can answer"
    return Overloaded(f"model '{model}': {text}; try again in {seconds:.2g} s", seconds)


def _nothing_available(route: Route, tried: Sequence[str]) -> NoTarget:
    how = f"tried {', '.join(tried)}" if tried else "none of its endpoints is up with the model loaded"
    return NoTarget(f"model '{route.model}': no variant can answer now ({how})")


def _sequence_lost(key: SequenceKey) -> SequenceLost:
    return SequenceLost(
        f"sequence {key[1]!r} of model '{key[0]}' is lost: the endpoint that holds its state is unavailable; "
        "start the sequence again"
    )
