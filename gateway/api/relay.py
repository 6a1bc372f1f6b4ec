"""Passes ModelInfer calls from the wire to `forwarding.Call` as bytes, without a task, future or context per request.

A request for a pipeline goes to `Models`, in a task.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from gateway.access.door import Access
from gateway.api.calls import CallLimits, error_trailing
from gateway.deadline import Deadline
from gateway.errors import BUG_TEXT, Bug, GatewayError, QuotaExceeded
from gateway.forwarding.call import Call
from gateway.forwarding.caller import CallerMetadata, PartsCaller, metadata_of
from gateway.forwarding.exchange import Request
from gateway.forwarding.models import Models
from gateway.forwarding.retry_info import pushback_fields, quota_answer, quota_fields
from gateway.forwarding.topology import CurrentTopology
from gateway.rpc.client import ClientCall
from gateway.rpc.metadata import Fields, fields_from, legal_fields
from gateway.rpc.places import lay, pipe
from gateway.rpc.server import ServerCall
from gateway.status import Code
from gateway.upstream.placed import Placed
from gateway.v2.peek import Head, peek_front

_log = logging.getLogger(__name__)

METHOD: Final = "ModelInfer"


class Relay:
    """Takes the ModelInfer calls of one server."""

    def __init__(self, models: Models, topology: CurrentTopology, limits: CallLimits) -> None:
        self._inference = models.inference
        self._topology = topology
        self._models = models
        self._limits = limits
        self._limits_time = limits.default_deadline is not None or limits.longest_deadline is not None
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self, call: ServerCall) -> None:
        """Begin a call whose request is complete, or large and here in part."""
        inference = self._inference
        try:
            if inference.gates.is_shedding:
                inference.gates.check_shed(metadata_of(call.head).values)
            body, access = call.body, call.head.access
            if call.missing > 0:
                head = peek_front(body)
                if head is None or self._wants_whole(head.model_name, access):
                    return  # this is called again when more has arrived
            else:
                head = inference.requests.peek(body)
                if head.model_name in self._topology.seen_by(access).pipelines:
                    self._answer_in_task(call, body, head)
                    return
        except GatewayError as error:
            self._refuse(call, error)
        except Exception as error:
            _log.error("unforeseen failure in %s", METHOD, exc_info=error)
            self._refuse(call, Bug(BUG_TEXT))
        else:
            deadline = self.deadline_of(call)
            if deadline is not None and deadline != call.deadline:
                call.limit(deadline)  # also while it waits for others that it is merged or shared with
            caller = WireCaller(call, deadline)
            asked = Call(inference, caller, METHOD, body, head, max(0, call.missing))
            call.on_cancel = asked.cancelled
            asked.begin()

    def _wants_whole(self, model: str, access: Access | None) -> bool:
        """Is a request of this model needed whole: to be checked, computed with, compared with others, or sent without
        delay?

        A server that takes few calls at once must not wait for a slow caller's request while others wait for it.
        """
        topology, inference = self._topology.seen_by(access), self._inference
        if access is not None:
            if not topology.can_be_called(model):
                return False  # whatever it is to others
            if not access.scope.allows_all:
                return True  # what its caller may not send can be anywhere in it
        if model in topology.pipelines or model in inference.shares.table or model in inference.shadows.table:
            return True
        limited = inference.gates.table
        route = topology.routes.lookup(model) if limited else None
        return route is not None and any((each.upstream, each.model) in limited for each in route.variants)

    def _refuse(self, call: ServerCall, error: GatewayError) -> None:
        """End a call whose request can't be read, or is not to begin now, and report it like any other."""
        metadata = metadata_of(call.head)
        self._inference.refuse(METHOD, metadata, call.peer, error)
        call.fail(error.code, error.text, _trailing(error, metadata))

    def deadline_of(self, call: ServerCall) -> float | None:
        """When a call must end, on the event loop's clock; None: no limit."""
        deadline = call.deadline
        if not self._limits_time:
            return deadline
        now = call.connection.now
        seconds = self._limits.apply(None if deadline is None else deadline - now)
        return None if seconds is None else now + seconds

    def _answer_in_task(self, call: ServerCall, body: bytes, head: Head) -> None:
        deadline = self.deadline_of(call)
        metadata = metadata_of(call.head)
        request = Request(body, metadata, Deadline(deadline) if deadline is not None else None, call.peer, METHOD)
        task = asyncio.ensure_future(self._infer(call, request, head))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def cancelled(code: Code) -> None:
            task.cancel()

        call.on_cancel = cancelled

    async def _infer(self, call: ServerCall, request: Request, head: Head) -> None:
        call.server.hold()
        try:
            reply = await self._models.infer(request, head)
            call.reply(reply.body, fields_from(reply.initial), fields_from(reply.trailing))
        except GatewayError as error:
            call.fail(error.code, error.text, _trailing(error, request.metadata))
        except Exception:
            _log.exception("unforeseen failure in %s", METHOD)
            call.fail(Code.INTERNAL, BUG_TEXT)
        finally:
            call.server.release()


def _trailing(error: GatewayError, metadata: CallerMetadata) -> Fields:
    return (*legal_fields(error_trailing(error, metadata.values)), *pushback_fields(error))


def _keep(_: ServerCall) -> None:
    """Ignore that more of a request has arrived: the call collects it when it needs it."""


class WireCaller(PartsCaller):
    """A call on the wire."""

    def __init__(self, call: ServerCall, deadline: float | None) -> None:
        self._call = call
        self.metadata = metadata_of(call.head)
        self.peer = call.server.peer
        self.deadline = deadline
        self.number = call.server.number
        # What was passed on and not taken back; None: it could not be kept.
        self._copy: list[bytes | memoryview] | None = []
        self._copied = 0  # bytes of the copy, counted in the connection's budget

    @property
    def missing(self) -> int:
        return max(0, self._call.missing)

    def reply(self, body: bytes, initial: Fields, trailing: Fields) -> None:
        self._call.reply(body, initial, trailing)

    def fail(self, error: GatewayError, trailing: Fields) -> None:
        self._call.fail(error.code, error.text, trailing)

    def refuse(self, error: QuotaExceeded) -> None:
        if self.metadata.echo:
            self.fail(error, (*quota_fields(error), *self.metadata.echo))
        else:
            self._call.refuse(quota_answer(error))

    def collect_request(self) -> None:
        self._call.on_request = _keep

    def request_so_far(self) -> bytes:
        return self._call.collected()

    def pass_request(self, upstream: ClientCall, ending: bytes) -> None:
        def complete(_: ServerCall) -> None:
            upstream.send_chunk(ending)
            upstream.half_close()

        self._call.on_request = complete
        pipe(self._call, upstream, self._keep)

    def lay_request(self, placed: Placed, whole: Callable[[], None]) -> None:
        def complete(_: ServerCall) -> None:
            whole()

        self._call.on_request = complete
        lay(self._call, placed)

    def _keep(self, data: bytes | memoryview) -> None:
        """Keep data in case it must be sent again, as long as the budget has room: the call can do without the copy."""
        copy, budget = self._copy, self._call.connection.budget
        if copy is None or self._call.done:
            return
        if not budget.may_keep:
            self._drop_copy()
            return
        budget.keep(len(data))
        self._copied += len(data)
        copy.append(data)

    def may_keep(self) -> bool:
        return self._call.connection.budget.may_keep

    def keep_request(self, size: int) -> None:
        self._call.connection.budget.keep(size)
        self._copied += size

    def reply_in_pieces(
        self, pieces: Sequence[bytes | memoryview], size: int, initial: Fields, trailing: Fields
    ) -> None:
        call = self._call
        call.keep_until_closed(size)
        call.send_headers(initial)
        front, *rest = pieces
        call.send_front(front, size - len(front))
        for piece in rest:
            call.send_chunk(piece)
        call.finish(Code.OK, "", trailing)

    def drop_request(self) -> None:
        if self._copied:
            self._drop_copy()

    def _drop_copy(self) -> None:
        self._call.connection.budget.keep(-self._copied)
        self._copied = 0
        self._copy = None

    def maybe_take_back(self) -> bytes | None:
        copy = self._copy
        if copy is None:
            return None
        self._copy = []
        return b"".join(copy)

    def pass_answer(self, upstream: ClientCall, front: bytes, initial: Fields) -> None:
        call = self._call
        call.send_headers(initial)
        call.send_front(front, upstream.missing)
        pipe(upstream, call)

    def finish(self, trailing: Fields) -> None:
        self._call.finish(Code.OK, "", trailing)
