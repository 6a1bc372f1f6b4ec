"""Every model that can be called: a pipeline in this process answers it, or Triton by way of a `Call`.

Servicers and pipelines await inference requests here. ModelInfer calls on the wire reach `Call` by `api.relay`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from gateway.errors import BUG_TEXT, Bug, DeadlineExceeded, GatewayError
from gateway.forwarding.call import Call
from gateway.forwarding.caller import Caller
from gateway.forwarding.exchange import Reply, Request
from gateway.forwarding.inference import Inference
from gateway.forwarding.pipelines import PipelineModel
from gateway.forwarding.streams import Caller as StreamCaller
from gateway.forwarding.streams import StreamLimits, StreamSession
from gateway.hooks import CallEnded, CallObserver
from gateway.quotas import Quota
from gateway.rpc.budget import Budget
from gateway.rpc.metadata import Fields, metadata_from
from gateway.status import Code
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.placed import Held
from gateway.v2.peek import Head

_log = logging.getLogger(__name__)

_TOO_LATE = "The deadline passed before an answer came."


class Models:
    """Answers inference requests for every model."""

    def __init__(self, inference: Inference) -> None:
        self.inference = inference

    async def infer(self, request: Request, head: Head | None = None) -> Reply:
        """Answer one request and report it as a call. head: of its body, if that has been read already.

        :raises GatewayError: with the status that the caller gets.
        """
        with self.refusals(request, ""):
            self.inference.gates.check_shed(request.metadata.values)
            head = head or self.inference.requests.peek(request.body)
        pipeline = self.inference.current.seen_by(request.metadata.access).pipelines.get(head.model_name)
        if pipeline is not None:
            return await self._run(pipeline, request, head)
        return await self._call(request, head, None)

    async def call(self, request: Request, observer: CallObserver) -> Reply:
        """Answer a pipeline's call of a model. Its attempts and steps are reported to the pipeline's observer."""
        head = self.inference.requests.peek(request.body)
        pipeline = self.inference.topology.pipelines.get(head.model_name)
        if pipeline is not None:
            whole = request if request.raw is None else replace(request, body=request.whole(), raw=None)
            return await pipeline.infer(whole, observer)
        return await self._call(request, head, observer)

    def maybe_hold(self, model: str, size: int) -> Held | None:
        """Memory that is shared with whoever will get a pipeline's call of a model, if there is one endpoint only."""
        topology = self.inference.topology
        route = topology.routes.lookup(model)
        if route is None or model in topology.pipelines or model in topology.merges:
            return None
        only: Endpoint | None = None
        for upstream in {variant.upstream for variant in route.variants}:
            pool = topology.pools.get(upstream)
            for endpoint in pool.endpoints if pool is not None else ():
                if only is not None:
                    return None
                only = endpoint
        return None if only is None or only.memory is None else only.memory.maybe_hold(size)

    def stream(self, opening: Request, caller: StreamCaller, limits: StreamLimits, budget: Budget) -> StreamSession:
        """Begin a ModelStreamInfer. Arguments as of `StreamSession`."""
        return StreamSession(self.inference, opening, caller, limits, budget)

    @contextmanager
    def refusals(self, opening: Request, model: str) -> Iterator[None]:
        """Report a GatewayError in the block as a refused call: for errors before there is a `Call`."""
        try:
            yield
        except GatewayError as error:
            self.inference.refuse(opening.method, opening.metadata, opening.peer, error, model)
            raise

    async def _call(self, request: Request, head: Head, observer: CallObserver | None) -> Reply:
        caller = AwaitingCaller(request)
        call = Call(self.inference, caller, request.method, request.body, head, raw=request.raw)
        caller.start(call, observer)
        try:
            return await caller.pending()
        except asyncio.CancelledError:
            call.cancelled(Code.CANCELLED)
            raise
        finally:
            caller.close()

    async def _run(self, pipeline: PipelineModel, request: Request, head: Head) -> Reply:
        """Have a pipeline answer, and report that as one call."""
        inference = self.inference
        metadata = request.metadata
        quota: Quota | None = None
        with self.refusals(request, head.model_name):
            decision = inference.decision(metadata, head, request.body)
            if inference.quotas.is_on:
                quota = inference.enter_quota(metadata, head, request.body, len(request.body), metadata.access)
        observer = inference.report(request.method, decision, request.peer, request.body)
        code, text, reply, callers_fault = Code.INTERNAL, BUG_TEXT, None, False
        try:
            reply = await pipeline.infer(request, observer)
        except asyncio.CancelledError:
            code, text = self._how_cancelled(request)
            raise
        except GatewayError as error:
            code, text, callers_fault = error.code, error.text, error.is_callers
            raise
        except Exception as error:
            _log.exception("model %s: unforeseen failure", head.model_name)
            raise Bug(BUG_TEXT) from error
        else:
            code, text = Code.OK, ""
            return replace(reply, trailing=(*reply.trailing, *metadata_from(metadata.echo)))
        finally:
            served, size = (reply.served, len(reply.body)) if reply else (None, 0)
            if quota is not None:
                quota.leave(size, inference.clock())
            observer.ended(CallEnded(code, text, served, len(request.body), size, inference.clock(), callers_fault))

    def _how_cancelled(self, request: Request) -> tuple[Code, str]:
        """The status of a cancelled call: a caller whose deadline has passed cancels like one that lost interest."""
        if request.deadline and request.deadline.remaining(self.inference.clock()) <= 0:
            return Code.DEADLINE_EXCEEDED, "the deadline passed before an answer came"
        return Code.CANCELLED, "the caller went away"


class AwaitingCaller(Caller):
    """A coroutine in this process, which awaits `pending`."""

    def __init__(self, request: Request) -> None:
        loop = asyncio.get_running_loop()
        self.metadata = request.metadata
        self.peer = request.peer
        self.deadline = request.deadline.at if request.deadline is not None else None
        self.number = request.peer
        self._answer: asyncio.Future[Reply] | None = loop.create_future()
        self._call: Call | None = None
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    def start(self, call: Call, observer: CallObserver | None) -> None:
        self._call = call
        if self.deadline is not None:
            self._timer = self._loop.call_at(self.deadline, self._expire)
        call.begin(observer)

    def pending(self) -> asyncio.Future[Reply]:
        """The answer, or its error, once it is there."""
        assert self._answer is not None  # noqa: S101  (nobody asks after `close`)
        return self._answer

    def close(self) -> None:
        """Nothing is awaited any more. Caller, call and answer let go of each other, so that a request's bytes are
        freed now, and not when Python next looks for cycles: that may be after hundreds of megabytes."""
        if self._timer is not None:
            self._timer.cancel()
        self._call = self._timer = self._answer = None

    def _expire(self) -> None:
        call = self._call
        if call is not None and not call.is_over:
            call.cancelled(Code.DEADLINE_EXCEEDED)
            self._settle(None, DeadlineExceeded(_TOO_LATE))

    def reply(self, body: bytes, initial: Fields, trailing: Fields) -> None:
        if self._answer is None:
            return
        call = self._call
        assert call is not None and call.served is not None  # noqa: S101, PT018  (an answer says who gave it)
        self._settle(Reply(body, metadata_from(initial), metadata_from(trailing), call.served), None)

    def fail(self, error: GatewayError, trailing: Fields) -> None:
        self._settle(None, error)  # the servicer makes the trailers from the error

    def _settle(self, reply: Reply | None, error: GatewayError | None) -> None:
        answer = self._answer
        if answer is None or answer.done():
            return
        if reply is not None:
            answer.set_result(reply)
        elif error is not None:
            answer.set_exception(error)
