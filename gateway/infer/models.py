"""Every model that can be called, whoever answers it: a pipeline in this process, or a Triton behind `Inference`."""

from __future__ import annotations

import asyncio
import logging

from gateway.errors import Bug, GatewayError
from gateway.hooks import CallEnded, CallObserver
from gateway.infer.exchange import Reply, Request
from gateway.infer.inference import Inference
from gateway.infer.metadata import first_values
from gateway.infer.streams import StreamLimits, StreamSession, Write
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
        head = peek_request(request.body)
        facts = Facts(first_values(request.metadata), head.parameters if head.entries else {}, head.model_version)
        observer = self.inference.observe(request.method, head, facts, request.peer)
        code, text, reply = Code.INTERNAL, "", None
        try:
            reply = await self._answer(request, head, facts, observer)
        except asyncio.CancelledError:
            code, text = self._how_cancelled(request)
            raise
        except GatewayError as error:
            code, text = error.code, error.text
            raise
        except Exception as error:
            _log.exception("model %s: unforeseen failure", head.model_name)
            text = "The gateway failed unexpectedly; its log has the details."
            raise Bug(text) from error
        else:
            code = Code.OK
            return reply
        finally:
            served, size = (reply.served, len(reply.body)) if reply else (None, 0)
            observer.ended(CallEnded(code, text, served, len(request.body), size, self.inference.clock()))

    async def call(self, request: Request, observer: CallObserver) -> Reply:
        """Answer a pipeline's call of a model, which reports to the pipeline's observer."""
        head = peek_request(request.body)
        facts = Facts(first_values(request.metadata), head.parameters if head.entries else {}, head.model_version)
        return await self._answer(request, head, facts, observer)

    def stream(self, opening: Request, write: Write, limits: StreamLimits) -> StreamSession:
        """Begin a ModelStreamInfer. opening: its metadata, deadline and peer."""
        return StreamSession(self.inference, opening, write, limits)

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
