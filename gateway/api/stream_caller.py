"""Callers of ModelStreamInfer on the wire: each has a `StreamSession`, and the two work by callbacks."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from gateway.api.calls import error_trailing
from gateway.deadline import Deadline
from gateway.errors import BUG_TEXT, GatewayError, UpstreamFailed
from gateway.forwarding.caller import metadata_of
from gateway.forwarding.exchange import Request
from gateway.forwarding.metadata import passed_on
from gateway.forwarding.models import Models
from gateway.forwarding.retry_info import pushback_fields
from gateway.forwarding.streams import StreamLimits, StreamSession
from gateway.rpc.framing import PREFIX
from gateway.rpc.metadata import Fields, legal_fields
from gateway.rpc.server import ServerCall
from gateway.status import Code

_log = logging.getLogger(__name__)

_MESSAGES_PER_UNIT: Final = 8  # open messages whose cancelling costs one unit of `rpc.connection.TURN`

METHOD: Final = "ModelStreamInfer"


class StreamRelay:
    """Takes the ModelStreamInfer calls of one server."""

    def __init__(self, models: Models, limits: StreamLimits) -> None:
        self._models = models
        self._limits = limits

    def handle(self, call: ServerCall) -> None:
        """Begin a stream whose header list has arrived."""
        inference = self._models.inference
        if inference.gates.is_shedding:
            metadata = metadata_of(call.head)
            try:
                inference.gates.check_shed(metadata.values)
            except GatewayError as error:
                inference.refuse(METHOD, metadata, call.peer, error)
                trailing = legal_fields(error_trailing(error, metadata.values))
                call.fail(error.code, error.text, (*trailing, *pushback_fields(error)))
                return
        _WireCaller(self._models, call, self._limits)


class _WireCaller:
    """Connects one call on the wire with its session."""

    __slots__ = ("_begun", "_call", "_limit", "_opening", "_session", "_unsent")

    def __init__(self, models: Models, call: ServerCall, limits: StreamLimits) -> None:
        deadline = Deadline(call.deadline) if call.deadline is not None else None
        self._opening = Request(b"", metadata_of(call.head), deadline, call.peer, METHOD)
        self._call = call
        self._begun = False
        self._limit = call.connection.limits.unsent_bytes
        self._unsent = 0  # upper bound of the bytes that wait to be sent; `call.unsent` is exact and asked rarely
        self._session: StreamSession = models.stream(self._opening, self, limits, call.connection.budget)
        call.on_message = self._message_arrived
        call.on_request = self._half_closed
        call.on_cancel = self._cancelled

    # The call's side

    def _message_arrived(self, body: bytes, compressed: bool) -> None:
        self._call.hungry = self._session.take(body)

    def _half_closed(self, call: ServerCall) -> None:
        self._session.end_of_requests()

    def _cancelled(self, code: Code) -> None:
        tasks = list(self._session.tasks)
        self._call.server.turn_left -= self._session.open_messages // _MESSAGES_PER_UNIT
        self._session.cancel()
        if tasks:  # the work of pipelines goes on after the call: count it against the connection's limit
            connection = self._call.server
            connection.hold()
            asyncio.gather(*tasks, return_exceptions=True).add_done_callback(lambda _: connection.release())

    # The session's side

    def send(self, body: bytes) -> bool:
        call = self._call
        if not self._begun:
            self._begun = True
            call.send_headers()
        call.send_message(body)
        self._unsent += len(body) + PREFIX
        if self._unsent <= self._limit:
            return True
        self._unsent = call.unsent
        if self._unsent <= self._limit:
            return True
        call.when_writable(self._session.caller_has_room)
        return False

    def feed(self) -> None:
        self._call.feed()

    def finish(self, error: Exception | None) -> None:
        call = self._call
        call.on_cancel = None
        if error is None:
            call.finish(Code.OK, "", legal_fields(self._session.trailing_metadata()))
        elif isinstance(error, GatewayError):
            call.fail(error.code, error.text, self._trailers_of(error))
        else:
            _log.error("unforeseen failure in %s", METHOD, exc_info=error)
            call.fail(Code.INTERNAL, BUG_TEXT)

    def _trailers_of(self, error: GatewayError) -> Fields:
        trailing = passed_on(error.trailers) if isinstance(error, UpstreamFailed) else []
        return legal_fields([*trailing, *self._session.trailing_metadata()])
