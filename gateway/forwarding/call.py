"""One inference request, from its arrival to its end, whoever asks for it: by callbacks on the event loop.

    arrived → decided → attempts, one after the other or merged with others' → answered or failed → ended

Whatever has a say in a call has its place in that life:

    before deciding    `begin`, before it asks for a decision
    deciding           `Inference.decision`, once for all requests that are alike; `Inference.begin`, for each
    beside an attempt  `_try_next`, where `_merged` lets it travel with others
    between attempts   `_upstream_failed`: `Inference.attempt_failed` judges and learns, `Attempts` says who is next
    after              `_end`, whatever the end was

Who gets the answer is a `Caller`. A message that is here whole is kept until it is answered, so that it
can be sent again; a larger one is passed on as it arrives, as is a large answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, Final

from gateway.errors import BUG_TEXT, Bug, GatewayError, MalformedMessage, UpstreamFailed
from gateway.forwarding.admission import Gate, Refused
from gateway.forwarding.attempts import Attempt
from gateway.forwarding.backoff import pushback, wait_before
from gateway.forwarding.batching import Batch, Layout
from gateway.forwarding.batching.merge_point import MergePoint, maybe_merge_point
from gateway.forwarding.caller import Caller
from gateway.forwarding.inference import Decision, Inference, Work, as_asked, request_for
from gateway.forwarding.metadata import failed_trailers, is_field_passed_on, passed_on, served_trailers
from gateway.forwarding.retry_info import pushback_fields
from gateway.hooks import AttemptEnded, AttemptMerged, CallEnded, CallObserver
from gateway.http2.hpack import NeverIndexed
from gateway.rpc.client import ClientCall
from gateway.rpc.metadata import Fields, fields_from, legal_fields, metadata_from
from gateway.status import LATE, OK, Code, Meaning, Origin, is_queue_full, judge
from gateway.types import Metadata, Served
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint
from gateway.v2.names import INFER
from gateway.v2.peek import Head, peek_front, rename_request, tail

_log = logging.getLogger(__name__)

_PATH: Final = INFER.encode()
_MOST_RETURNS: Final = 3
_MAY_BE_FULL: Final = (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)
_CALLERS_FAULT: Final = (Code.INVALID_ARGUMENT, Code.INTERNAL, Code.UNKNOWN)


class Call:
    """One ModelInfer of a model that a Triton answers. Also a `Mergeable`."""

    layout: Layout
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
    _is_passed_on = False  # is the front of the answer with the caller?
    _is_in_parts: bool  # is the request passed on as it arrives? Then `body` is its front, as it was read, ...
    _is_piped = False  # ... is what comes of it passed on and kept, or does it collect while the call waits? ...
    _rest = b""  # ... and this what had come after it when it had to be sent again
    _tell_alone: Callable[[bool], None] | None = None
    _timer: asyncio.TimerHandle | None = None  # for the attempt under way, if its time is limited
    _is_late = False  # has that time passed?
    _pause: asyncio.TimerHandle | None = None  # before the next attempt
    _gate: Gate | None = None  # where it has a place, or waits for one
    _is_waiting = False  # for it
    _before: Attempt | None = None  # while it waits: the last attempt that was made
    _sent_at = 0.0  # if it has a place
    _returns = 0  # times that it came back from a server whose queue was full
    turn: Hashable = None  # as a `Waiting`: who it is that takes turns with others
    until: float | None = None  # as a `Waiting`: its deadline

    def __init__(  # noqa: PLR0917  (made on the hot path, where keywords cost)
        self, inference: Inference, caller: Caller, method: str, body: bytes, head: Head, missing: int = 0
    ) -> None:
        """method: the RPC that the caller used, for telemetry. body: whole, or all but `missing` bytes of it."""
        self._inference = inference
        self._caller = caller
        self._method = method
        self.body = body
        self.head = head
        self.caller: Hashable = caller.number
        self._is_in_parts = missing > 0
        self._request_bytes = len(body) + missing

    def begin(self, observer: CallObserver | None = None) -> None:
        """Decide where it may go, and make the first attempt.

        observer: of the pipeline that this call is a part of, which reports the whole.
        """
        inference = self._inference
        self._is_reported = observer is None
        try:
            decision = inference.decision(self._caller.metadata, self.head)
            self._observer = observer if observer is not None else self._report(decision)
        except GatewayError as error:
            self._refuse(error)
            return
        except Exception as error:
            _log.error("model %s: unforeseen failure", self.head.model_name, exc_info=error)
            self._refuse(Bug(BUG_TEXT))
            return
        try:
            self._work = inference.begin(decision, self._observer)
            self._try_next()
        except GatewayError as error:
            self._fail(error)
        except Exception as error:
            self._fail_unforeseen(error)

    def _refuse(self, error: GatewayError) -> None:
        """End a call about which nothing could be decided, and report it as any other."""
        self.is_over = True
        caller = self._caller
        caller.fail(error, caller.metadata.echo)
        if self._is_reported:
            self._inference.refuse(self._method, caller.metadata, caller.peer, error, self.head.model_name)

    def _report(self, decision: Decision) -> CallObserver:
        caller = self._caller
        body = b"" if self._is_in_parts else self.body
        return self._inference.report(self._method, decision, caller.peer, body)

    # Attempts

    def _try_next(self) -> None:
        """Send the request to the next endpoint; the end of the call if there is none."""
        work, inference = self._work, self._inference
        attempts, gates = work.attempts, inference.gates
        while True:
            before, attempt = attempts.last, inference.maybe_next(work)
            if attempt is None and self._may_wait_again():
                attempt = inference.maybe_next(work)
            if attempt is None:
                self._fail(inference.given_up(work))
                return
            self._client = None
            if not gates.table:
                break
            entered = self._enter(attempt, before)
            if entered is True:
                break
            if entered is None:
                return
        self._begin_attempt(attempt)

    def _begin_attempt(self, attempt: Attempt) -> None:
        """:raises GatewayError: if what came of the request since the last attempt could not be kept."""
        if self._is_piped and not self._has_request():
            self._leave_endpoint()  # its place at a gate, if it has one
            raise self._inference.given_up(self._work)
        work, inference, caller = self._work, self._inference, self._caller
        self._attempt = attempt
        added = self.added = inference.attempt_started(work, attempt)
        self._fields = (*caller.metadata.passed, *self.context)
        if added:
            self._fields = (*self._fields, *fields_from(added))
        self._busy = attempt.endpoint
        attempt.endpoint.begin()
        if self._is_in_parts:
            self._send_front(attempt)
        elif not self._merged(attempt):
            self._send(attempt)

    def _new_client(self, attempt: Attempt) -> ClientCall:
        client = attempt.endpoint.connection.call(_PATH, self._fields, self._caller.deadline)
        client.on_done = self._upstream_done
        if self._caller.takes_parts:
            client.on_front = self._answer_front
        self._client = client
        return client

    def _send(self, attempt: Attempt) -> None:
        """Send a request that is here whole."""
        request = request_for(attempt.variant, self.body, self.head, id=self._work.upstream_id)
        client = self._new_client(attempt)
        client.request = request
        if attempt.variant.attempt_timeout:
            self._timer = asyncio.get_running_loop().call_later(attempt.variant.attempt_timeout, self._too_late, client)
        attempt.endpoint.connection.submit(client)

    def _too_late(self, client: ClientCall) -> None:
        """The attempt has had its time; the call may have more."""
        self._is_late = True
        client.cancel(Code.DEADLINE_EXCEEDED, "attempt_timeout")

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _send_front(self, attempt: Attempt) -> None:
        """Send what is here of a large request, and let the rest follow as it comes.

        Its last bytes name the model once more: see `peek_front`.
        """
        client, head, variant = self._new_client(attempt), self.head, attempt.variant
        version = variant.version or head.model_version
        ending = tail(variant.model, version)
        request = rename_request(
            self.body, head, model_name=variant.model, model_version=version, id=self._work.upstream_id
        )
        if (
            head.end is not None and len(self.body) > head.end
        ):  # it has grown while the call waited, since its head was read
            request += self.body[head.end :]
        if self._caller.missing > 0:
            self._is_piped = True
            client.request = request + self._rest
            client.request_more = self._caller.missing + len(ending)
            self._caller.pass_request(client, ending)
        else:  # meanwhile it is here whole
            client.request = request + self._rest + ending
        attempt.endpoint.connection.submit(client)

    def _leave_endpoint(self, client: ClientCall | None = None) -> None:
        """client: that has ended, if one has."""
        endpoint, self._busy = self._busy, None
        if endpoint is not None:
            endpoint.end()
        if self._gate is not None:
            self._leave_gate(client)
        elif self._inference.gates.table and endpoint is not None and self._attempt is not None:
            variant, refused = self._attempt.variant, client is not None and self._was_full(client)
            self._inference.gates.left(variant.upstream, variant.model, refused, self._inference.clock())

    # Admission, as `Waiting`

    def _enter(self, attempt: Attempt, before: Attempt | None) -> bool | None:
        """True: it may be sent. False: there is no room for it at this variant. None: it waits, and is told."""
        inference, variant = self._inference, attempt.variant
        now = inference.clock()
        gates = inference.gates
        gate = gates.maybe_gate(variant.upstream, variant.model, now)
        if gate is None:
            return True
        values = self._caller.metadata.values
        self.turn, self.until = gates.turn_of(values, self._caller.number), self._caller.deadline
        try:
            entered = gate.enter(self, gates.is_batch(values), now)
        except Refused as refused:
            self._work.refused = refused
            self._work.attempts.not_made(before)
            return False
        self._gate = gate
        if entered:
            self._sent_at = now
            return True
        self._is_waiting = True
        self._before, self._attempt = self._attempt, attempt
        if self._is_in_parts and not self._is_piped:
            self._caller.collect_request()
        return None

    def _may_wait_again(self) -> bool:
        """Was it refused by the last server that there is, which knows no turns? Then it may wait for its turn here."""
        work = self._work
        last = work.attempts.last
        if last is None or work.refused is not None or self._returns == _MOST_RETURNS or not self._found_full():
            return False
        self._returns += 1
        work.attempts.again(last)
        return True

    def _found_full(self) -> bool:
        """Has the last server refused it since its queue was full, of a model whose calls are limited by now?"""
        if not self._work.failures:
            return False
        attempt, failure, verdict = self._work.failures[-1]
        is_limited = (attempt.variant.upstream, attempt.variant.model) in self._inference.gates.table
        return is_limited and is_queue_full(verdict, failure.text)

    def admitted(self) -> None:
        attempt = self._stop_waiting()
        self._sent_at = self._inference.clock()
        if self._is_in_parts and not self._is_piped:
            self.body = self._caller.request_so_far()
        try:
            anew = self._work.attempts.maybe_anew(attempt)
            if anew is not None:
                self._begin_attempt(anew)
            else:  # its last endpoint went down meanwhile
                self._leave_endpoint()
                self._work.attempts.not_made(self._attempt)
                self._try_next()
        except GatewayError as error:
            self._leave_endpoint()
            self._fail(error)
        except Exception as error:
            self._fail_unforeseen(error)

    def shed(self, reason: str, retry_after: float) -> None:
        self._stop_waiting()
        self._gate = None
        self._work.refused = Refused(reason, retry_after)
        self._work.attempts.not_made(self._attempt)
        try:
            self._try_next()
        except GatewayError as error:
            self._fail(error)
        except Exception as error:
            self._fail_unforeseen(error)

    def _stop_waiting(self) -> Attempt:
        """Answers the attempt that it has waited with."""
        attempt, self._attempt, self._before = self._attempt, self._before, None
        self._is_waiting = False
        assert attempt is not None  # noqa: S101  (it waited with one)
        return attempt

    def _leave_gate(self, client: ClientCall | None) -> None:
        gate, self._gate = self._gate, None
        assert gate is not None  # noqa: S101  (it was asked)
        now = self._inference.clock()
        if client is not None:
            if client.code is OK:
                gate.answered(now - self._sent_at, now)
            elif self._was_full(client):
                gate.server_refused()
        gate.leave(now)

    def _was_full(self, client: ClientCall) -> bool:
        """Has the server refused it since its queue was full?"""
        if client.code not in _MAY_BE_FULL or self._attempt is None:
            return False
        model, id = self._attempt.variant.model, self.head.id
        return is_queue_full(judge(client.code, client.text, client.origin, model=model, id=id), client.text)

    # Merging, as `Mergeable`

    def _merged(self, attempt: Attempt) -> bool:
        """Leave the request to a merge point, if it is one that can be merged."""
        settings = self._inference.current.now.merges.get(self._work.route.model)
        if settings is None or self._work.sequence is not None:
            return False
        point = maybe_merge_point(self._work.route.model, attempt, settings, self.head.model_version)
        if point is None or not point.takes(self):
            return False
        self._point = point
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
    def upstream_id(self) -> str | None:
        return self._work.upstream_id

    def rides(self, requests: int, carrier: Metadata) -> None:
        self._observer.attempt_merged(AttemptMerged(requests, str(dict(carrier).get("traceparent", ""))))

    def send_alone(self, ended: Callable[[bool], None]) -> None:
        self.batch = None
        self._tell_alone = ended
        assert self._attempt is not None  # noqa: S101  (an attempt brought it to the merge point)
        self._send(self._attempt)

    def answered(self, body: bytes, head: Head, client: ClientCall, members: int) -> None:
        self._leave_endpoint(client)
        batch = NeverIndexed(b"gateway-batch", b"%d" % members)  # many values, of which each would take up table space
        try:
            self._inference.attempt_answered(self._work)
            self._reply(client, body, head, (batch,))
        except Exception as error:
            self._fail_unforeseen(error)

    def failed(self, client: ClientCall) -> None:
        self.batch = None
        self._leave_endpoint(client)
        try:
            self._upstream_failed(client)
        except GatewayError as error:
            self._fail(error)
        except Exception as error:
            self._fail_unforeseen(error)

    def broken(self) -> None:
        self.batch = None
        if self._client is not None:
            self._client.cancel()
        self._leave_endpoint()
        if not self.is_over:
            self._fail(Bug(BUG_TEXT))

    # Answer

    def _answer_front(self, client: ClientCall) -> None:
        """Enough of a large answer may be here to pass it on as it comes."""
        if self.is_over:
            return
        try:
            head = peek_front(client.body)
            if head is not None:
                self._begin_answer(client, head)
        except MalformedMessage as error:
            client.cancel(error.code, error.text, Origin.ANSWER)  # which tells `_upstream_done`
        except Exception as error:
            self._fail_unforeseen(error)  # first, or the call would end as one that was cancelled
            client.cancel()

    def _begin_answer(self, client: ClientCall, head: Head) -> None:
        self._end_timer()  # how long the rest takes is its reader's affair
        front = as_asked(self._work, client.body, head)
        self.served = self._who(head.model_version)[0]
        self._is_passed_on = True
        self._answered_bytes = len(front) + client.missing
        self._caller.pass_answer(client, front, _answer_fields(client.initial))

    def _upstream_done(self, client: ClientCall) -> None:
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
        except GatewayError as error:
            self._fail(error)
        except Exception as error:
            self._fail_unforeseen(error)

    def _take_answer(self, client: ClientCall) -> None:
        if self._is_passed_on:
            assert self.served is not None  # noqa: S101  (its front said who)
            self._inference.attempt_answered(self._work)
            self._caller.finish(self._trailing(client, self.served.model_version))
            self._end(OK, "")
            return
        body = client.body
        try:
            head = self._inference.answers.peek(body)
        except MalformedMessage as error:
            client.code, client.text, client.origin = error.code, error.text, Origin.ANSWER
            self._upstream_failed(client)
            return
        self._inference.attempt_answered(self._work)
        if self._point is not None:
            self._point.saw(self, body, head)
        self._reply(client, as_asked(self._work, body, head), head, ())

    def _reply(self, client: ClientCall, body: bytes, head: Head, more: Fields) -> None:
        self._answered_bytes = len(body)
        trailing = self._trailing(client, head.model_version)
        self._caller.reply(body, _answer_fields(client.initial), (*trailing, *more) if more else trailing)
        self._end(OK, "")

    def _trailing(self, client: ClientCall, model_version: str) -> Fields:
        """What an answer ends with; notes who gave it."""
        self.served, who = self._who(model_version)
        from_upstream, echo = _answer_fields(client.trailing), self._caller.metadata.echo
        return (*from_upstream, *who, *echo) if from_upstream or echo else who

    def _who(self, model_version: str) -> tuple[Served, Fields]:
        attempt = self._attempt
        assert attempt is not None  # noqa: S101  (something came of one)
        address = attempt.endpoint.address
        return _who(self._work.route.model, attempt.variant.name, model_version, address, attempt.number)

    def _upstream_failed(self, client: ClientCall) -> None:
        """Try elsewhere, if that may help and the request can be sent again.

        :raises GatewayError: if not.
        """
        failure = CallFailed(client.code, client.text, metadata_from(client.trailing), origin=client.origin)
        assert self._attempt is not None  # noqa: S101  (it is what failed)
        verdict, self._is_late = LATE if self._is_late else None, False
        self._inference.attempt_failed(self._work, self._attempt, failure, verdict)
        self._inference.learn_of_overload(self._work)
        if self._is_passed_on or not self._has_request():
            # Part of the answer is out, or part of the request is gone: it can't be sent again.
            raise self._inference.given_up(self._work)
        wait = pushback(client.trailing)
        if wait is None:  # who takes turns pauses until its turn comes
            wait = 0.0 if self._found_full() else wait_before(self._attempt.number + 1, self._inference.draw())
        deadline = self._caller.deadline
        if wait < 0.0 or (deadline is not None and wait > 0.0 and self._inference.clock() + wait >= deadline):
            raise self._inference.given_up(self._work)  # the server wants no other, or there is no time for one
        if wait > 0.0:
            self._pause = asyncio.get_running_loop().call_later(wait, self._go_on)
        else:
            self._try_next()

    def _has_request(self) -> bool:
        """Is all of it that has come still here?"""
        if not self._is_in_parts:
            return True
        more = self._caller.maybe_take_back()
        if more is None:
            return False
        self._rest += more
        return True

    def _go_on(self) -> None:
        """The pause before the next attempt is over."""
        self._pause = None
        try:
            self._try_next()
        except GatewayError as error:
            self._fail(error)
        except Exception as error:
            self._fail_unforeseen(error)

    # End

    def cancelled(self, code: Code) -> None:
        """The caller has gone, or its deadline has passed; it has its answer, or wants none."""
        if self.is_over:
            return
        self.is_over = True
        text = "the deadline passed" if code is Code.DEADLINE_EXCEEDED else "the caller went away"
        if self._pause is not None:
            self._pause.cancel()
            self._end(code, text)
            return
        if self._is_waiting:
            assert self._gate is not None  # noqa: S101  (it waits there)
            self._gate.abandon(self)
            self._gate = None
            self._stop_waiting()
            self._end(code, text)
            return
        self._end_timer()
        if self._client is not None:
            self._client.cancel()
        else:  # it waits at a merge point, or is part of a batch
            self._leave_endpoint()
            if self._point is not None and self.batch is not None:
                self._point.left(self.batch)
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

    def _fail_unforeseen(self, error: Exception) -> None:
        """Our own fault: this call ends, and no other."""
        _log.error("model %s: unforeseen failure", self.head.model_name, exc_info=error)
        self._leave_endpoint()
        if not self.is_over:
            self._fail(Bug(BUG_TEXT))

    def _end(self, code: Code, text: str, callers_fault: bool = False) -> None:
        self.is_over = True
        if self._is_in_parts:
            self._caller.drop_request()
        if self._is_reported:
            sizes = self._request_bytes, self._answered_bytes
            now = self._inference.clock()
            self._observer.ended(CallEnded(code, text, self.served, *sizes, now, callers_fault))


@lru_cache(256)
def _answer_fields(fields: Fields) -> Fields:
    """What of an upstream's headers or trailers the caller gets."""
    return tuple(field for field in fields if is_field_passed_on(field[0]))


@lru_cache(4096)
def _who(model: str, variant: str, version: str, endpoint: str, attempts: int) -> tuple[Served, Fields]:
    """Who answered, and how the caller is told. The fields may be kept in compression tables: no caller chose them."""
    served = Served(model, variant, version, endpoint, attempts)
    return served, tuple((name, value) for name, value in fields_from(served_trailers(served)))
