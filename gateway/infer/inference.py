"""The use-case of a forwarded model: one inference request in, one answer out. Plan, attempt, fall back, report.

Knows routing, pools and hooks; knows no transport. Bodies are serialized V2 messages whose tensors are never parsed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

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
from gateway.hooks import AttemptEnded, AttemptStarted, CallObserver, CallStarted, Hooks
from gateway.infer.attempts import Attempt, Attempts
from gateway.infer.correlation import traced_id, with_own_id
from gateway.infer.exchange import Reply, Request
from gateway.infer.metadata import REQUEST_ID, passed_on, served_trailers
from gateway.infer.sequences import Pin, SequenceKey, Sequences, draw_for, text_of
from gateway.infer.topology import Topology
from gateway.routing import Route, choose, endpoint_order, plan
from gateway.status import OK, Code, Meaning, Origin, Verdict, code_of, judge
from gateway.types import Facts, Metadata, Plan, Served, Variant
from gateway.upstream.connection import Answer, CallFailed
from gateway.upstream.endpoint import State
from gateway.upstream.pool import Pool
from gateway.wire.peek import Head, peek_response, rename_request, rename_response

SERVICE: Final = "/inference.GRPCInferenceService/"
INFER: Final = SERVICE + "ModelInfer"


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


class Inference:
    """Answers inference requests for public models and for variants' own names."""

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
        self.capture: Mapping[str, Callable[[CallStarted, bytes], None]] = {}  # who keeps requests of a model, if any
        self.decoupled: set[str] = set()  # models seen to answer several times; grows by what Tritons serve only

    async def answer(self, request: Request, head: Head, facts: Facts, observer: CallObserver) -> Reply:
        """Answer one request by forwarding it.

        :raises GatewayError: with the status that the caller gets.
        """
        return await self._forward(self.begin(self.decide(head, facts), observer), request)

    def observe(self, method: str, head: Head, facts: Facts, peer: str, body: bytes = b"") -> CallObserver:
        """Report that a request has arrived. body: whole, if it is here."""
        return self.report(method, self.decide(head, facts), peer, body)

    def report(self, method: str, decision: Decision, peer: str, body: bytes) -> CallObserver:
        """As `observe`, of a request that something was decided about."""
        model = decision.head.model_name
        started = CallStarted(method, model, decision.known, decision.request_id, peer, self.clock(), decision.facts)
        if self.capture:
            take = self.capture.get(model)
            if take is not None:
                take(started, body)
        return self.hooks.call_started(started)

    def decide(self, head: Head, facts: Facts) -> Decision:
        """Everything that does not depend on chance, on other requests or on what is available now."""
        topology, model = self.topology, head.model_name
        route = topology.routes.lookup(model)
        chosen: Plan | None = None
        if route is not None and not facts.parameters.get("sequence_id"):
            chosen = choose(route, facts, 0.0)
            chosen = chosen if chosen.reason != "split" else None
        request_id = head.id or facts.metadata.get(REQUEST_ID, "")
        return Decision(head, facts, route, topology.is_known(model), request_id, chosen)

    def begin(self, decision: Decision, observer: CallObserver) -> Work:
        """Decide where a request may go.

        :raises UnknownModel: if no such model may be called.
        :raises SequenceLost: if its sequence's endpoint can't be reached.
        """
        route, head, facts, chosen = decision.route, decision.head, decision.facts, decision.plan
        if route is None:
            raise UnknownModel(head.model_name, head.model_version)
        if chosen is None:
            sequence = facts.parameters.get("sequence_id")
            if sequence:
                return self._begin_sequence(route, head, facts, observer, (route.model, sequence))
            chosen = choose(route, facts, self._draw())
        if not chosen.targets:
            raise UnknownModel(route.model, facts.version)
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
            raise UnknownModel(route.model, facts.version)
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

    async def _forward(self, work: Work, request: Request) -> Reply:
        metadata = passed_on(request.metadata)
        while (attempt := work.attempts.maybe_next()) is not None:
            timeout = self.remaining(request.deadline)
            extra = self.attempt_started(work, attempt)
            body = request_for(attempt.variant, request.body, work.head, id=work.upstream_id)
            try:
                with attempt.endpoint.busy():
                    answer = await attempt.endpoint.connection.unary(INFER, body, [*metadata, *extra], timeout)
            except CallFailed as failure:
                self.attempt_failed(work, attempt, failure)
                continue
            except asyncio.CancelledError:
                work.observer.attempt_ended(AttemptEnded(Code.CANCELLED, "", Meaning.ENDED, self.clock()))
                raise
            self.attempt_answered(work)
            return self._reply(work, attempt, answer)
        raise self.given_up(work)

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
        verdict = verdict or judge(failure.code, failure.text, failure.origin)
        code = code_of(failure.code)
        work.observer.attempt_ended(AttemptEnded(code, failure.text, verdict.meaning, self.clock()))
        variant = attempt.variant
        # The version that was asked for: a caller who invents one must not make the model itself count as gone.
        asked = (variant.model, variant.version or work.head.model_version)
        attempt.endpoint.failed(asked, verdict, failure.text)
        if not verdict.elsewhere:
            raise UpstreamFailed(code, _shown(code, failure), failure.trailing)
        work.attempts.failed(attempt, verdict)
        work.failures = (*work.failures, (attempt, failure, verdict))

    def given_up(self, work: Work) -> GatewayError:
        """What the caller of a request is told that no attempt answered."""
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
            return UnknownModel(work.route.model, work.facts.version)
        return _nothing_available(
            work.route, [f"{attempt.variant.name}: {v.meaning.value}" for attempt, _, v in work.failures]
        )

    def _reply(self, work: Work, attempt: Attempt, answer: Answer) -> Reply:
        head = peek_response(answer.body)
        body = as_asked(work, answer.body, head)
        served = served_by(work, attempt, head.model_version)
        trailing = (*passed_on(answer.trailing), *served_trailers(served))
        return Reply(body, passed_on(answer.initial), trailing, served)

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


def _nothing_available(route: Route, tried: Sequence[str]) -> NoTarget:
    how = f"tried {', '.join(tried)}" if tried else "none of its endpoints is up with the model loaded"
    return NoTarget(f"model '{route.model}': no variant can answer now ({how})")


def _sequence_lost(key: SequenceKey) -> SequenceLost:
    return SequenceLost(
        f"sequence {key[1]!r} of model '{key[0]}' is lost: the endpoint that holds its state is unavailable; "
        "start the sequence again"
    )
