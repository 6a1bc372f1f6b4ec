"""I/O: whether a model of an endpoint really infers. A server with a broken CUDA context says that all is well.

What one inference found holds until the next one. Before the first one has gone well nobody is sent there, and likewise
after the server was down or the model was not ready: it may have been started again, or be as broken as before.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tritonclient.grpc import service_pb2 as pb

from gateway.status import Code, Meaning, classify
from gateway.upstream.ask import Asker, ask
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint, ModelKey
from gateway.v2.layout import SIZES

_log = logging.getLogger(__name__)

SLOW_TO_FAIL: Final = 2  # inferences in a row without an answer in time; as for health, one may be chance
_SAYS_NOTHING: Final = frozenset({Meaning.OVERLOADED, Meaning.ENDED})  # it has much to do, which is not being broken


@dataclass(frozen=True, slots=True)
class ProbeInference:
    """What to infer, and how often and how patiently. Seconds."""

    request: bytes = b""  # a ModelInferRequest; empty: zeros, by the model's metadata
    interval: float = 10.0
    timeout: float = 5.0


class InferenceProbe:
    """Of one model on one endpoint."""

    def __init__(
        self, endpoint: Endpoint, model: ModelKey, settings: ProbeInference, ended: Callable[[], None]
    ) -> None:
        """ended: called after each inference."""
        self.settings = settings
        self.is_well = False
        self.has_ended = False  # has there been one yet?
        self.reason = "no probe inference yet"
        self._endpoint = endpoint
        self._model = model
        self._ended = ended
        self._due = 0.0  # on the event loop's clock
        self._slow = 0
        self._task: asyncio.Task[None] | None = None

    def look(self, is_ready: bool) -> bool:
        """Begin an inference if it is time for one. Answers whether the model may be used.

        is_ready: does the server say so?
        """
        if not is_ready:
            self.is_well, self.reason = False, "no probe inference since it was not ready"
            self._due = 0.0
            return False
        now = asyncio.get_running_loop().time()
        if self._task is None and now >= self._due:
            self._due = now + self.settings.interval * random.uniform(0.8, 1.2)  # noqa: S311  (spread, not secrecy)
            self._task = asyncio.ensure_future(self._infer())
        return self.is_well

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _infer(self) -> None:
        try:
            found = await self._found()
        finally:
            self._task = None
        if found is not None:
            self.is_well, self.reason = not found, found
        self.has_ended = True
        self._ended()

    async def _found(self) -> str | None:
        """Why it does not infer; empty if it does, or if the request is to blame; None if that can't be told yet."""
        name, version = self._model
        asker = Asker(timeout=self.settings.timeout)
        try:
            await ask(self._endpoint, "ModelInfer", await self._request(asker), pb.ModelInferResponse, asker)
        except CallFailed as failure:
            verdict = classify(failure.code, failure.text, failure.origin, model=name, version=version, id="")
            if verdict.meaning is Meaning.CALLER:
                _log.warning("model '%s' refuses its probe's request: %s", name, failure.text)
                return ""
            if failure.code == Code.DEADLINE_EXCEEDED:
                self._slow += 1
                if self._slow >= SLOW_TO_FAIL:
                    return f"no answer to a probe inference in {self.settings.timeout:g} s"
                self._due = 0.0
                return None
            return None if verdict.meaning in _SAYS_NOTHING else failure.text
        self._slow = 0
        return ""

    async def _request(self, asker: Asker) -> Any:
        name, version = self._model
        if self.settings.request:
            request = pb.ModelInferRequest.FromString(self.settings.request)
        else:
            question = pb.ModelMetadataRequest(name=name, version=version)
            request = zeros(await ask(self._endpoint, "ModelMetadata", question, pb.ModelMetadataResponse, asker))
        request.model_name, request.model_version = name, version
        return request


def zeros(metadata: Any) -> Any:
    """A ModelInferRequest with the least input that the model takes: zeros, empty texts, and 1 where a size is free.

    metadata: a ModelMetadataResponse.
    """
    request = pb.ModelInferRequest()
    for tensor in metadata.inputs:
        shape = [max(1, size) if size < 0 else size for size in tensor.shape]
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
        elements = 1
        for size in shape:
            elements *= size
        # An element of BYTES is its length, in four bytes, and what it holds.
        request.raw_input_contents.append(bytes(elements * (SIZES.get(tensor.datatype, 0) or 4)))
    return request
