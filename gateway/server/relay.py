"""ModelInfer on the `wire` transport: the forwarded path, by callbacks on the event loop.

The same decisions as `Inference.answer`, with no task, no future and no context object per request. A message up to
`whole_bytes` is kept until it is answered, so that it can be sent again; a larger one is passed on as it arrives, as
is a large answer. What is not forwarded (pipelines) or not plain (compressed) becomes an ordinary request of `Models`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from gateway.bounded import make_room
from gateway.deadline import Deadline
from gateway.errors import BUG_TEXT, GatewayError, UpstreamFailed
from gateway.forward.channel import WireChannel
from gateway.hooks import AttemptEnded, AttemptMerged, CallEnded
from gateway.infer.attempts import Attempt
from gateway.infer.exchange import Request
from gateway.infer.inference import INFER, Decision, Work, as_asked, request_for
from gateway.infer.metadata import echoed, first_values, is_field_passed_on, passed_on, served_trailers
from gateway.infer.models import Models
from gateway.merge import Batch, Layout
from gateway.server.calls import CallLimits
from gateway.server.merging import MergePoint, merge_point
from gateway.status import OK, Code, Meaning
from gateway.types import Facts, Metadata, Served
from gateway.upstream.channel import ChannelConnection
from gateway.upstream.connection import CallFailed
from gateway.wire.client import ClientCall
from gateway.wire.codes import CallFailed as WireFailed
from gateway.wire.fields import Fields, fields_from, legal_fields, metadata_from, text_of
from gateway.wire.hpack import Field, NeverIndexed
from gateway.wire.messages import decompress
from gateway.wire.peek import (
    RAW_INPUT,
    RAW_OUTPUT,
    Head,
    KnownHeads,
    peek_front,
    peek_request,
    peek_response,
    rename_request,
    tail,
)
from gateway.wire.requests import RequestHead
from gateway.wire.server import ServerCall
from gateway.wire.stream import pipe

_log = logging.getLogger(__name__)

_PATH: Final = INFER.encode()
_CALLERS_FAULT: Final = (Code.INVALID_ARGUMENT, Code.INTERNAL, Code.UNKNOWN)
_DECISIONS_KEPT: Final = 1024  # callers choose what is decided about


class Relay:
    """Takes the calls of one server."""

    def __init__(self, models: Models, limits: CallLimits) -> None:
        self.inference = models.inference
        self._models = models
        self._limits = limits
        self._tasks: set[asyncio.Task[None]] = set()
        self._topology = models.inference.topology
        self._decisions: dict[tuple[_Said, int], Decision] = {}
        self.requests = KnownHeads(peek_request, RAW_INPUT)
        self.answers = KnownHeads(peek_response, RAW_OUTPUT)

    def handle(self, call: ServerCall) -> None:
        """A request is complete, or enough of a large one is here."""
        try:
            if call.missing > 0:
                head = None if call.compressed else peek_front(call.body)
                if head is None or head.model_name in self.inference.topology.pipelines:
                    return  # called again when there is more
            elif call.compressed:
                self._answer_alone(call, decompress(call.body, call.encoding, call.connection.limits))
                return
            else:
                head = self.requests.peek(call.body)
                if head.model_name in self.inference.topology.pipelines:
                    self._answer_alone(call, call.body)
                    return
            _Forwarding(self, call, head).begin()
        except GatewayError as error:
            call.fail(error.code, error.text)
        except WireFailed as failure:
            call.fail(failure.code, failure.text)

    def decision(self, said: _Said, head: Head) -> Decision:
        """What is decided for these two; made once for all requests that share them."""
        inference = self.inference
        if self._topology is not inference.topology:
            self._topology = inference.topology
            self._decisions.clear()
        decided = self._decisions.get((said, id(head)))
        if decided is None:
            decided = inference.decide(head, said.facts_with(head))
            if head.fronts is not None:  # else no other request will have this very one
                make_room(self._decisions, _DECISIONS_KEPT)
                self._decisions[said, id(head)] = decided  # which holds the head, so its id stays its own
        return decided

    def deadline_of(self, call: ServerCall) -> float | None:
        """When a call must have ended, on the event loop's clock."""
        limits, deadline = self._limits, call.deadline
        if limits.default_deadline is None and limits.longest_deadline is None:
            return deadline
        now = call.connection.now
        if deadline is None and limits.default_deadline is not None:
            deadline = now + limits.default_deadline
        if limits.longest_deadline is not None:
            longest = now + limits.longest_deadline
            deadline = longest if deadline is None else min(deadline, longest)
        return deadline

    def _answer_alone(self, call: ServerCall, body: bytes) -> None:
        """Answer by `Models`, in a task."""
        deadline = self.deadline_of(call)
        request = Request(
            body, metadata_from(call.head.fields), Deadline(deadline) if deadline is not None else None, call.peer
        )
        task = asyncio.ensure_future(self._infer(call, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def cancelled(code: Code) -> None:
            task.cancel()

        call.on_cancel = cancelled

    async def _infer(self, call: ServerCall, request: Request) -> None:
        call.server.hold()
        try:
            reply = await self._models.infer(request)
            call.reply(reply.body, fields_from(reply.initial), fields_from(reply.trailing))
        except GatewayError as error:
            trailing = error.trailers if isinstance(error, UpstreamFailed) else ()
            echo = echoed(first_values(request.metadata))
            call.fail(error.code, error.text, fields_from([*trailing, *echo]))
        except Exception:
            _log.exception("unforeseen failure in ModelInfer")
            call.fail(Code.INTERNAL, BUG_TEXT)
        finally:
            call.server.release()


class _Forwarding:
    """One forwarded request, from its arrival to its end."""

    layout: Layout
    spans: Sequence[tuple[int, int]]
    batch: Batch[Any] | None = None  # of members that a merge point knows by their Protocol
    added: Metadata = ()  # by telemetry, for upstream
    is_over = False
    _point: MergePoint | None = None  # where it was left, if it was
    _work: Work
    _attempt: Attempt
    _client: ClientCall | None = None
    _fields: Fields  # the caller's, with those that telemetry adds for this attempt
    _served: Served | None = None
    _answered_bytes = 0
    _tell_alone: Callable[[bool], None] | None = None

    def __init__(self, relay: Relay, call: ServerCall, head: Head) -> None:
        self._relay = relay
        self._inference = relay.inference
        self._call = call
        self._said = _said(call.head)
        self.body = call.body
        self.head = head
        self.caller: Hashable = call.server.number

    # Request

    def begin(self) -> None:
        call, inference, said, body = self._call, self._inference, self._said, self.body
        self._deadline = self._relay.deadline_of(call)
        self._request_bytes = len(body)
        if call.missing > 0:
            self._request_bytes += call.missing
            body = b""
        decided = self._relay.decision(said, self.head)
        observer = inference.report("ModelInfer", decided, call.peer, body)
        try:
            self._work = inference.begin(decided, observer)
        except GatewayError as error:
            call.fail(error.code, error.text, said.echo)
            observer.ended(CallEnded(error.code, error.text, None, self._request_bytes, 0, inference.clock()))
            return
        call.on_cancel = self._cancelled
        self._try_next()

    def _try_next(self) -> None:
        """Send the request to the next endpoint; the end of the call if there is none."""
        work, inference = self._work, self._inference
        attempt = work.attempts.maybe_next()
        if attempt is None:
            self._fail(inference.given_up(work))
            return
        self._attempt = attempt
        self._client = None
        added = self.added = inference.attempt_started(work, attempt)
        self._fields = (*self._said.passed, *fields_from(added)) if added else self._said.passed
        attempt.endpoint.begin()
        if self._call.missing > 0:
            self._send_front(self._new_client(attempt), attempt)
        elif not self._merged(attempt):
            self._send(attempt)

    def _new_client(self, attempt: Attempt) -> ClientCall:
        client = _channel_of(attempt).call(_PATH, self._fields, self._deadline)
        client.on_done = self._upstream_done
        client.on_front = self._answer_front
        self._client = client
        return client

    def _send(self, attempt: Attempt) -> None:
        """Send a request that is here whole."""
        client = self._new_client(attempt)
        client.request = request_for(attempt.variant, self.body, self.head, id=self._work.upstream_id)
        _channel_of(attempt).submit(client)

    def _send_front(self, client: ClientCall, attempt: Attempt) -> None:
        """Send what is here of a large request, and let the rest follow as it comes.

        Its last bytes name the model once more: see `peek_front`.
        """
        call, head, variant = self._call, self.head, attempt.variant
        version = variant.version or head.model_version
        ending = tail(variant.model, version)
        client.request = rename_request(
            call.body, head, model_name=variant.model, model_version=version, id=self._work.upstream_id
        )
        client.request_more = call.missing + len(ending)

        def complete(_: ServerCall) -> None:
            client.send_chunk(ending)
            client.half_close()

        call.on_request = complete
        pipe(call, client)
        _channel_of(attempt).submit(client)

    # Merging, as `Mergeable`

    def _merged(self, attempt: Attempt) -> bool:
        """Leave the request to a merge point, if it is one that can be merged."""
        settings = self._inference.topology.merges.get(self._work.route.model)
        if settings is None or self._work.sequence is not None:
            return False
        point = merge_point(self._work.route.model, attempt, _channel_of(attempt), settings)
        found = point.maybe_layout(self.body, self.head, self.caller)
        if found is None:
            return False
        self.layout, self.spans = found
        self._point = point
        point.submit(self)
        return True

    @property
    def upstream_id(self) -> str | None:
        return self._work.upstream_id

    def rides(self, requests: int, carrier: Metadata) -> None:
        self._work.observer.attempt_merged(AttemptMerged(requests, str(dict(carrier).get("traceparent", ""))))

    def send_alone(self, ended: Callable[[bool], None]) -> None:
        self.batch = None
        self._tell_alone = ended
        self._send(self._attempt)

    def answered(self, body: bytes, head: Head, client: ClientCall, members: int) -> None:
        self._attempt.endpoint.end()
        self._answered_bytes = len(body)
        batch = NeverIndexed(b"gateway-batch", b"%d" % members)  # many values, of which each would take up table space
        trailing = self._trailing(client, head.model_version)
        self._call.reply(body, _answer_fields(client.initial), (*trailing, batch))
        self._inference.attempt_answered(self._work)
        self._end(OK, "")

    def failed(self, client: ClientCall) -> None:
        self.batch = None
        self._attempt.endpoint.end()
        self._upstream_failed(client)

    # Answer

    def _answer_front(self, client: ClientCall) -> None:
        """Enough of a large answer may be here to pass it on as it comes."""
        if client.compressed:
            return  # collected whole, since its name must be read
        head = peek_front(client.body)
        if head is None or self.is_over:
            return
        front = as_asked(self._work, client.body, head)
        self._served, _ = self._who(head.model_version)
        call = self._call
        self._answered_bytes = len(front) + client.missing
        call.send_headers(_answer_fields(client.initial))
        call.send_front(front, client.missing)
        pipe(client, call)

    def _upstream_done(self, client: ClientCall) -> None:
        self._attempt.endpoint.end()
        if self._tell_alone is not None:
            tell, self._tell_alone = self._tell_alone, None
            tell(client.code in _CALLERS_FAULT)
        if self.is_over:
            return
        if client.code is not OK:
            self._upstream_failed(client)
            return
        try:
            if self._served is None:
                self._reply(client)
            else:
                self._call.finish(OK, "", self._trailing(client, self._served.model_version))
        except (GatewayError, WireFailed) as error:
            self._inference.attempt_answered(self._work)
            self._end(error.code, str(error))
            self._call.fail(error.code, str(error))
            return
        self._inference.attempt_answered(self._work)
        self._end(OK, "")

    def _reply(self, client: ClientCall) -> None:
        body = client.body
        if client.compressed:
            body = decompress(body, client.encoding, client.connection.limits)
        head = self._relay.answers.peek(body)
        body = as_asked(self._work, body, head)
        self._answered_bytes = len(body)
        self._call.reply(body, _answer_fields(client.initial), self._trailing(client, head.model_version))

    def _trailing(self, client: ClientCall, model_version: str) -> Fields:
        """What an answer ends with; notes who gave it."""
        self._served, who = self._who(model_version)
        from_upstream, echo = _answer_fields(client.trailing), self._said.echo
        return (*from_upstream, *who, *echo) if from_upstream or echo else who

    def _who(self, model_version: str) -> tuple[Served, Fields]:
        attempt = self._attempt
        address = attempt.endpoint.address
        return _who(self._work.route.model, attempt.variant.name, model_version, address, attempt.number)

    def _upstream_failed(self, client: ClientCall) -> None:
        trailing = metadata_from(client.trailing)
        failure = CallFailed(client.code, client.text, trailing, origin=client.origin)
        call = self._call
        try:
            self._inference.attempt_failed(self._work, self._attempt, failure)
        except UpstreamFailed as error:
            self._fail(error)
            return
        if self._served is not None or call.missing > 0 or client.request_more:
            # Part of the answer is out, or part of the request is gone: it can't be sent again.
            self._fail(self._inference.given_up(self._work))
            return
        self._try_next()

    # End

    def _cancelled(self, code: Code) -> None:
        """The caller has gone, or its deadline has passed."""
        if self.is_over:
            return
        text = "the deadline passed" if code is Code.DEADLINE_EXCEEDED else "the caller went away"
        ended = AttemptEnded(code, text, Meaning.ENDED, self._inference.clock())
        self._work.observer.attempt_ended(ended)
        self._end(code, text)
        if self._client is not None:
            self._client.cancel()
            return
        self._attempt.endpoint.end()  # it waits at a merge point, or is part of a batch
        if self._point is not None and self.batch is not None:
            self._point.left(self.batch)

    def _fail(self, error: GatewayError) -> None:
        self._end(error.code, error.text)
        trailing = self._said.echo
        if isinstance(error, UpstreamFailed):
            trailing = (*legal_fields(passed_on(error.trailers)), *trailing)
        self._call.fail(error.code, error.text, trailing)

    def _end(self, code: Code, text: str) -> None:
        self.is_over = True
        self._call.on_cancel = None
        now = self._inference.clock()
        self._work.observer.ended(CallEnded(code, text, self._served, self._request_bytes, self._answered_bytes, now))


def _channel_of(attempt: Attempt) -> WireChannel:
    """On this transport every connection is one of these."""
    connection: ChannelConnection = attempt.endpoint.connection  # type: ignore[assignment]
    return connection.channel


@dataclass(frozen=True, slots=True, eq=False)
class _Said:
    """What the header list of a request says to us; requests with the same list share it."""

    metadata: dict[str, str]  # as `Facts` has it
    passed: Fields  # that go upstream, in no compression table
    echo: Fields  # that its answer repeats

    def facts_with(self, head: Head) -> Facts:
        return Facts(self.metadata, head.parameters if head.entries else {}, head.model_version)


def _said(head: RequestHead) -> _Said:
    said: _Said | None = head.made
    if said is None:
        said = head.made = _read(head.fields)
    return said


def _read(fields: Fields) -> _Said:
    """What `first_values` and `passed_on` give, of fields."""
    metadata: dict[str, str] = {}
    passed: list[Field] = []
    for name, value in fields:
        if is_field_passed_on(name):
            passed.append(NeverIndexed(name, value))
        key = name.decode()
        if key not in metadata and not key.endswith("-bin"):
            metadata[key] = text_of(value).strip()
    return _Said(metadata, tuple(passed), tuple(fields_from(echoed(metadata))))


@lru_cache(256)
def _answer_fields(fields: Fields) -> Fields:
    """What of an upstream's headers or trailers the caller gets."""
    return tuple(field for field in fields if is_field_passed_on(field[0]))


@lru_cache(4096)
def _who(model: str, variant: str, version: str, endpoint: str, attempts: int) -> tuple[Served, Fields]:
    """Who answered, and how the caller is told. The fields may be kept in compression tables: no caller chose them."""
    served = Served(model, variant, version, endpoint, attempts)
    return served, tuple((name, value) for name, value in fields_from(served_trailers(served)))
