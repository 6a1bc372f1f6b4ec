"""The use-case that compares pipelines with the models that they call, once the models are ready."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.topology import CurrentTopology
from gateway.routing import Route
from gateway.steps import Pipeline
from gateway.steps.compare import ModelFacts, ModelTensor, compare, facts_of
from gateway.types import Variant
from gateway.upstream.ask import decoded
from gateway.upstream.connection import CallFailed, Connection
from gateway.upstream.endpoint import State

_log = logging.getLogger(__name__)

_SERVICE: Final = "/inference.GRPCInferenceService/"
_PAUSE_SECONDS: Final = 2.0  # between two comparisons, so that many changes at once cause few questions
_AGAIN_SECONDS: Final = 60.0  # most between two comparisons: a model that is replaced in place changes no readiness
_ANSWER_SECONDS: Final = 5.0  # for one answer

Ask = Callable[[Variant], Awaitable[ModelFacts | None]]
"""Returns what a variant's Triton model says about itself; None if no endpoint answers now."""


async def ask_model(connection: Connection, variant: Variant) -> ModelFacts:
    """What the model of a variant says about itself, from one endpoint.

    :raises CallFailed: if the endpoint does not answer, or its answer is not in Triton's protocol.
    """
    name, version = variant.model, variant.version

    async def ask(method: str, request: Any, response: Any) -> Any:
        """Any: protobuf message classes, which carry no types of their own."""
        answer = await connection.unary(_SERVICE + method, request.SerializeToString(), (), _ANSWER_SECONDS)
        return decoded(method, answer.body, response)

    metadata, config = await asyncio.gather(
        ask("ModelMetadata", pb.ModelMetadataRequest(name=name, version=version), pb.ModelMetadataResponse),
        ask("ModelConfig", pb.ModelConfigRequest(name=name, version=version), pb.ModelConfigResponse),
    )
    optional = {tensor.name for tensor in config.config.input if tensor.optional}

    def tensors(named: Iterable[Any]) -> tuple[ModelTensor, ...]:
        return tuple(ModelTensor(each.name, each.datatype, tuple(each.shape), each.name in optional) for each in named)

    who = f"variant '{variant.name}' ({name} at {variant.upstream})"
    return ModelFacts(who, tensors(metadata.inputs), tensors(metadata.outputs), config.config.max_batch_size)


async def ask_all(
    pipelines: Mapping[str, Pipeline], routes: Mapping[str, Route], ask: Ask
) -> dict[str, list[ModelFacts]]:
    """The models behind each public name that a pipeline calls, by that name."""
    facts: dict[str, list[ModelFacts]] = {}
    for name in dict.fromkeys(model for pipeline in pipelines.values() for model in pipeline.models):
        if name in pipelines:
            facts[name] = [facts_of(pipelines[name])]
        elif name in routes:
            answers = await asyncio.gather(*map(ask, routes[name].variants))
            facts[name] = [each for each in answers if each is not None]
    return facts


class Contracts:
    """Keeps `PipelineModel.mismatches` up to date, until its `run` is cancelled."""

    def __init__(self, topology: CurrentTopology) -> None:
        self._topology = topology
        self._poked = asyncio.Event()

    def poke(self) -> None:
        """Compare soon: a model, an endpoint or the config has changed."""
        self._poked.set()

    async def run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):  # two classes until Python 3.11
                await asyncio.wait_for(self._poked.wait(), _AGAIN_SECONDS)
            self._poked.clear()
            try:
                await self.compare()
            except Exception:  # no caller waits for this, so the log is where it must go
                _log.exception("pipelines could not be compared with their models")
            await asyncio.sleep(_PAUSE_SECONDS)

    async def compare(self) -> None:
        """Compare every pipeline with what its models say now, and log what has changed."""
        topology = self._topology.now
        pipelines = {name: model.pipeline for name, model in topology.pipelines.items()}
        facts = await ask_all(pipelines, topology.routes.public, self._ask)
        for name, model in topology.pipelines.items():
            found = tuple(map(str, compare(model.pipeline, facts)))
            for text in found:
                if text not in model.mismatches:
                    _log.error("pipeline '%s' does not fit the models that it calls: %s", name, text)
            if model.mismatches and not found:
                _log.info("pipeline '%s' fits the models that it calls", name)
            model.mismatches = found

    async def _ask(self, variant: Variant) -> ModelFacts | None:
        pool = self._topology.now.pools.get(variant.upstream)
        for endpoint in pool.endpoints if pool is not None else ():
            if endpoint.state is State.READY and endpoint.can_serve(variant.model, variant.version):
                with contextlib.suppress(CallFailed):  # the probes decide what that means for the endpoint
                    return await ask_model(endpoint.connection, variant)
        return None
