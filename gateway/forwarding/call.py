"""One inference request, from its arrival to its end, whoever asks for it: by callbacks on the event loop.

    arrived → decided → attempts, one after the other or merged with others' → answered or failed → ended

Whatever has a say in a call has its place in that life:

    before deciding    `begin`, before it asks for a decision: is it within its caller's and its model's quotas?
    deciding           `Inference.decision`, once for all requests that are alike; `Inference.begin`, for each
    before attempts    `_share`, where a request that was or is being answered gets the same answer
    beside an attempt  `send`, where `Laid` lays large tensors into memory that the endpoint shares
                       `_begin_attempt`, where `merged` lets it travel with others
                       `send`, where a `Hedge` may go to another endpoint as well
    between attempts   `_upstream_failed`: `Inference.attempt_failed` classifies and learns, `Attempts` says who is next
    before the answer  `_is_looked_at`, where one that is wrong is told from one that is right
    after              `_reply`, whose answer `Shadows` compare with another variant's; `_end`, whatever the end was,
                       where `Exposures` count it if it is of an experiment

Who gets the answer is a `Caller`. A message that is here whole is kept until it is answered, so that it
can be sent again; a larger one is passed on as it arrives, as is a large answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, Final

from gateway.access.door import CALLER
from gateway.bounded import make_room
from gateway.errors import BUG_TEXT, Bug, GatewayError, MalformedMessage, QuotaExceeded, UpstreamFailed
from gateway.forwarding.admission import Place, Refused, Turn, found_full
from gateway.forwarding.attempts import RETRY, Attempt
from gateway.forwarding.backoff import NEVER, pushback, wait_before
from gateway.forwarding.batching import Batch, Layout
from gateway.forwarding.batching.merge_point import MergePoint, maybe_merge_point
from gateway.forwarding.caller import Caller, PartsCaller
from gateway.forwarding.exchange import request_for
from gateway.forwarding.exposures import Exposed
from gateway.forwarding.hedging.hedge import Hedge, forsake, maybe_hedge, slower
from gateway.forwarding.inference import Decision, Inference
from gateway.forwarding.laid import Laid
from gateway.forwarding.metadata import failed_trailers, is_field_passed_on, passed_on, served_trailers
from gateway.forwarding.raw_tensors import RawTensors
from gateway.forwarding.replay import LargeRequest
from gateway.forwarding.retry_info import pushback_fields
from gateway.forwarding.rolled import VariantCounts
from gateway.forwarding.shadowing import ModelShadow
from gateway.forwarding.sharing import Flight
from gateway.forwarding.sharing.member import Sharing
from gateway.forwarding.work import Work, stand_in, whose, why_not
from gateway.hooks import AttemptEnded, AttemptMerged, CallEnded, CallObserver
from gateway.http2.hpack import NeverIndexed
from gateway.quotas import Quota
from gateway.rpc.client import ClientCall
from gateway.rpc.metadata import Fields, fields_from, legal_fields, metadata_from
from gateway.status import LATE, OK, WRONG, Code, Meaning, Origin, Verdict
from gateway.types import Metadata, Served
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.kept import Kept
from gateway.upstream.placed import Placed
from gateway.upstream.shared_memory import SharedMemory
from gateway.v2.faults import Fault
from gateway.v2.names import INFER
from gateway.v2.peek import Head, as_asked, peek_front
from gateway.v2.rows import rows_of

_log = logging.getLogger(__name__)

_PATH: Final = INFER.encode()
_LARGE: Final = 65_536  # bytes of an answer; no endpoint's memory is worth it for a smaller one
_FIELDS_KEPT: Final = 256
_CALLERS_FAULT: Final = (Code.INVALID_ARGUMENT, Code.INTERNAL, Code.UNKNOWN)


class Call:
    """One ModelInfer of a model that a Triton answers. Also a `Mergeable`."""

    layout: Layout
    source: bytes | memoryview
    spans: Sequence[tuple[int, int]]
    carried: Fields
    batch: Batch[Any] | None = None  # of members that a merge point knows by their Protocol
    added: Metadata = ()  # by telemetry, for upstream
    is_over = False
    served: Served | None = None  # who answered, once that is known
    _observer: CallObserver
    _is_reported = True  # is its arrival and end reported here, or by a pipeline of which it is a part?
    _point: MergePoint | None = None  # where it was left, if it was
    _work: Work
    _attempt: Attempt | None = None
    _busy: Endpoint | None = None  # that counts this call as one of its own
    _client: ClientCall | None = None
    _fields: Fields  # the caller's, with those that telemetry adds for this attempt
    _answered_bytes = 0
    _answered: AttemptEnded | None = None  # the report of the attempt's answer, until it is told
    _is_passed_on = False  # is the front of the answer with the caller?
    _parts: PartsCaller | None = None  # the caller, if a large answer may be passed on to it as it arrives
    _large: LargeRequest | None = None  # if the request is passed on as it arrives
    _tell_alone: Callable[[bool], None] | None = None
    _timer: asyncio.TimerHandle | None = None  # for the attempt under way, if its time is limited
    _is_late = False  # has that time passed?
    _pause: asyncio.Handle | None = None  # before the next attempt
    _turn: Turn | None = None  # that it waits for
    _place: Place | None = None  # among the calls in flight, if its model's calls are limited
    _waited = 0.0  # seconds in all, for its turns
    _sharing: Sharing | None = None  # if it may get an answer that is not its own alone
    _hedge: Hedge | None = None  # if its model's slow calls are sent a second time
    _leads: Flight | None = None  # for whose members it is made
    _quota: Quota | None = None  # that it must leave
    kept: Kept | None = None
    _given_up: Kept | None = None  # the same, of an attempt that nobody waits for and that its endpoint goes on with
    raw: RawTensors | None = None
    _laid: Laid | None = None  # its tensors in memory that its endpoint shares, if some have been there
    _shadows: tuple[ModelShadow, ...] = ()  # that get a copy of it once it is answered
    _exposed: Exposed | None = None  # if its unit takes part in an experiment
    _counted: VariantCounts | None = None  # of its variant, if its model has a rollout
    _unit: Exposed | None = None  # of the call for which this one is made, likewise

    def __init__(  # noqa: PLR0917  (made on the hot path, where keywords cost)
        self,
        inference: Inference,
        caller: Caller,
        method: str,
        body: bytes,
        head: Head,
        missing: int = 0,
        raw: RawTensors | None = None,
    ) -> None:
        """method: the RPC that the caller used, for telemetry. body: whole, or all but `missing` bytes of it.

        missing: 0 unless the caller is a `PartsCaller`. raw: its raw tensors, if the body is what is before them.
        """
        self._inference = inference
        self._caller = caller
        self._method = method
        self.body = body
        self.head = head
        self.caller: Hashable = caller.number
        self._request_bytes = len(body) + missing
        if isinstance(caller, PartsCaller):
            self._parts = caller
        if missing > 0:
            assert self._parts is not None  # noqa: S101  (no other has a request that is not here whole)
            self.body, self._large = b"", LargeRequest(self._parts, body)
        if raw is not None:
            self.raw = raw
            self._request_bytes += raw.size

    def begin(self, observer: CallObserver | None = None) -> None:
        """Decide where it may go, and make the first attempt.

        observer: of the pipeline that this call is a part of, which reports the whole.
        """
        inference = self._inference
        self._is_reported = observer is None
        try:
            if inference.quotas.is_on and observer is None:
                self._quota = self._enter_quota()
            decision = inference.decision(self._caller.metadata, self.head, self.body)
            self._observer = observer if observer is not None else self._report(decision)
        except GatewayError as error:
            self._refuse(error)
            return
        except Exception as error:
            _log.error("model %s: unforeseen failure", self.head.model_name, exc_info=error)
            self._refuse(Bug(BUG_TEXT))
            return
        try:
            work = self._work = inference.begin(decision, self._observer, self._caller.peer)
            if inference.shadows.table and self._large is None and work.sequence is None:
                self._shadows = inference.shadows.drawn(work.route.model)
            if inference.exposures.table:
                self._exposed = inference.exposed(work, decision)
            if inference.rolled.table:
                self._counted = inference.rolled_begun(work)
            if not inference.shares.table or not self._share(work):
                self._try_next()
        except Exception as error:
            self.fail_by(error)

    def _refuse(self, error: GatewayError) -> None:
        """End a call about which nothing could be decided, and report it as any other."""
        self.is_over = True
        self._leave_quota()
        caller = self._caller
        if isinstance(error, QuotaExceeded):
            caller.refuse(error)
        else:
            caller.fail(error, caller.metadata.echo)
        if self._is_reported:
            self._inference.refuse(self._method, caller.metadata, caller.peer, error, self.head.model_name)

    def _enter_quota(self) -> Quota:
        """:raises QuotaExceeded: if its caller or its model has used it up."""
        body = self.body if self._large is None else self._large.front
        metadata = self._caller.metadata
        return self._inference.enter_quota(metadata, self.head, body, self._request_bytes, metadata.access)

    def _leave_quota(self) -> None:
        if self._quota is not None:
            quota, self._quota = self._quota, None
            if self._given_up is not None:
                size, clock = self._answered_bytes, self._inference.clock
                self._given_up.give_up(lambda: quota.leave(size, clock()))
            else:
                quota.leave(self._answered_bytes, self._inference.clock())

    def _report(self, decision: Decision) -> CallObserver:
        if self._large is not None and self._inference.counts_rows:
            rows_of(self._large.front, self.head)  # which the head remembers: the body is not here
        return self._inference.report(self._method, decision, self._caller.peer, self.body)

    # Attempts

    def _try_next(self, wait: float = 0.0) -> None:
        """Send the request to the next endpoint; the end of the call if there is none.

        wait: seconds before the variant that has just failed gets it once more; NEVER: it must not. Others wait for
        nothing.
        """
        work, inference = self._work, self._inference
        while True:
            attempt = inference.maybe_next(work, may_retry=wait >= 0.0)
            if attempt is None and wait >= 0.0 and inference.may_return(work):
                attempt = inference.maybe_next(work)
            if attempt is None:
                self._fail(inference.given_up(work))
                return
            self._client = None
            if wait > 0.0 and attempt.why == RETRY:
                self._pause = asyncio.get_running_loop().call_later(wait, self._end_pause, attempt)
                return
            if not inference.gates.table or self._enter(attempt):
                self._begin_attempt(attempt)
                return
            if self._turn is not None:
                return

    def _end_pause(self, attempt: Attempt) -> None:
        """An attempt that had to wait may be made, at the endpoint that is best by now."""
        self._pause = None
        try:
            anew = self._work.attempts.maybe_anew(attempt)
            if anew is None:
                self._work.attempts.not_made(self._attempt)
                self._try_next()
            elif not self._inference.gates.table or self._enter(anew):
                self._begin_attempt(anew)
            elif self._turn is None:
                self._try_next()
        except Exception as error:
            self.fail_by(error)

    def _begin_attempt(self, attempt: Attempt) -> None:
        """:raises GatewayError: if what came of the request since the last attempt could not be kept."""
        if self._large is not None and not self._large.can_be_resent():
            self._leave_endpoint()  # its place at a gate, if it has one
            raise self._inference.given_up(self._work)
        work, inference, caller = self._work, self._inference, self._caller
        self._attempt = attempt
        added = self.added = inference.attempt_started(work, attempt)
        passed, context = caller.metadata.passed, self.context
        self._fields = (*passed, *context) if context else passed
        if added:
            self._fields = (*self._fields, *fields_from(added))
        self._busy = attempt.endpoint
        attempt.endpoint.in_flight += 1
        if self._leads is not None:
            self._leads.sent(attempt)
        if self._large is not None or not self.merged(attempt, None):
            self.send(attempt)

    def send(self, attempt: Attempt) -> None:
        memory = attempt.endpoint.memory
        if memory is not None and self._lay(attempt, memory):
            return
        self._join()
        variant, connection, large = attempt.variant, attempt.endpoint.connection, self._large
        id, sequence = self._work.upstream_id, self._work.own_sequence
        request = request_for(variant, self.body, self.head, id=id, extra=sequence) if large is None else b""
        client = self.new_client(attempt)
        # A request with a sequence id of its caller's own is not passed on: `Relay._wants_whole` has it collected.
        if large is None:
            client.request = request
        elif large.put_into(client, variant, self.head, id):
            attempt.began = 0.0  # how long it takes is its caller's affair too
            connection.submit(client)
            return
        self.watch(attempt, client)
        connection.submit(client)

    def _join(self) -> None:
        """Have its raw tensors in its body, for whoever needs it whole."""
        if self.raw is not None:
            self.body, self.raw = self.raw.after(self.body), None

    def new_client(self, attempt: Attempt) -> ClientCall:
        client = self._client = attempt.endpoint.connection.call(_PATH, self._fields, self._caller.deadline)
        client.on_done = self._upstream_done
        if self._parts is not None and not self._shadows:
            client.on_front = self._answer_front
        return client

    def watch(self, attempt: Attempt, client: ClientCall) -> None:
        """Limit the time of an attempt whose request is here whole, and have a second one follow if it is slow.

        A large request has no second attempt, since its bytes are kept in no place that both could be sent from.
        """
        seconds = attempt.variant.attempt_timeout
        if seconds:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._too_late, client)
        if attempt.number > 1 or not self._inference.hedges.table or self._large is not None:
            return
        if self._tell_alone is None and self._hedge is None:
            self._hedge = maybe_hedge(self, self._inference, self._work)

    def _too_late(self, client: ClientCall) -> None:
        """The attempt has had its time; the call may have more."""
        self._is_late = True
        client.cancel(Code.DEADLINE_EXCEEDED, "attempt_timeout")

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Tensors in memory that the endpoint shares, as `Layable`

    def _lay(self, attempt: Attempt, memory: SharedMemory) -> bool:
        """Lay its tensors into memory, where that is worth it and can be. False: it must be sent as bytes."""
        work, large, laid = self._work, self._large, self._laid
        is_small = self._request_bytes < memory.least  # so that at most its answer is worth it
        if work.own_sequence or (is_small and (large is not None or not memory.answers.knows(attempt.variant.model))):
            return False
        if laid is None:
            laid = self._laid = Laid(self, self._inference, work, self._parts, large, self._request_bytes)
        return laid.is_sent(attempt, memory, self._exposed is None and self._point is None)

    def maybe_under_way(self) -> tuple[Attempt, ClientCall] | None:
        attempt, client = self._attempt, self._client
        return None if attempt is None or client is None else (attempt, client)

    def _is_sent_as_bytes(self, client: ClientCall) -> bool:
        """Could the server do nothing with its tensors' places? Then it is sent once more, which is no attempt."""
        laid, attempt = self._laid, self._attempt
        if self.is_over or laid is None or attempt is None or not laid.is_in_vain(client):
            return False
        self._end_timer()
        try:
            laid.take_back()
            self.send(attempt)
        except Exception as error:
            self.fail_unforeseen(error)
        return True

    def _has_answer_place(self) -> bool:
        return self._laid is not None and self._laid.answer is not None

    # Places at endpoints and gates

    def _leave_endpoint(self, client: ClientCall | None = None) -> None:
        """client: that has ended, if one has."""
        if client is not None and client.runs_out and client.is_kept and self.kept is not None:
            self._leave_later(self.kept)
            return
        endpoint, self._busy = self._busy, None
        if endpoint is not None:
            endpoint.in_flight -= 1
        if self._place is not None:
            place, self._place = self._place, None
            place.leave(client, self._was_full(client), self._inference.clock())
        elif self._inference.gates.table and endpoint is not None and self._attempt is not None:
            variant, refused = self._attempt.variant, self._was_full(client)
            self._inference.gates.left(variant.upstream, variant.model, refused, self._inference.clock())

    def _leave_later(self, kept: Kept) -> None:
        """It is given up, and Triton goes on: so its places stay taken, and who cancels gets no more than who waits."""
        endpoint, self._busy = self._busy, None
        place, self._place = self._place, None
        attempt, gates, clock = self._attempt, self._inference.gates, self._inference.clock

        def leave() -> None:
            if endpoint is not None:
                endpoint.in_flight -= 1
            if place is not None:
                place.leave(None, False, clock())
            elif gates.table and endpoint is not None and attempt is not None:
                gates.left(attempt.variant.upstream, attempt.variant.model, False, clock())

        self._given_up = kept
        kept.give_up(leave)

    def _was_full(self, client: ClientCall | None) -> bool:
        """Has the server refused it since its queue was full?"""
        attempt = self._attempt
        return client is not None and attempt is not None and found_full(client, attempt.variant.model, self.head.id)

    def _learn_answer(self, answer: bytes, size: int) -> None:
        """Remember how large an answer is that comes as bytes, for the next one to a request like this."""
        attempt, large = self._attempt, self._large
        memory = None if attempt is None else attempt.endpoint.memory
        if attempt is None or memory is None or size < memory.least or self._work.sequence is not None:
            return
        variant, front = attempt.variant, self.body if large is None else large.front
        memory.answers.learn(variant.model, variant.version or self.head.model_version, front, answer)

    # Answer

    def _answer_front(self, client: ClientCall) -> None:
        """Enough of a large answer may be here to pass it on as it comes."""
        caller = self._parts
        if self.is_over or caller is None:
            return
        try:
            if self._is_collected(client) or (client.runs_out and self._has_answer_place()):
                client.on_front = None
                return
            head = peek_front(client.body)
            if head is not None:
                self._begin_answer(client, head, caller)
        except MalformedMessage as error:
            client.cancel(error.code, error.text, Origin.ANSWER)  # which tells `_upstream_done`
        except Exception as error:
            self.fail_unforeseen(error)  # first, or the call would end as one that was cancelled
            client.cancel()

    def _is_collected(self, client: ClientCall) -> bool:
        """Must its answer be here whole, since it is looked at, or a merge point has seen none of its model's yet?"""
        if self._point is not None and not self._point.is_proven:
            return True
        checked = self._inference.checks.table.get(self._work.route.model)
        if checked is None or self._attempt is None:
            return False
        return len(client.body) + client.missing <= checked.settings.most

    def _begin_answer(self, client: ClientCall, head: Head, caller: PartsCaller) -> None:
        self._end_timer()  # how long the rest takes is its reader's affair
        if self._attempt is not None:
            self._attempt.began = 0.0
        if self._hedge is not None:
            self._hedge.drop()
        if self._place is not None:  # a slow reader keeps no place from others
            place, self._place = self._place, None
            place.leave_answered(self._inference.clock())
        client.release_memory(True)  # the server has read its tensors, and a slow reader of the answer holds none
        if self._laid is not None:
            self._laid.drop()  # its answer's place too, of the attempt beside which a hedge has answered
        self._learn_answer(client.body, len(client.body) + client.missing)
        work = self._work
        front = as_asked(client.body, head, work.route.model, None if work.upstream_id is None else self.head.id)
        self.served = self._who(head.model_version)[0]
        self._is_passed_on = True
        self._answered_bytes = len(front) + client.missing
        caller.pass_answer(client, front, _answer_fields(client.initial))

    def _upstream_done(self, client: ClientCall) -> None:
        may_be_in_vain = client.runs_out and (client.code is not OK or self._has_answer_place())
        if may_be_in_vain and self._is_sent_as_bytes(client):
            return
        self._leave_endpoint(client)
        if self._timer is not None:
            self._end_timer()
        if self._tell_alone is not None:
            tell, self._tell_alone = self._tell_alone, None
            tell(client.code in _CALLERS_FAULT)
        if self.is_over:
            return
        try:
            if client.code is OK:
                self._take_answer(client)
            else:
                self._upstream_failed(client)
        except Exception as error:
            self.fail_by(error)

    def _take_answer(self, client: ClientCall) -> None:
        if self._is_passed_on:
            self._count_unchecked()
            assert self.served is not None and self._parts is not None  # noqa: S101, PT018  (its front said who)
            self._answered = self._inference.attempt_answered(self._work)
            self._parts.finish(self._trailing(client, self.served.model_version))
            self._end(OK, "")
            return
        body, work = client.body, self._work
        laid = self._laid if client.runs_out else None  # a hedge's answer is all in its message
        place = None if laid is None else laid.answer
        pieces: Sequence[bytes | memoryview] = ()
        try:
            head = self._inference.answers.peek(body)
            renamed = as_asked(body, head, work.route.model, None if work.upstream_id is None else self.head.id)
            if laid is not None and place is not None:
                pieces = laid.answer_pieces(place, renamed)
            elif len(body) > _LARGE:
                self._learn_answer(body, len(body))
        except MalformedMessage as error:
            client.code, client.text, client.origin = error.code, error.text, Origin.ANSWER
            self._upstream_failed(client)
            return
        if pieces:
            self._give_in_pieces(client, pieces, head)
            return
        if self._inference.checks.table and self._is_looked_at(client, body, head, renamed, ()):
            return
        self._give(client, body, head, renamed)

    def _give(self, client: ClientCall, body: bytes, head: Head, renamed: bytes) -> None:
        self._answered = self._inference.attempt_answered(self._work)
        if self._point is not None:
            self._point.learn(self, body, head)
        self._score(body, head)
        self._reply(client, renamed, head, ())

    def _give_part(self, client: ClientCall, body: bytes, head: Head, more: Fields) -> None:
        """Of a merged answer. head: of the whole, or its own; more: of its trailing metadata."""
        self._answered = self._inference.attempt_answered(self._work)
        self._score(body, None)
        self._reply(client, body, head, more)

    def _give_in_pieces(self, client: ClientCall, pieces: Sequence[bytes | memoryview], head: Head) -> None:
        """Give an answer whose tensors are in shared memory: no check, experiment or merge point is to see it."""
        assert self._parts is not None  # noqa: S101  (nobody else gets such an answer)
        self._answered = self._inference.attempt_answered(self._work)
        self._answered_bytes = sum([len(piece) for piece in pieces])
        trailing = self._trailing(client, head.model_version)
        self._parts.reply_in_pieces(pieces, self._answered_bytes, _answer_fields(client.initial), trailing)
        if self._shadows or (self._counted is not None and self._counted.looks > 0):
            self._tell_answer(b"".join(pieces))
        self._end(OK, "")

    # Answers that are looked at first

    def _is_looked_at(self, client: ClientCall, body: bytes, head: Head, renamed: bytes, more: Fields) -> bool:
        """Is the answer looked at? Then it is given to its caller, or not, once that is done: at once as a rule.

        more: of the trailing metadata, of a merged request's answer.
        """
        checked, attempt = self._inference.checks.table.get(self._work.route.model), self._attempt
        if checked is None or attempt is None or not checked.takes(attempt, len(body)):
            return False
        settings = checked.settings

        def on_found(fault: Fault | None) -> None:
            if self.is_over or self._attempt is not attempt:  # while the model was asked
                return
            try:
                if fault is not None and settings.fails(fault):
                    self._answer_is_wrong(fault)
                elif more:
                    self._give_part(client, renamed, head, more)
                else:
                    self._give(client, body, head, renamed)
            except Exception as error:
                self.fail_by(error)

        asked = self.body[: self.head.raw] if self._large is None else self._large.front
        checked.look(attempt, body, head, asked, on_found)
        return True

    def _answer_is_wrong(self, fault: Fault) -> None:
        """Have another variant answer, or another endpoint of this one if there is no other.

        :raises GatewayError: if none may.
        """
        if self._attempt_failed(CallFailed(Code.INTERNAL, fault.text, (), origin=Origin.ANSWER), WRONG):
            self._try_next(NEVER if self._work.attempts.has_other else 0.0)

    def _count_unchecked(self) -> None:
        checked = self._inference.checks.table.get(self._work.route.model)
        if checked is not None and self._attempt is not None:
            checked.takes(self._attempt, self._answered_bytes)

    def _reply(self, client: ClientCall, body: bytes, head: Head, more: Fields) -> None:
        self._answered_bytes = len(body)
        trailing = self._trailing(client, head.model_version)
        self._caller.reply(body, _answer_fields(client.initial), (*trailing, *more) if more else trailing)
        if self._shadows or self._counted is not None:
            self._tell_answer(body)
        self._end(OK, "")

    def _tell_answer(self, body: bytes) -> None:
        """Give the answer to what compares it with another variant's, and to what counts wrong ones."""
        if self._shadows and self.served is not None:
            self._join()
            passed = self._caller.metadata.passed
            shadows, unit = self._inference.shadows, self._exposed or self._unit
            if unit is not None and not self._inference.is_measured(unit, self._work):
                unit = None
            shadows.answered(self._shadows, self.served.variant, self.body, self.head, passed, body, unit)
        if self._counted is not None and self._counted.looks > 0 and not stand_in(self._work):
            self._counted.answered(body, whose(self._work))

    def _score(self, body: bytes, head: Head | None) -> None:
        """Measure how sure the answer is, if its unit's experiment asks for that. head: its own, if it is known."""
        exposed = self._exposed
        if exposed is None or not exposed.running.confidences:
            return
        if self._inference.is_measured(exposed, self._work, self._fallback_reason()):
            self._inference.exposures.scored(exposed, body, head or self._inference.answers.peek(body))

    def _trailing(self, client: ClientCall, model_version: str) -> Fields:
        """What an answer ends with; notes who gave it."""
        self.served, who = self._who(model_version)
        echo = self._caller.metadata.echo
        from_upstream = () if client.is_just_ok else _answer_fields(client.trailing)
        return (*from_upstream, *who, *echo) if from_upstream or echo else who

    def _who(self, model_version: str) -> tuple[Served, Fields]:
        attempt = self._attempt
        assert attempt is not None  # noqa: S101  (something came of one)
        work, variant, address = self._work, attempt.variant.name, attempt.endpoint.address
        chosen = work.attempts.chosen
        if variant == chosen:
            return _who(work.route.model, variant, model_version, address, attempt.number)
        reason = why_not(work, chosen)
        return _who(work.route.model, variant, model_version, address, attempt.number, chosen, reason)

    def _upstream_failed(self, client: ClientCall) -> None:
        """Try elsewhere, if that may help and the request can be sent again.

        :raises GatewayError: if not.
        """
        failure = CallFailed(client.code, client.text, metadata_from(client.trailing), origin=client.origin)
        verdict, self._is_late = LATE if self._is_late else None, False
        if self._attempt_failed(failure, verdict):
            self._try_next(self._wait_after(client))

    def _attempt_failed(self, failure: CallFailed, verdict: Verdict | None) -> bool:
        """Learn from the attempt. False: no other one is to follow, since a second one is under way already.

        :raises GatewayError: if none may follow.
        """
        inference, work, attempt, hedge = self._inference, self._work, self._attempt, self._hedge
        assert attempt is not None  # noqa: S101  (it is what failed)
        if hedge is not None and hedge.client is not None and not self._is_passed_on:
            hedge.first_failed(attempt, failure, verdict)
            self._leave_it_to(hedge, hedge.client)
            return False
        inference.attempt_failed(work, attempt, failure, verdict)
        inference.learn_of_overload(work)
        if self._is_passed_on or (self._large is not None and not self._large.can_be_resent()):
            # Part of the answer is out, or part of the request is gone: it can't be sent again.
            raise inference.given_up(work)
        if self._laid is not None:
            self._laid.take_back()
        return True

    def _wait_after(self, client: ClientCall) -> float:
        """Seconds until the variant of a failed attempt may get another; NEVER if it wants none, or it is too late."""
        inference, work, deadline = self._inference, self._work, self._caller.deadline
        wait = pushback(client.trailing)
        if wait is None:  # who takes turns pauses until its turn comes
            wait = 0.0 if inference.found_full(work) else wait_before(work.attempts.made + 1, inference.draw())
        is_too_late = deadline is not None and wait > 0.0 and inference.clock() + wait >= deadline
        return NEVER if is_too_late else wait

    def _go_on(self) -> None:
        """What it has waited for is over."""
        self._pause = None
        try:
            self._try_next()
        except Exception as error:
            self.fail_by(error)

    # End

    def cancelled(self, code: Code) -> None:
        """The caller has gone, or its deadline has passed; it has its answer, or wants none."""
        if self.is_over:
            return
        self.is_over = True
        text = "the deadline passed" if code is Code.DEADLINE_EXCEEDED else "the caller went away"
        if self._sharing is not None and self._sharing.leave(code, text):
            self._given_up = self._sharing.given_up  # before its own quota is left
            self._end(code, text)
            return
        if self._pause is not None:
            self._pause.cancel()
            self._end(code, text)
            return
        if self._turn is not None:
            self._turn.abandon()
            self._stop_waiting()
            self._end(code, text)
            return
        self._end_timer()
        if self._client is not None:
            self._client.cancel()
        else:  # it waits at a merge point, or is part of a batch
            point, batch = self._point, self.batch
            kept = None if point is None or batch is None else point.maybe_given_up(batch)
            if kept is None:
                self._leave_endpoint()
            else:
                self._leave_later(kept)
        if code is Code.DEADLINE_EXCEEDED and self._attempt is not None:
            self._inference.attempt_late(self._work, self._attempt)
        self._observer.attempt_ended(AttemptEnded(code, text, Meaning.ENDED, self._inference.clock()))
        self._end(code, text)

    def _fail(self, error: GatewayError) -> None:
        if self._attempt is not None and error.served is None:
            error.served = self._who(self._attempt.variant.version)[0]
        trailing = (*legal_fields(failed_trailers(error)), *pushback_fields(error), *self._caller.metadata.echo)
        if isinstance(error, UpstreamFailed):
            trailing = (*legal_fields(passed_on(error.trailers)), *trailing)
        self._caller.fail(error, trailing)  # before it is reported: whatever comes of that, the caller has his answer
        self._end(error.code, error.text, error.is_callers)

    def fail_by(self, error: Exception) -> None:
        """End it by what was thrown."""
        if isinstance(error, GatewayError):
            self._fail(error)
        else:
            self.fail_unforeseen(error)

    def fail_unforeseen(self, error: Exception) -> None:
        """Our own fault: this call ends, and no other."""
        _log.error("model %s: unforeseen failure", self.head.model_name, exc_info=error)
        self._leave_endpoint()
        if not self.is_over:
            self._fail(Bug(BUG_TEXT))

    def tell_answered(self) -> None:
        """Report that its attempt was answered, if that is not told yet."""
        answered, self._answered = self._answered, None
        if answered is not None:
            self._observer.attempt_ended(answered)

    def _end(self, code: Code, text: str, callers_fault: bool = False) -> None:
        self.is_over = True
        if self._quota is not None:
            self._leave_quota()
        self.tell_answered()
        self.raw = None
        if self._large is not None:
            self._large.drop()
        if self._laid is not None:
            laid, self._laid = self._laid, None  # which refers to this call
            laid.drop()
        if self._hedge is not None:
            hedge, self._hedge = self._hedge, None
            hedge.end(code, self._attempt)
        sharing = self._sharing
        if sharing is not None:
            self._sharing = None  # which refers to this call
        if self._leads is not None:  # the flight refers to this call, so that both stay until they are collected
            self.body = b""
        if self._exposed is not None:
            size, reason = self._answered_bytes, self._fallback_reason()
            self._inference.exposed_ended(self._exposed, self._work, code, callers_fault, size, reason)
        if self._counted is not None:
            deadline = self._caller.deadline
            self._inference.rolled_ended(self._counted, self._work, code, callers_fault, deadline)
        if self._is_reported:
            size, answered, now = self._request_bytes, self._answered_bytes, self._inference.clock()
            if sharing is not None:
                self._waited += sharing.waited(now)
            self._observer.ended(CallEnded(code, text, self.served, size, answered, now, callers_fault, self._waited))

    # Sharing, as `Sharer`

    def _share(self, work: Work) -> bool:
        """Answer it as an identical request was or is being answered. False: it must go alone."""
        model = self._inference.shares.table.get(work.route.model)
        if model is None or self._large is not None or work.sequence is not None:
            return False
        self._join()
        sharing = self._sharing = Sharing(self, self._caller, self._inference, work)
        return sharing.begin(model, self.body)

    def made_for(self, flight: Flight) -> Call:
        call = Call(self._inference, flight, self._method, self.body, self.head)
        call._is_reported = False
        call._leads = call._observer = self._work.observer = flight
        call._work = self._work
        call._shadows, call._unit = self._shadows, self._exposed
        return call

    def reply_shared(self, served: Served, body: bytes, initial: Fields, trailing: Fields) -> None:
        self.served = served
        self._answered_bytes = len(body)
        self._score(body, None)
        self._caller.reply(body, initial, (*trailing, *self._caller.metadata.echo))
        self._end(OK, "")

    def _fallback_reason(self) -> str:
        """Why another variant has answered it, as its caller is told; "" if none has."""
        return self.served.fallback_reason if self.served is not None else ""

    # Sharing, as `SharedCall`

    def begin_shared(self) -> None:
        self._go_on()

    @property
    def is_queued(self) -> bool:
        return self._turn is not None

    @property
    def given_up(self) -> Kept | None:
        return self._given_up if self.is_over else None

    def now(self) -> float:
        return self._inference.clock()

    def late(self) -> None:
        if self._attempt is not None and self._busy is not None:
            self._inference.attempt_late(self._work, self._attempt)

    # Hedging, as `Hedged`

    def maybe_slow(self) -> Attempt | None:
        return None if self._busy is None or self._is_passed_on else self._attempt

    def second_request(self, attempt: Attempt) -> ClientCall:
        self._join()
        client = attempt.endpoint.connection.call(_PATH, self._fields, self._caller.deadline)
        client.request = request_for(attempt.variant, self.body, self.head, id=self._work.upstream_id)
        return client

    def hedge_answered(self, hedge: Hedge, client: ClientCall) -> None:
        now, first = self._inference.clock(), self._client
        self._end_timer()
        self._leave_endpoint(first if first is not None and first.is_kept else None)
        if first is not None:
            forsake(first)
        self._observer.attempt_ended(slower(now))
        self._go_on_with(hedge, client)
        self._take_answer(client)

    def _go_on_with(self, hedge: Hedge, client: ClientCall) -> Attempt:
        """The second attempt is the one that counts from now on."""
        self._hedge = None
        self._client = client
        attempt = self._attempt = hedge.become_first()
        if self._leads is not None:
            self._leads.sent(attempt, hedge.is_of_same_life)
        return attempt

    def _leave_it_to(self, hedge: Hedge, client: ClientCall) -> None:
        """The first attempt has failed while the second one is under way, which may do better."""
        client.on_done = self._upstream_done
        self._busy = self._go_on_with(hedge, client).endpoint
        self._place = hedge.place

    # Admission, as `Queued`

    def _enter(self, attempt: Attempt) -> bool:
        """May it be sent? If not, it waits for its `_turn`, or there is no room for it at this variant."""
        inference, caller, variant = self._inference, self._caller, attempt.variant
        gates, now = inference.gates, inference.clock()
        gate = gates.maybe_gate(variant.upstream, variant.model, now)
        if gate is None:
            return True
        values = caller.metadata.values
        turn = Turn(self, caller, gates.turn_of(values, caller.number), attempt, gate, now)
        try:
            if turn.enter(gates.is_batch(values)):
                self._place = turn
                return True
        except Refused as refused:
            self._work.refused = refused
            self._work.attempts.not_made(self._attempt)
            return False
        self._turn = turn
        if self._large is not None:
            self._large.hold()
        return False

    def admitted(self) -> None:
        turn = self._place = self._stop_waiting()
        if self._large is not None:
            self._large.resume()
        try:
            anew = self._work.attempts.maybe_anew(turn.attempt)
            if anew is not None:
                self._begin_attempt(anew)
            else:  # its last endpoint went down meanwhile
                self._leave_endpoint()
                self._work.attempts.not_made(self._attempt)
                self._try_next()
        except Exception as error:
            self._leave_endpoint()
            self.fail_by(error)

    def shed(self, reason: str, retry_after: float) -> None:
        self._stop_waiting()
        self._work.refused = Refused(reason, retry_after)
        self._work.attempts.not_made(self._attempt)
        # Later, since it may take another call's place elsewhere, that one a third one's, and so on.
        self._pause = asyncio.get_running_loop().call_soon(self._go_on)

    def _stop_waiting(self) -> Turn:
        turn, self._turn = self._turn, None
        assert turn is not None  # noqa: S101  (it waited)
        self._waited += turn.stop_waiting(self._inference.clock())
        return turn

    # Merging, as `Mergeable`

    def merged(self, attempt: Attempt, placed: Placed | None) -> bool:
        """Leave the request to a merge point, if it is one that can be merged. placed: where all of its tensors are."""
        self._point = None  # of an attempt before, at another model
        settings = self._inference.current.now.merges.get(self._work.route.model)
        if settings is None or self._work.sequence is not None:
            return False
        self._join()
        point = maybe_merge_point(self._work.route.model, attempt, settings, self.head.model_version)
        if point is None or not point.takes(self, placed):
            return False
        self._point = point
        if self._laid is not None:
            self._laid.drop_answer_place()
        if placed is not None and self._client is not None:  # which kept the time while the request arrived
            client, self._client = self._client, None
            forsake(client)
        point.submit(self)
        return True

    @property
    def passed(self) -> Fields:
        return self._caller.metadata.passed

    @property
    def context(self) -> Fields:
        """Its caller's own place in a trace, for upstream."""
        return () if self._inference.hooks.traces else self._caller.metadata.trace

    @property
    def blamed(self) -> Hashable:
        return self._caller.metadata.values.get(CALLER) or self.caller

    @property
    def upstream_id(self) -> str | None:
        return self._work.upstream_id

    def left_in_batch(self, requests: int, carrier: Metadata) -> None:
        self._observer.attempt_merged(AttemptMerged(requests, str(dict(carrier).get("traceparent", ""))))

    def send_alone(self, ended: Callable[[bool], None]) -> None:
        self.batch = None
        self._tell_alone = ended
        attempt, laid = self._attempt, self._laid
        placed = None if laid is None or self._large is None else laid.placed
        assert attempt is not None  # noqa: S101  (an attempt brought it to the merge point)
        if laid is None or placed is None or not laid.is_sent_placed(attempt, placed, self.new_client(attempt)):
            self.send(attempt)

    def answered(self, body: bytes, head: Head, client: ClientCall, members: int) -> None:
        self._leave_endpoint(client)
        batch = NeverIndexed(b"gateway-batch", b"%d" % members)  # many values, of which each would take up table space
        try:
            if self._inference.checks.table:
                own = self._inference.answers.peek(body)
                if self._is_looked_at(client, body, own, body, (batch,)):
                    return
            self._give_part(client, body, head, (batch,))
        except Exception as error:
            self.fail_unforeseen(error)

    def failed(self, client: ClientCall) -> None:
        self.batch = None
        self._leave_endpoint(client)
        try:
            self._upstream_failed(client)
        except Exception as error:
            self.fail_by(error)

    def broken(self) -> None:
        self.batch = None
        if self._client is not None:
            self._client.cancel()
        self._leave_endpoint()
        if not self.is_over:
            self._fail(Bug(BUG_TEXT))


_known_fields: Final[dict[Fields, Fields]] = {}


def _answer_fields(fields: Fields) -> Fields:
    """What of an upstream's headers or trailers the caller gets."""
    if not fields:
        return fields
    found = _known_fields.get(fields)
    if found is None:
        make_room(_known_fields, _FIELDS_KEPT)
        found = _known_fields[fields] = tuple([field for field in fields if is_field_passed_on(field[0])])
    return found


@lru_cache(4096)
def _who(  # noqa: PLR0917  (called on the hot path, where keywords cost)
    model: str, variant: str, version: str, endpoint: str, attempts: int, instead_of: str = "", reason: str = ""
) -> tuple[Served, Fields]:
    """Who answered, and how the caller is told. The fields may be kept in compression tables: no caller chose them."""
    served = Served(model, variant, version, endpoint, attempts, instead_of, reason)
    return served, tuple((name, value) for name, value in fields_from(served_trailers(served)))
