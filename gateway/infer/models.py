"""Every model that can be called, whoever answers it: a pipeline in this process, or a Triton behind `Inference`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from gateway.errors import BUG_TEXT, Bug, GatewayError
from gateway.hooks import CallEnded, CallObserver, CallStarted
from gateway.infer.exchange import Reply, Request
from gateway.infer.inference import Inference
from gateway.infer.metadata import echoed, first_values
from gateway.infer.streams import Caller, StreamLimits, StreamSession
from gateway.status import Code
from gateway.types import Facts
from gateway.wire.peek import Head, peek_request

_log = logging.getLogger(__name__)


class Models:
    """Where servicers take inference requests."""

    def __init__(self, inference: Inference) -> None:
        self.inference = inference

    async def infer(self, request: Request) -> Reply:
        """Answer one request and report how it went.

        :raises GatewayError: with the status that the caller gets.
        """
        with self.refusals(request, ""):
            head, facts = _peek(request)
        observer = self.inference.observe(request.method, head, facts, request.peer, request.body)
        code, text, reply, callers_fault = Code.INTERNAL, "", None, False
        try:
            reply = await self._answer(request, head, facts, observer)
        except asyncio.CancelledError:
            code, text = self._how_cancelled(request)
            raise
        except GatewayError as error:
            code, text, callers_fault = error.code, error.text, error.is_callers
            raise
        except Exception as error:
            _log.exception("model %s: unforeseen failure", head.model_name)
            text = BUG_TEXT
            raise Bug(text) from error
        else:
            code = Code.OK
            echo = echoed(facts.metadata)
            return replace(reply, trailing=(*reply.trailing, *echo)) if echo else reply
        finally:
            served, size = (reply.served, len(reply.body)) if reply else (None, 0)
            now = self.inference.clock()
            observer.ended(CallEnded(code, text, served, len(request.body), size, now, callers_fault))

    @contextmanager
    def refusals(self, opening: Request, model: str) -> Iterator[None]:
        """Report a GatewayError in the block as a call's end: for what comes before there is a request to `infer`."""
        try:
            yield
        except GatewayError as error:
            inference = self.inference
            known, at = inference.topology.is_known(model), inference.clock()
            facts = Facts(first_values(opening.metadata))
            observer = inference.hooks.call_started(
                CallStarted(opening.method, model, known, "", opening.peer, at, facts)
            )
            observer.ended(CallEnded(error.code, error.text, None, 0, 0, at, error.is_callers))
            raise

    async def call(self, request: Request, observer: CallObserver) -> Reply:
        """Answer a pipeline's call of a model, which reports to the pipeline's observer."""
        head, facts = _peek(request)
        return await self._answer(request, head, facts, observer)

    def stream(self, opening: Request, caller: Caller, limits: StreamLimits) -> StreamSession:
        """Begin a ModelStreamInfer. opening: its metadata, deadline and peer."""
        return StreamSession(self.inference, opening, caller, limits)

    async def _answer(self, request: Request, head: Head, facts: Facts, observer: CallObserver) -> Reply:
        pipeline = self.inference.topology.pipelines.get(head.model_name)
        if pipeline is not None:
            return await pipeline.infer(request, observer)
        return await self.inference.answer(request, head, facts, observer)

    def _how_cancelled(self, request: Request) -> tuple[Code, str]:
        """A caller whose deadline has passed goes away like one that lost interest."""
        if request.deadline and request.deadline.remaining(self.inference.clock()) <= 0:
            return Code.DEADLINE_EXCEEDED, "the deadline passed before an answer came"
        return Code.CANCELLED, "the caller went away"


def _peek(request: Request) -> tuple[Head, Facts]:
    """:raises GatewayError: if the body is no ModelInferRequest that can be read."""
    head = peek_request(request.body)
    return head, Facts(first_values(request.metadata), head.parameters if head.entries else {}, head.model_version)
