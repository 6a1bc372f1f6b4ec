"""RPCs about models: readiness, metadata, config, statistics and repository index, over all upstreams.

A public model looks like a Triton model here. Its metadata and config are those of the first variant that answers;
its statistics are added up over variants and endpoints.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from tritonclient.grpc import service_pb2 as pb

from gateway.access.door import Access
from gateway.errors import BadRequest, GatewayError, NoTarget, UnknownModel, shown
from gateway.forwarding.pipelines import PIPELINE_VERSION, PipelineModel
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.routing import Route, plan
from gateway.status import Code, Meaning, classify
from gateway.types import Facts, Variant
from gateway.upstream.ask import NOBODY, Asker, as_error, ask, usable
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint, State
from gateway.v2.versions import maybe_version, read_version

_Entry: TypeAlias = pb.RepositoryIndexResponse.ModelIndex

_LISTS_AT_ONCE: Final = 4
"""How many questions about all models run at once; each asks every endpoint and reads the entries of every model."""

_NOBODY_THERE = "no Triton endpoint can be reached now"


class Catalogue:
    """Answers questions about models, by public name or by Triton's own name."""

    def __init__(self, topology: CurrentTopology, lists: asyncio.Semaphore | None = None) -> None:
        self._current = topology
        self._lists = lists or asyncio.Semaphore(_LISTS_AT_ONCE)

    def seen_by(self, access: Access | None) -> Catalogue:
        """What a caller may know of; None: all of it."""
        return self if access is None else Catalogue(CurrentTopology(self._current.seen_by(access)), self._lists)

    @property
    def _topology(self) -> Topology:
        return self._current.now

    def is_configured(self, name: str) -> bool:
        """Is it a public name, or the Triton name of a variant that may be called?"""
        return self._topology.is_known(name)

    def is_ready(self, name: str, version: str = "") -> bool | None:
        """Can a call be answered, as far as is known now? None for a name that is unknown here.

        For models that are watched (every variant's); others have to be asked for by `model_ready`.
        """
        pipeline = self._topology.pipelines.get(name)
        if pipeline is not None:
            return pipeline.is_ready()
        route = self._topology.routes.lookup(name)
        if route is None:
            return None
        return any(self._topology.is_available(variant) for variant in self._order(route, version))

    async def model_ready(self, name: str, version: str, asker: Asker = NOBODY) -> bool:
        """As Triton does, this answers false, and no error, for an unknown name."""
        version = maybe_version(version) or version  # Triton refuses a text that is no version
        pipeline = self._topology.pipelines.get(name)
        if pipeline is not None:
            return read_version(version) in ("", PIPELINE_VERSION) and pipeline.is_ready()
        route = self._topology.routes.lookup(name)
        if route is None or route.maybe_for_version(version) is None:
            read_version(version)
            return False
        refusal: CallFailed | None = None
        for variant in self._order(route, version):
            request = pb.ModelReadyRequest(name=variant.model, version=variant.version or version)
            for endpoint in self._endpoints(variant):
                try:
                    if (await ask(endpoint, "ModelReady", request, pb.ModelReadyResponse, asker)).ready:
                        return True
                except CallFailed as failure:
                    _raise_if_callers_fault(failure, request.name, request.version)
                    refusal = failure if failure.from_server else refusal
        if refusal is not None:
            raise as_error(refusal)
        return False

    async def model_metadata(self, name: str, version: str, asker: Asker = NOBODY) -> pb.ModelMetadataResponse:
        version = maybe_version(version) or version  # Triton refuses a text that is no version
        pipeline = self._pipeline_of(name, version)
        if pipeline is not None:
            return pipeline.metadata()
        answer = await self._first(
            name, version, "ModelMetadata", pb.ModelMetadataRequest, pb.ModelMetadataResponse, asker
        )
        answer.name = name
        return answer

    async def model_config(self, name: str, version: str, asker: Asker = NOBODY) -> pb.ModelConfigResponse:
        version = maybe_version(version) or version  # Triton refuses a text that is no version
        pipeline = self._pipeline_of(name, version)
        if pipeline is not None:
            return pipeline.config()
        answer = await self._first(name, version, "ModelConfig", pb.ModelConfigRequest, pb.ModelConfigResponse, asker)
        answer.config.name = name
        return answer

    async def model_statistics(self, name: str, version: str, asker: Asker = NOBODY) -> pb.ModelStatisticsResponse:
        """One entry per version, added up over the variants and endpoints that answer. name "": every model."""
        version = maybe_version(version) or version  # Triton refuses a text that is no version
        if not name:  # as Triton does, ignore a version without a name
            return pb.ModelStatisticsResponse(model_stats=await self._all_statistics(version, asker))
        pipeline = self._topology.pipelines.get(name)
        if pipeline is not None:
            if read_version(version) not in ("", PIPELINE_VERSION):
                raise _no_statistics_of_version(name)
            return pb.ModelStatisticsResponse(model_stats=[pipeline.statistics()])
        route = self._topology.routes.lookup(name)
        if route is None:
            read_version(version)
            raise BadRequest(f"requested model '{shown(name)}' is not available")  # as Triton's
        route = route.maybe_for_version(version)
        if route is None:
            read_version(version)
            raise _no_statistics_of_version(name)
        told, failures = await self._statistics_of(route, version, asker)
        stats = add_up(name, _counted_once(route, _entries(told)))
        if stats:
            return pb.ModelStatisticsResponse(model_stats=stats)
        is_public = name in self._topology.routes.public
        if version and is_public and any(failure.code == Code.INVALID_ARGUMENT for failure in failures):
            read_version(version)
            raise _no_statistics_of_version(name)
        raise self._no_answer(name, version, failures)

    async def repository_index(
        self, request: pb.RepositoryIndexRequest, asker: Asker = NOBODY
    ) -> pb.RepositoryIndexResponse:
        """Public models, then the others that an upstream lists and that may be called; READY if one endpoint says so.

        A public model has, as at Triton, an entry for each version that is ready: those of its variants' models.
        """
        answers = await self._everywhere("RepositoryIndex", request, pb.RepositoryIndexResponse, asker)
        listed: dict[str, dict[tuple[str, str], _Entry]] = {}  # model -> (upstream, version) -> the best that is said
        for told in answers:
            for entry in told.answer.models:
                of_model = listed.setdefault(entry.name, {})
                key = told.endpoint.upstream, entry.version
                of_model[key] = _better(of_model.get(key), entry)
        public = dict.fromkeys(self._public_names())
        models = [entry for name in public for entry in self._public_entries(name, listed)]
        models += [entry for name in listed if name not in public for entry in self._direct_entries(name, listed[name])]
        return pb.RepositoryIndexResponse(models=[e for e in models if e.state == "READY" or not request.ready])

    def _public_entries(self, name: str, listed: Mapping[str, Mapping[tuple[str, str], _Entry]]) -> list[_Entry]:
        """The index entries of one public model. listed: the entries of each upstream, by model."""
        if not self.is_ready(name):
            return [_Entry(name=name, state="UNAVAILABLE", reason="no variant can answer now")]
        if name in self._topology.pipelines:
            return [_Entry(name=name, version=PIPELINE_VERSION, state="READY")]
        ready = {
            version
            for variant in self._topology.routes.public[name].variants
            for (upstream, version), entry in listed.get(variant.model, {}).items()
            if entry.state == "READY" and upstream == variant.upstream and variant.version in ("", version)
        }
        return [_Entry(name=name, version=version, state="READY") for version in sorted(ready, key=_as_number)]

    def _direct_entries(self, name: str, listed: Mapping[tuple[str, str], _Entry]) -> list[_Entry]:
        """The index entries of one Triton model under its own name, from the upstreams that such a call goes to."""
        route = self._topology.routes.lookup(name)
        upstreams = {variant.upstream for variant in route.variants} if route is not None else ()
        best: dict[str, _Entry] = {}
        for (upstream, version), entry in listed.items():
            if upstream in upstreams:
                best[version] = _better(best.get(version), entry)
        return list(best.values())

    async def server_metadata(self, asker: Asker = NOBODY) -> pb.ServerMetadataResponse:
        """The metadata of Triton itself, with the extensions that every endpoint has."""
        told = await self._everywhere("ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse, asker)
        answers = [each.answer for each in told]
        if not answers:
            raise NoTarget(_NOBODY_THERE)
        first = answers[0]
        common = [name for name in first.extensions if all(name in answer.extensions for answer in answers)]
        return pb.ServerMetadataResponse(name=first.name, version=first.version, extensions=common)

    def problems(self) -> list[str]:
        """Why the gateway can serve nothing; empty if some endpoint has answered a probe."""
        endpoints = [endpoint for pool in self._topology.pools.values() for endpoint in pool.endpoints]
        if any(endpoint.state in (State.READY, State.SUSPECT) for endpoint in endpoints):
            return []
        unknown = [f"upstream {name}: no address found" for name, p in self._topology.pools.items() if not p.endpoints]
        down = [f"upstream {e.upstream}: endpoint {e.address} is {e.state.value}: {e.reason}" for e in endpoints]
        return [*unknown, *down]

    # How answers are gathered

    def _public_names(self) -> list[str]:
        return [*self._topology.routes.public, *self._topology.pipelines]

    def _names(self) -> list[str]:
        """Every name in the config: public models, pipelines, and Triton models of variants."""
        return list(dict.fromkeys([*self._topology.pipelines, *self._topology.routes.names]))

    def _pipeline_of(self, name: str, version: str) -> PipelineModel | None:
        pipeline = self._topology.pipelines.get(name)
        if pipeline is not None and read_version(version) not in ("", PIPELINE_VERSION):
            raise UnknownModel(name, version)
        return pipeline

    def _order(self, route: Route, version: str) -> Sequence[Variant]:
        """The variants in the order in which a call without metadata would try them."""
        facts = Facts(version=version)
        return plan(route, facts, draw=0.0, available=self._topology.is_available).targets

    def _endpoints(self, variant: Variant) -> Sequence[Endpoint]:
        pool = self._topology.pools.get(variant.upstream)
        return usable(pool, variant.model, variant.version) if pool else ()

    async def _first(  # noqa: PLR0917
        self, name: str, version: str, method: str, request: Any, answer: type[Any], asker: Asker
    ) -> Any:
        """The first answer among the variants in their order of preference. Any: protobuf classes."""
        route = self._topology.routes.lookup(name)
        if route is None:
            read_version(version)
            raise UnknownModel(name)
        failures: list[CallFailed] = []
        for variant in self._order(route, version):
            question = request(name=variant.model, version=variant.version or version)
            for endpoint in self._endpoints(variant):
                try:
                    return await ask(endpoint, method, question, answer, asker)
                except CallFailed as failure:
                    _raise_if_callers_fault(failure, question.name, question.version)
                    failures.append(failure)
        raise self._no_answer(name, version, failures)

    def _no_answer(self, name: str, version: str, failures: Sequence[CallFailed]) -> GatewayError:
        """Triton's own error for a Triton model; for a public model an error without the names of variants."""
        route = self._topology.routes.lookup(name)
        if failures and name not in self._topology.routes.public:
            return as_error(failures[-1])
        left = route.maybe_for_version(version) if route is not None else None
        if left is None or (version and any(map(self._endpoints, left.variants))):
            return UnknownModel(name, read_version(version))
        return NoTarget(f"model '{name}': no variant can answer now")

    async def _statistics_of(
        self, route: Route, version: str, asker: Asker
    ) -> tuple[Sequence[_Answer], Sequence[CallFailed]]:
        """The answers of the endpoints of a route's variants, and the failures of those without an answer."""
        asked: dict[tuple[str, str, str, str], Awaitable[_Answer]] = {}
        for variant in route.variants:
            question = pb.ModelStatisticsRequest(name=variant.model, version=variant.version or version)
            for endpoint in self._endpoints(variant):
                key = endpoint.upstream, endpoint.address, question.name, question.version
                if key not in asked:
                    asked[key] = _tell(endpoint, "ModelStatistics", question, pb.ModelStatisticsResponse, asker)
        return await _results(asked.values())

    async def _all_statistics(self, version: str, asker: Asker) -> list[pb.ModelStatistics]:
        """Statistics of every model: those in the config, then others that may be called directly."""
        question = pb.ModelStatisticsRequest(version=version)
        told = await self._everywhere("ModelStatistics", question, pb.ModelStatisticsResponse, asker)
        by_model: dict[str, list[tuple[Endpoint, pb.ModelStatistics]]] = {}
        for endpoint, entry in _entries(told):
            by_model.setdefault(entry.name, []).append((endpoint, entry))
        stats: list[pb.ModelStatistics] = []
        for name in dict.fromkeys([*self._names(), *sorted(by_model)]):
            pipeline, route = self._topology.pipelines.get(name), self._topology.routes.lookup(name)
            if pipeline is not None:
                stats.append(pipeline.statistics())
            elif route is not None:
                models = dict.fromkeys(variant.model for variant in route.variants)
                entries = [pair for model in models for pair in by_model.get(model, ())]
                stats += add_up(name, _counted_once(route, entries))
        return stats

    async def _everywhere(self, method: str, request: Any, answer: type[Any], asker: Asker) -> list[_Answer]:
        """The answers of all endpoints that answer, in the order of the config. Any: protobuf classes.

        :raises GatewayError: if none does, as the last one of those that said why.
        """
        async with self._lists:
            pools = self._topology.pools.values()
            questions = [_tell(e, method, request, answer, asker) for pool in pools for e in usable(pool)]
            answers, failures = await _results(questions)
        if not answers and pools:
            said = [failure for failure in failures if failure.from_server]
            raise as_error(said[-1]) if said else NoTarget(_NOBODY_THERE)
        return answers


def add_up(name: str, entries: Iterable[pb.ModelStatistics]) -> list[pb.ModelStatistics]:
    """One entry per version under `name`: counts and times summed, the last inference the latest."""
    by_version: dict[str, pb.ModelStatistics] = {}
    for entry in entries:
        total = by_version.get(entry.version)
        if total is None:
            total = by_version[entry.version] = pb.ModelStatistics()
            total.CopyFrom(entry)
            total.name = name
        else:
            _add(total, entry)
    return [by_version[version] for version in sorted(by_version, key=_as_number)]


def _as_number(version: str) -> tuple[int, str]:
    """A sort key for versions, which are positive integers without leading zeros: 10 comes after 9."""
    return len(version), version


def _add(total: pb.ModelStatistics, entry: pb.ModelStatistics) -> None:
    total.last_inference = max(total.last_inference, entry.last_inference)
    total.inference_count += entry.inference_count
    total.execution_count += entry.execution_count
    _add_durations(total.inference_stats, entry.inference_stats)
    batches = {batch.batch_size: batch for batch in total.batch_stats}
    for batch in entry.batch_stats:
        if batch.batch_size in batches:
            _add_durations(batches[batch.batch_size], batch)
        else:
            total.batch_stats.append(batch)
    for key, stats in entry.response_stats.items():
        _add_durations(total.response_stats[key], stats)
    total.memory_usage.extend(entry.memory_usage)


def _add_durations(total: Any, entry: Any) -> None:
    """Add every StatisticDuration field of a message to the same field of another. Any: several message types."""
    for descriptor, value in entry.ListFields():
        if descriptor.message_type is not None:
            sum_ = getattr(total, descriptor.name)
            sum_.count += value.count
            sum_.ns += value.ns


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answer of one endpoint. Any: protobuf classes."""

    endpoint: Endpoint
    answer: Any


async def _tell(endpoint: Endpoint, method: str, request: Any, answer: type[Any], asker: Asker) -> _Answer:
    return _Answer(endpoint, await ask(endpoint, method, request, answer, asker))


def _entries(told: Iterable[_Answer]) -> Iterator[tuple[Endpoint, pb.ModelStatistics]]:
    for each in told:
        for entry in each.answer.model_stats:
            yield each.endpoint, entry


def _counted_once(route: Route, entries: Iterable[tuple[Endpoint, pb.ModelStatistics]]) -> Iterable[pb.ModelStatistics]:
    """The entries of versions that a route's variants may serve. entries: each with its endpoint.

    Variants and pools may overlap: a version on one server counts once, however many of them lead to it.
    """
    wanted = {(variant.upstream, variant.model, variant.version) for variant in route.variants}
    found: dict[tuple[str, str, str], pb.ModelStatistics] = {}
    for endpoint, entry in entries:
        if {(endpoint.upstream, entry.name, ""), (endpoint.upstream, entry.name, entry.version)} & wanted:
            found.setdefault((endpoint.address, entry.name, entry.version), entry)
    return found.values()


def _better(known: _Entry | None, entry: _Entry) -> _Entry:
    """The better of two endpoints' entries for one version: one that is READY wins."""
    return entry if known is None or (entry.state == "READY" and known.state != "READY") else known


def _no_statistics_of_version(name: str) -> BadRequest:
    return BadRequest(f"requested model version is not available for model '{name}'")  # as Triton's


async def _results(asked: Iterable[Awaitable[_Answer]]) -> tuple[list[_Answer], list[CallFailed]]:
    """Separate the results of several questions: the answers, and the failures."""
    results = await asyncio.gather(*asked, return_exceptions=True)
    answers: list[_Answer] = []
    failures: list[CallFailed] = []
    for result in results:
        if isinstance(result, CallFailed):
            failures.append(result)
        elif isinstance(result, BaseException):
            raise result
        else:
            answers.append(result)
    return answers, failures


_OF_ONE_SERVER: Final = (Meaning.SERVER, Meaning.UNCLEAR)
"""Failures after which another server is asked: a question changes nothing, so asking twice does no harm."""


def _raise_if_callers_fault(failure: CallFailed, name: str, version: str) -> None:
    """:raises UpstreamFailed: if every endpoint would fail alike. name, version: those that were asked about."""
    verdict = classify(failure.code, failure.text, failure.origin, model=name, version=version)
    if not verdict.elsewhere and verdict.meaning not in _OF_ONE_SERVER:
        raise as_error(failure) from failure
