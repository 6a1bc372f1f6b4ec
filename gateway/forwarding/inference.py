"""What is decided for one inference request, and what is learnt from what comes of it: plan, fall back, report.

Knows routing, pools and hooks; knows no transport and does not act: `call` does, and for streams `streams`. Bodies are
serialized V2 messages whose tensors are never parsed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gateway.access.door import Access
from gateway.access.policy import ALL, SHARED_MEMORY, check_parameters, not_allowed
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
from gateway.forwarding.admission import TOO_LATE, Gates, Refused
from gateway.forwarding.attempts import LIMITED, RETRY, SAMPLE, UNAVAILABLE, Attempt, Attempts
from gateway.forwarding.caller import CallerMetadata
from gateway.forwarding.checks import Checks
from gateway.forwarding.circuits import Circuits
from gateway.forwarding.correlation import traced_id, with_own_id
from gateway.forwarding.exposures import Exposed, Exposures, Member
from gateway.forwarding.found_models import FoundModels
from gateway.forwarding.hedging import Hedges
from gateway.forwarding.metadata import REQUEST_ID, trace_context
from gateway.forwarding.retry_budget import RetryBudget
from gateway.forwarding.rolled import Rolled, VariantCounts
from gateway.forwarding.sequences import ID, Pin, SequenceKey, Sequences, draw_for, id_of, text_of
from gateway.forwarding.shadowing import Shadows
from gateway.forwarding.sharing import Shares
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.forwarding.work import Work, last_asked, stand_in, whose, why_not
from gateway.hooks import (
    AttemptEnded,
    AttemptStarted,
    CallEnded,
    CallObserver,
    CallStarted,
    Hooks,
    RetryRefused,
)
from gateway.quotas import Quota, Quotas
from gateway.routing import Direct, Route, choose, drawn, endpoint_order, plan
from gateway.status import (
    LATE,
    MAY_HAVE_RUN,
    OK,
    Code,
    Meaning,
    Origin,
    Verdict,
    classify,
    code_of,
    is_queue_full,
    is_unknown_sequence,
)
from gateway.types import Facts, Metadata, Parameter, Plan, Variant
from gateway.upstream.connection import CallFailed
from gateway.upstream.latency import SLOWER
from gateway.upstream.pool import MOST_REACHED, Pool, Reached, SubsetPool
from gateway.v2.outputs import AnswerReader
from gateway.v2.peek import (
    RAW_INPUT,
    RAW_OUTPUT,
    Head,
    KnownHeads,
    id_parameter,
    peek_request,
    peek_response,
)
from gateway.v2.rows import clamped, rows_of
from gateway.v2.shared_memory import uses_shared_memory
from gateway.v2.versions import maybe_version, read_version

_ALL: Final = Direct.ALL  # a global is faster than an enum's attribute
_MOST_RETURNS: Final = 3
_NO_FAULT: Final = ("", LIMITED, SAMPLE)  # reasons why another variant has answered that are no fault of the first one
_DECISIONS_KEPT: Final = 1024  # callers choose what is decided about


@dataclass(slots=True)
class Decision:
    """What the head and the facts of a request decide, and so for all requests that have the same, in one topology.

    One about a request that has none like it knows also what was drawn for it.
    """

    head: Head
    facts: Facts
    route: Route | None  # None: no such model may be called
    known: bool  # may its name become a metric label?
    request_id: str
    plan: Plan | None  # None: it depends on more than that
    owner: str = ""  # whose own its sequence's id is; "": it is nobody's, and Triton gets it as it is
    member: Member | None = None  # of an experiment, once a call has found out


class Inference:
    """Decides about inference requests for public models and for variants' own names."""

    def __init__(
        self,
        current: CurrentTopology,
        hooks: Hooks,
        sequences: Sequences,
        *,
        quotas: Quotas | None = None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.current = current
        self.hooks = hooks
        self.sequences = sequences
        self.clock = clock
        self.draw = draw
        self._retries: dict[str, RetryBudget] = {}  # by public model, or variant's own name; "": of all other names
        self.circuits = Circuits(current, hooks, clock, draw)
        self.requests = KnownHeads(peek_request, RAW_INPUT)
        self.answers = KnownHeads(peek_response, RAW_OUTPUT)
        self.quotas = quotas or Quotas()
        self.counts_rows = False  # are the rows of each request reported?
        self.gates = Gates(quotas=self.quotas)
        self.shares = Shares()
        self.hedges = Hedges()
        reader = AnswerReader()
        self.checks = Checks(reader)
        self.shadows = Shadows(current, self.gates, clock=clock, draw=draw)
        self.exposures = Exposures(clock, reader=reader)
        self.rolled = Rolled()
        self.shadows.on_compared = self.exposures.compared
        self.found = FoundModels(clock=clock)
        self._decided_for = current.now
        self._decisions: dict[tuple[CallerMetadata, int], Decision] = {}

    @property
    def topology(self) -> Topology:
        """The one in force."""
        return self.current.now

    def is_known(self, model: str, access: Access | None) -> bool:
        """May this name become a metric label? It is the config's, or Triton has shown that it is a model.

        What its caller may not use is unknown, too. access: of the caller, if that is checked.
        """
        seen = self.current.seen_by(access)
        return seen.is_known(model) or (model in self.found.states and seen.can_be_called(model))

    def report(self, method: str, decision: Decision, peer: str, body: bytes) -> CallObserver:
        """Report that a request has arrived. body: whole, if it is here."""
        model = decision.head.model_name
        known = decision.known or (decision.route is not None and model in self.found.states)
        started = CallStarted(method, model, known, decision.request_id, peer, self.clock(), decision.facts)
        if self.counts_rows:
            started.rows = rows_of(body, decision.head)
        captures = self.current.now.captures
        if captures and (decision.route is not None or decision.known):  # not what its caller may not use
            take = captures.get(model)
            if take is not None:
                take(started, body)
        return self.hooks.call_started(started)

    def refuse(self, method: str, metadata: CallerMetadata, peer: str, error: GatewayError, model: str = "") -> None:
        """Report a call that ended before it could be decided about. model: as the caller named it, if known."""
        now = self.clock()
        facts = Facts(metadata.values)
        request_id = metadata.values.get(REQUEST_ID, "")
        known = self.is_known(model, metadata.access)
        started = CallStarted(method, model, known, request_id, peer, now, facts)
        self.hooks.call_started(started).ended(CallEnded(error.code, error.text, None, 0, 0, now, error.is_callers))

    def enter_quota(self, metadata: CallerMetadata, head: Head, body: bytes, size: int, access: Access | None) -> Quota:
        """Let a request in, if its caller and its model are within their quotas; it must leave the quota once.

        A model that the caller may not use is like one that there is not: he neither uses up its quota nor learns that
        it has one.

        body: whole, or what has arrived of it. size: bytes of all of it. access: of the caller, if that is checked.
        :raises QuotaExceeded: if they are not.
        """
        quotas, model = self.quotas, head.model_name
        if access is not None and not self.current.seen_by(access).can_be_called(model):
            model = ""
        quota = quotas.of(metadata.values, model)
        rows = rows_of(body, head) if quotas.counts_rows else 1
        if rows > size:
            allowed = frozenset({ALL}) if access is None else _allowed(access, model, self.current.seen_by(access))
            rows = clamped(rows, body, size, may_share_memory=not allowed.isdisjoint((SHARED_MEMORY, ALL)))
        quota.enter(size, rows, self.clock())
        return quota

    def decision(self, metadata: CallerMetadata, head: Head, body: bytes = b"") -> Decision:
        """What is decided for these two; made once for all requests that share them.

        body: as of `decide`.
        :raises BadRequest: if the head has parameters that can't be read, or the request what its caller may not send.
        """
        topology = self.current.now
        if self._decided_for is not topology:
            self._decided_for = topology
            self._decisions.clear()
        decided = self._decisions.get((metadata, id(head)))
        if decided is None:
            if head.fronts is None or not metadata.is_shared:  # no other request will have these very ones
                return self.decide(head, metadata.facts_with(head), self.draw(), metadata.access, body)
            decided = self.decide(head, metadata.facts_with(head), None, metadata.access, body)
            make_room(self._decisions, _DECISIONS_KEPT)
            self._decisions[metadata, id(head)] = decided  # which holds the head, so its id stays its own
        return decided

    def decide(
        self, head: Head, facts: Facts, draw: float | None = None, access: Access | None = None, body: bytes = b""
    ) -> Decision:
        """Everything that does not depend on other requests or on what is available now.

        A model that the caller may not use is as unknown as one that there is not, by the same steps.

        draw: uniform in [0, 1), for a decision about one request; None: it is about all that are alike.
        access: of the caller, if that is checked. body: the request, whole unless anything may be in it.
        :raises BadRequest: if the request has what its caller may not send.
        """
        topology, model = self.current.seen_by(access), head.model_name
        route, owner = topology.routes.lookup(model), ""
        if access is not None and (route is not None or model in topology.pipelines):
            allowed = _allowed(access, model, topology)
            _check_payload(allowed, head, facts, body)
            owner = "" if ALL in allowed else access.name
        chosen: Plan | None = None
        if route is not None and not facts.parameters.get(ID):
            chosen = choose(route, facts, draw)
        request_id = head.id or facts.metadata.get(REQUEST_ID, "")
        return Decision(head, facts, route, topology.is_known(model), request_id, chosen, owner)

    def begin(self, decision: Decision, observer: CallObserver, peer: str) -> Work:
        """Decide where a request may go. peer: of its caller.

        :raises UnknownModel: if no such model may be called.
        :raises BadRequest: if nobody is to be called, and what the caller asks for is no version.
        :raises SequenceLost: if its sequence's endpoint can't be reached.
        """
        route, head, facts, chosen = decision.route, decision.head, decision.facts, decision.plan
        if route is None:
            read_version(head.model_version)  # as at Triton: what is no version is refused before the name is looked up
            raise UnknownModel(head.model_name)
        if chosen is None:
            sequence = facts.parameters.get(ID)
            if sequence:
                work = self._begin_sequence_of(decision, route, observer, sequence)
                work.peer = peer
                return work
            chosen = drawn(route, facts, self.draw())
        if not chosen.targets:
            raise UnknownModel(route.model, read_version(facts.version))
        if self.shadows.gated:
            chosen = self.shadows.without_strangers(route.model, chosen)
        attempts = Attempts(chosen, self.current.now.pools, route.attempts)
        return Work(route, head, facts, attempts, observer, peer=peer)

    def exposed(self, work: Work, decision: Decision) -> Exposed | None:
        """Tell that a unit has met its arm, if the model has an experiment. None: nothing of the call is measured."""
        exposures, attempts, member = self.exposures, work.attempts, decision.member
        reason, arm = attempts.reason, attempts.chosen
        if member is None or not exposures.holds(member, reason, arm):
            route = work.route
            member, is_kept = exposures.member(route.model, reason, arm, route.sticky, work.facts, decision.request_id)
            decision.member = member if is_kept else None
        return exposures.measured(member)

    def exposed_ended(  # noqa: PLR0917  (called on the hot path, where keywords cost)
        self, exposed: Exposed, work: Work, code: Code, callers_fault: bool, size: int, fallback_reason: str = ""
    ) -> None:
        """The call of such a unit has ended. fallback_reason: as of `is_measured`."""
        stood_in = code is OK and (fallback_reason or stand_in(work)) not in _NO_FAULT
        self.exposures.ended(exposed, code, _last_meaning(work, code), callers_fault, size, stood_in)

    @staticmethod
    def is_measured(exposed: Exposed, work: Work, fallback_reason: str = "") -> bool:
        """Does its answer tell of its arm? Of a rollout's it does not if another variant has stood in.

        fallback_reason: why one has, as the answer itself says; where calls share answers, `work` does not know it.
        """
        return not exposed.running.counts_variant or not (fallback_reason or stand_in(work))

    def rolled_begun(self, work: Work) -> VariantCounts | None:
        """A call of a model with a rollout has begun. It may become a witness of a new variant that is left alone.

        returns: the counts of the variant that it is meant for, if that is one of the rollout's two.
        """
        attempts = work.attempts
        counts = self.rolled.maybe(work.route.model, attempts.chosen)
        if counts is None or counts.witnesses is None or not self.circuits.breakers or work.sequence is not None:
            return counts
        first = attempts.targets[0]
        if first.name != attempts.chosen or not self.circuits.breakers_of(work, first):
            return counts
        if self.topology.is_available(first) and counts.witnesses.maybe_one(whose(work), self.clock()):
            attempts.ask_though_left_alone()
        return counts

    def rolled_ended(
        self, counts: VariantCounts, work: Work, code: Code, callers_fault: bool, deadline: float | None
    ) -> None:
        """The call of a model with a rollout has ended. counts: of the variant that it was meant for."""
        if callers_fault or (code is OK and work.attempts.last is None):  # the answer is another call's
            return
        why = stand_in(work) if code is OK else ""
        if why == UNAVAILABLE and self._is_left_alone(work):
            counts.passed_over()
        elif not why or why not in _NO_FAULT:
            counts.ended(code, _last_meaning(work, code), why, deadline, self.clock(), whose(work))

    def _is_left_alone(self, work: Work) -> bool:
        """Could the variant that the call was meant for have been asked, but for what became of others' calls?"""
        chosen = work.attempts.chosen
        return any(variant.name == chosen and self.topology.is_available(variant) for variant in work.attempts.targets)

    def _begin_sequence_of(self, decision: Decision, route: Route, observer: CallObserver, id: Parameter) -> Work:
        owner, head, facts = decision.owner, decision.head, decision.facts
        if not owner:
            return self._begin_sequence(route, head, facts, observer, (route.model, id))
        own = id_of(owner, id)
        work = self._begin_sequence(route, head, facts, observer, (route.model, own))
        if own != id and isinstance(own, int | str):
            work.own_sequence = id_parameter(ID, own)
        return work

    def _begin_sequence(self, route: Route, head: Head, facts: Facts, observer: CallObserver, key: SequenceKey) -> Work:
        """A sequence stays where it began: none of its requests is sent anywhere else.

        Only the first may be, if it certainly was not executed where it should have begun; and, where gateways do not
        know the health of the same endpoints, one whose sequence may so have been moved by another gateway.
        """
        if facts.parameters.get("sequence_start") is True:
            chosen, pools = self._places(route, facts, key)
            return Work(route, head, facts, _attempts_at(route, chosen, pools), observer, key)
        pin = known = self.sequences.maybe_find(key, self.clock())
        if pin is None:
            chosen, pools = self._places(route, facts, key)
            if _is_reached(pools):
                return Work(route, head, facts, _attempts_at(route, chosen, pools), observer, key)
            first = Attempts(chosen, pools, 1).maybe_next()
            pin = None if first is None else Pin(first.variant, first.endpoint, first.endpoint.lives)
        if pin is None or not pin.endpoint.can_serve(pin.variant.model, pin.variant.version):
            raise _sequence_lost(route, facts)
        only = Pool(pin.variant.upstream, [pin.endpoint])
        attempts = Attempts(Plan((pin.variant,), "sequence"), {pin.variant.upstream: only}, 1)
        self.sequences.pin(key, pin, self.clock())
        return Work(route, head, facts, attempts, observer, key, known)

    def _places(self, route: Route, facts: Facts, key: SequenceKey) -> tuple[Plan, dict[str, Pool]]:
        """Where a sequence of this id begins: the same endpoint for every worker that sees the same health.

        returns: the variants to try, and their pools in the order in which they are to be.
        """
        chosen = plan(route, facts, draw=draw_for(key), available=self._may_hold)
        if not chosen.targets:
            raise UnknownModel(route.model, read_version(facts.version))
        pools: dict[str, Pool] = {}
        for upstream in {variant.upstream for variant in chosen.targets}:
            pool = self.topology.pools.get(upstream)
            if pool is not None:
                pools[upstream] = pool.in_order(endpoint_order(text_of(key), pool.addresses))
        return chosen, pools

    def _may_hold(self, variant: Variant) -> bool:
        """May sequences of this variant begin now, as far as all gateways would say the same?

        Gateways with different subsets of its upstream know the health of different endpoints, so that does not count.
        """
        return isinstance(self.topology.pools.get(variant.upstream), SubsetPool) or self.topology.is_available(variant)

    def maybe_next(self, work: Work, *, may_retry: bool = True) -> Attempt | None:
        """The next attempt, or None if there is nothing left to try, or nothing left of the budget for retries.

        may_retry: at the variant of the last one.
        """
        attempts, circuits = work.attempts, self.circuits
        if circuits.has_ejections and work.sequence is None:
            attempts.scopes = work.scopes
        if not attempts.made:
            if work.sequence is not None:
                return attempts.maybe_next()
            first = attempts.targets[0]
            is_kept_away = bool(circuits.breakers) and not attempts.is_witness and not circuits.admits(work, first)
            if is_kept_away or (circuits.doubted and circuits.is_sample(work)):
                attempts.put_off_first()
            else:
                found = attempts.maybe_next()
                if found is not None and found.variant is not first:
                    circuits.went_past(work, first)
                return found
            return attempts.maybe_next()
        if work.sequence is not None and work.failures[-1][2].meaning is Meaning.OVERLOADED:
            return None  # other workers, who see the same health, would look for it where it should have begun
        now = self.clock()
        retries = self._budget(work.route)
        has_budget = retries.has_some(now, work.scopes)
        attempt = attempts.maybe_next(may_retry=may_retry and has_budget)
        if attempt is not None and attempt.why == RETRY:
            retries.take(now, work.scopes)
        elif not has_budget and may_retry:
            self.hooks.retry_refused(RetryRefused(work.route.model))
        return attempt

    def retries_left(self) -> dict[str, int]:
        """How many requests may be sent again now, by public model. May be asked from any thread."""
        now, public = self.clock(), self.topology.routes.public
        return {model: budget.left(now) for model, budget in list(self._retries.items()) if model in public}

    def _budget(self, route: Route) -> RetryBudget:
        """One for each model: where one is repeated in vain, the calls of the others need theirs.

        Names that callers may have made up share one, or their budgets would take the places of those of models.
        """
        found = self._retries.get(route.model)
        if found is None:
            model = route.model if self.is_known(route.model, None) else ""
            found = self._retries.get(model)
            if found is None:
                make_room(self._retries, _DECISIONS_KEPT)
                found = self._retries[model] = RetryBudget()
        return found

    def attempt_started(self, work: Work, attempt: Attempt) -> Metadata:
        """Report it; answers the metadata to add upstream."""
        variant, endpoint = attempt.variant, attempt.endpoint
        attempt.began = now = self.clock()
        if attempt.number == 1:
            self._budget(work.route).began(now)
        if work.sequence is not None and work.pin is None:
            self.sequences.pin(work.sequence, Pin(variant, endpoint, endpoint.lives), now)
        extra = work.observer.attempt_started(
            AttemptStarted(
                work.route.model,
                variant.name,
                variant.upstream,
                endpoint.address,
                attempt.number,
                attempt.why,
                now,
                attempt.instead_of,
                why_not(work, attempt.instead_of) if attempt.instead_of else "",
                work.attempts.reason,
            )
        )
        work.upstream_id = traced_id(extra, work.head.id) if extra else None
        return extra

    def tell_hedge(self, work: Work, attempt: Attempt, at: float) -> None:
        """Report an attempt that was sent at this time beside another, once that one has ended: reports are in turn."""
        variant, address = attempt.variant, attempt.endpoint.address
        work.observer.attempt_started(
            AttemptStarted(work.route.model, variant.name, variant.upstream, address, attempt.number, attempt.why, at)
        )

    def context_of(self, facts: Facts) -> Metadata:
        """A caller's own place in a trace, to add upstream: nothing where calls are traced here."""
        if self.hooks.traces or "traceparent" not in facts.metadata:
            return ()
        return trace_context(facts.metadata)

    def attempt_answered(self, work: Work) -> AttemptEnded:
        """Learn from an attempt that went well. Answers the report."""
        now = self.clock()
        if work.sequence is None:
            self.circuits.succeeded(work, now)
        elif work.facts.parameters.get("sequence_end") is True:
            self.sequences.end(work.sequence)
        topology = self.current.now
        if topology.routes.direct is _ALL:
            model = work.route.model
            if model not in self.found.states and not topology.is_known(model):
                self.found.answered(model)
        return AttemptEnded(OK, "", None, now)

    def attempt_failed(self, work: Work, attempt: Attempt, failure: CallFailed, verdict: Verdict | None = None) -> None:
        """Report a failed attempt, and learn from it.

        :raises GatewayError: if the request must not be tried elsewhere.
        """
        failure, verdict, ended = self.learn(work, attempt, failure, verdict)
        work.observer.attempt_ended(ended)
        code = code_of(failure.code)
        if work.sequence is not None and self._is_lost(work, attempt, failure, verdict):
            if verdict.meaning is not Meaning.LOST and self._is_search(work):
                self.sequences.end(work.sequence)  # its next request looks again
            raise last_asked(_sequence_lost(work.route, work.facts), work)
        if not self._may_go_elsewhere(work, failure, verdict):
            raise last_asked(UpstreamFailed(code, _shown(code, failure), failure.trailing), work)
        work.attempts.failed(attempt, verdict)
        work.failures = (*work.failures, (attempt, failure, verdict))

    def _is_lost(self, work: Work, attempt: Attempt, failure: CallFailed, verdict: Verdict) -> bool:
        """Is the state of a sequence gone, or unknown to whoever has to go on with it?

        A request, also the first, that broke off may have been executed: sent elsewhere it could make two of one
        sequence. That Triton knows of none is its caller's fault, unless its server may have been started again since,
        or is asked only since where the sequence should have begun can't be.
        """
        if verdict.meaning is Meaning.LOST:
            return True
        if not is_unknown_sequence(failure.code, failure.text):
            return False
        if work.pin is not None:
            return work.pin.lives != attempt.endpoint.lives
        return self._is_search(work) and not self._is_first_place(work, attempt)

    def _is_search(self, work: Work) -> bool:
        """Is a sequence looked for at those of its places that other gateways may have begun it at?"""
        if work.sequence is None or work.pin is not None or work.facts.parameters.get("sequence_start") is True:
            return False
        return any(isinstance(self.topology.pools.get(v.upstream), SubsetPool) for v in work.attempts.targets)

    def _is_first_place(self, work: Work, attempt: Attempt) -> bool:
        """Is this where a sequence should have begun, whatever any gateway knows of health?"""
        first = work.attempts.targets[0]
        pool = self.topology.pools.get(first.upstream)
        if work.sequence is None or pool is None or attempt.variant is not first:
            return False
        return endpoint_order(text_of(work.sequence), pool.addresses)[0] == attempt.endpoint.address

    def learn(
        self, work: Work, attempt: Attempt, failure: CallFailed, verdict: Verdict | None = None
    ) -> tuple[CallFailed, Verdict, AttemptEnded]:
        """Learn from a failed attempt. Answers the failure as its caller sees it, what it means, and the report."""
        if work.upstream_id is not None or work.own_sequence:
            text = work.in_callers_words(failure.text)
            if work.upstream_id is not None:
                text = with_own_id(text, work.upstream_id, work.head.id)
            failure = CallFailed(failure.code, text, failure.trailing, origin=failure.origin)
        variant = attempt.variant
        # The version that was asked for: a caller who invents one must not make the model itself count as gone.
        asked = (variant.model, variant.version or maybe_version(work.head.model_version) or "")
        if verdict is None:
            verdict = classify(
                failure.code, failure.text, failure.origin, model=asked[0], version=asked[1], id=work.head.id
            )
        code = code_of(failure.code)
        now = self.clock()
        self.circuits.failed(work, attempt, verdict, now)
        attempt.endpoint.failed(asked, verdict, failure.text)
        return failure, verdict, AttemptEnded(code, failure.text, verdict.meaning, now)

    def attempt_late(self, work: Work, attempt: Attempt) -> None:
        """A call's deadline has passed while an endpoint had it.

        That speaks against the endpoint if the model takes much less time: a caller who gives too little says nothing,
        nor does one who is still sending.
        """
        now, variant = self.clock(), attempt.variant
        pool = self.topology.pools.get(variant.upstream)
        if pool is None or not attempt.began:
            return
        if now - attempt.began >= SLOWER * pool.fastest(variant.model, variant.version):
            self.circuits.failed(work, attempt, LATE, now)

    @staticmethod
    def _may_go_elsewhere(work: Work, failure: CallFailed, verdict: Verdict) -> bool:
        """What may have been executed, or may have killed its server, is sent again as the model allows, and counted.

        An answer that could not be used would be so anywhere; one that is wrong goes elsewhere as its model's `answers`
        say.
        """
        if verdict.meaning is Meaning.WRONG:
            return work.sequence is None
        if verdict.meaning not in MAY_HAVE_RUN or work.sequence is not None:
            return verdict.elsewhere
        retry = work.route.retry
        if verdict.meaning not in retry.on or work.repeats >= retry.most or failure.origin is Origin.ANSWER:
            return False
        work.repeats += 1
        return True

    def learn_of_overload(self, work: Work) -> None:
        """After a failed attempt: was the server's queue full? Then the model's calls are limited from now on.

        Not for a Triton model's own name, whose callers get what Triton says.
        """
        attempt, failure, verdict = work.failures[-1]
        if not is_queue_full(verdict, failure.text) or work.route.model not in self.topology.routes.public:
            return
        variant = attempt.variant
        pool = self.topology.pools.get(variant.upstream)
        if pool is not None:
            in_flight = sum(endpoint.in_flight for endpoint in pool.endpoints)
            self.gates.overloaded(variant.upstream, variant.model, in_flight, self.clock())

    def found_full(self, work: Work) -> bool:
        """Has the last server refused it since its queue was full, of a model whose calls are limited by now?"""
        if not work.failures:
            return False
        attempt, failure, verdict = work.failures[-1]
        is_limited = (attempt.variant.upstream, attempt.variant.model) in self.gates.table
        return is_limited and is_queue_full(verdict, failure.text)

    def may_return(self, work: Work) -> bool:
        """Was it refused by the last server that there is, which knows no turns? Then it may wait for its turn here.

        It is a retry as any other, by the budget too. Not of a model that no server is to get a request of twice, since
        a model's own error may read like a full queue.
        """
        last = work.attempts.last
        if last is None or work.refused is not None or work.returns == _MOST_RETURNS or not self.found_full(work):
            return False
        if not work.route.retry.on:
            return False
        if not self._budget(work.route).has_some(self.clock(), work.scopes):
            return False  # which `maybe_next` has told
        work.returns += 1
        work.attempts.again(last)
        return True

    def given_up(self, work: Work) -> GatewayError:
        """What the caller of a request is told that no attempt answered."""
        error = self._given_up(work) if work.refused is None else _no_room(work.route.model, work.refused)
        return last_asked(error, work)

    def _given_up(self, work: Work) -> GatewayError:
        is_full = bool(work.failures) and work.failures[-1][2].meaning is Meaning.OVERLOADED
        is_search = self._is_search(work)
        if work.sequence and not is_full and (is_search or (work.pin and work.failures)):
            if is_search:
                self.sequences.end(work.sequence)  # its next request looks again
            return _sequence_lost(work.route, work.facts)
        if not work.failures:
            return _nothing_available(work.route, ())
        _, failure, _ = work.failures[-1]
        meanings = {verdict.meaning for _, _, verdict in work.failures}
        is_direct = work.route.model not in self.topology.routes.public and failure.from_server
        if is_direct or meanings == {Meaning.WRONG}:
            code = code_of(failure.code)
            return UpstreamFailed(code, _shown(code, failure), failure.trailing)
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


def _allowed(access: Access, model: str, topology: Topology) -> frozenset[str]:
    """What may be in a caller's requests for a model. topology: as he sees it."""
    return access.scope.allowed(model, model in topology.routes.public or model in topology.pipelines)


def _check_payload(allowed: frozenset[str], head: Head, facts: Facts, body: bytes) -> None:
    """:raises BadRequest: if a request has what its caller may not send."""
    if ALL in allowed:
        return
    check_parameters(facts.parameters, allowed)
    if SHARED_MEMORY not in allowed and uses_shared_memory(body, head.raw):
        raise not_allowed("shared memory", SHARED_MEMORY)


def _last_meaning(work: Work, code: Code) -> Meaning | None:
    return work.failures[-1][2].meaning if work.failures and code is not OK else None


def _shown(code: Code, failure: CallFailed) -> str:
    """A failure's text for the caller. What a connection says of itself may tell addresses."""
    if failure.origin is Origin.SERVER:
        return failure.text
    if failure.origin is Origin.ANSWER:
        return f"The endpoint's answer can't be used: {failure.text}"
    if failure.origin is Origin.GIVEN_UP:
        if failure.text == "attempt_timeout":
            return "The endpoint did not answer in the time that one attempt has; the request may have been executed."
        late = code is Code.DEADLINE_EXCEEDED
        return "The deadline passed before an answer came." if late else "The call was cancelled."
    if failure.origin is Origin.LOST:
        return "The connection to the endpoint was lost; the request may have been executed, and is not sent again."
    return "The connection to the endpoint failed."


def _overload_text(work: Work) -> str:
    return next(f.text for _, f, v in reversed(work.failures) if v.meaning is Meaning.OVERLOADED)


def _no_room(model: str, refused: Refused) -> Overloaded:
    seconds = refused.retry_after
    if refused.reason == TOO_LATE:
        text = "so many calls are before this one that its answer would come after its deadline"
    else:
        text = "there are more calls than its servers can answer"
    return Overloaded(f"model '{model}': {text}; try again in {seconds:.2g} s", seconds)


def _nothing_available(route: Route, tried: Sequence[str]) -> NoTarget:
    how = f"tried {', '.join(tried)}" if tried else "none of its endpoints is up with the model loaded"
    return NoTarget(f"model '{route.model}': no variant can answer now ({how})")


def _is_reached(pools: Mapping[str, Pool]) -> bool:
    """Are some of a sequence's places endpoints whose health this gateway may not know?"""
    return any(isinstance(pool, Reached) for pool in pools.values())


def _attempts_at(route: Route, chosen: Plan, pools: dict[str, Pool]) -> Attempts:
    """At the places of a sequence, by all gateways in the same order, and at as many of them."""
    most = max(route.attempts, MOST_REACHED) if _is_reached(pools) else route.attempts
    return Attempts(Plan(chosen.targets, "sequence"), pools, most)


def _sequence_lost(route: Route, facts: Facts) -> SequenceLost:
    return SequenceLost(
        f"sequence {facts.parameters[ID]!r} of model '{route.model}' is lost: the endpoint that holds its state is "
        "unavailable; start the sequence again"
    )
