"""Makes the values that the rooms need from a checked config. Starts nothing, and reads nothing but certificates."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from gateway.access.door import CALLER
from gateway.access.policy import Grant, Names, Policy
from gateway.access.rpcs import named_by
from gateway.admin.guard import AdminAccess, tokens_of
from gateway.api.listener import ServerSettings, ServerTls
from gateway.config import DISCOVERED, Config, split_endpoint
from gateway.config.access import Access as AccessConfig
from gateway.config.access import Grant as GrantConfig
from gateway.config.experiment_file import plans_of, rollouts_of
from gateway.config.experiments import Experiment, OutcomeSection
from gateway.config.models import Condition as ConfigCondition
from gateway.config.models import Model, Scalar
from gateway.config.models import Rule as ConfigRule
from gateway.config.probes import request_of
from gateway.config.quotas import CallerLimits, QuotaLimits
from gateway.config.rollouts import Rollout
from gateway.config.upstreams import SharedMemory as ConfigSharedMemory
from gateway.config.upstreams import Tls as ConfigTls
from gateway.config.upstreams import Upstream
from gateway.experiments.epochs import Epochs
from gateway.experiments.plan import Plan
from gateway.experiments.rollout import Phase, RolloutKey, State, step_name
from gateway.forwarding.admission import NONE, AdmissionSettings, GateKey
from gateway.forwarding.batching import MergeSettings
from gateway.forwarding.checks import CheckSettings
from gateway.forwarding.exposures import Running
from gateway.forwarding.hedging import HedgeSettings
from gateway.forwarding.shadowing import ParitySettings, ShadowSettings
from gateway.forwarding.sharing import ShareSettings
from gateway.process.container import memory_limit
from gateway.quota_store import StoreSettings
from gateway.quotas import CallerQuota, Limits, Quotas, QuotaSettings, SharedBuckets
from gateway.quotas.usage import UsageCounts
from gateway.routing import (
    AnyOf,
    Arms,
    Condition,
    Direct,
    Key,
    Prefix,
    Present,
    Regex,
    Rolling,
    Route,
    Routes,
    Rule,
    Split,
    Sticky,
    as_text,
)
from gateway.routing.match import Test
from gateway.rpc.budget import Budget
from gateway.status import Meaning
from gateway.telemetry.usage import Usage, UsageLog
from gateway.types import ROLLOUT, Retry, Variant
from gateway.upstream.channel import Tls, wire_channel
from gateway.upstream.connection import Connection
from gateway.upstream.discovery import Name
from gateway.upstream.endpoint import ModelKey
from gateway.upstream.fleet import UpstreamSettings
from gateway.upstream.health import ProbeSettings
from gateway.upstream.inference_probe import ProbeInference
from gateway.upstream.room import SharedMemorySettings, is_this_host

MOST_COLLECTED: Final = 512 << 20  # bytes: by default, two of the largest messages that callers may send
LEAST_COLLECTED: Final = 16 << 20
LEAST_PLACED: Final = 128 << 10  # bytes of a request that is worth it: with 64 KiB shared memory was no faster


_NONE: Final[Mapping[RolloutKey, State]] = MappingProxyType({})
_NO_EPOCHS: Final[Mapping[str, Epochs]] = MappingProxyType({})


def routes_of(
    config: Config,
    stopped: Mapping[str, str] = MappingProxyType({}),
    rollouts: Mapping[RolloutKey, State] = _NONE,
    epochs: Mapping[str, Epochs] = _NO_EPOCHS,
) -> Routes:
    """The routes that a config declares.

    stopped: the arms that everybody gets of experiments that have ended. rollouts: how far they are; the
    others have moved nobody. epochs: those of bandits; before the first one all units have the baseline.
    """
    direct = Direct(config.direct.models)
    default = config.direct.upstream or (next(iter(config.upstreams)) if direct is Direct.ALL else "")
    arms = arms_of(config, stopped, epochs)
    public = [
        _route(name, model, arms.get(name, ()), rollouts)
        for name, model in config.models.items()
        if model.variants is not None
    ]
    return Routes(public, direct=direct, default_upstream=default)


def arms_of(
    config: Config, stopped: Mapping[str, str], epochs: Mapping[str, Epochs] = _NO_EPOCHS
) -> dict[str, tuple[Arms, ...]]:
    """By public model, the experiments that assign its units."""
    found: dict[str, tuple[Arms, ...]] = {}
    begin: dict[str, float] = {}  # where the next slice of each layer begins
    for name, plan in plans_of(config).items():
        experiment = config.experiments[name]
        layer = experiment.layer or f"of {name}"
        start = begin.get(layer, 0.0)
        end = begin[layer] = min(1.0, start + experiment.share)
        winner = stopped.get(name, "")
        model = config.models[plan.model]
        ended = winner if winner in (model.variants or {}) else plan.baseline if name in stopped else ""
        slices, shares = _epochs(plan, epochs.get(name))
        arms = Arms(
            name, plan.shares, plan.baseline, layer, start, end, experiment.holdout, ended, slices=slices, epochs=shares
        )
        found[plan.model] = (*found.get(plan.model, ()), arms)
    return found


def _epochs(plan: Plan, epochs: Epochs | None) -> tuple[int, tuple[Mapping[str, float], ...]]:
    """Into how many slices a bandit's units are cut, and the shares of those that are open."""
    if plan.bandit is None:
        return 0, ()
    if epochs is None or not epochs.is_of(plan):  # of a config that has just changed
        return plan.bandit.slices, ()
    return epochs.slices, tuple(epoch.shares for epoch in epochs.so_far)


def running_of(config: Config, stopped: Mapping[str, str], epochs: Mapping[str, Epochs] = _NO_EPOCHS) -> list[Running]:
    """The experiments whose units are told of."""
    return [
        _running(model, arms, config.experiments[arms.name])
        for model, experiments in arms_of(config, stopped, epochs).items()
        for arms in experiments
        if not arms.ended_with
    ]


def steps_of(config: Config, rollouts: Mapping[RolloutKey, State]) -> list[Running]:
    """The steps of rollouts that are under way: units of each are told of as those of an experiment."""
    found = []
    for name, plan in rollouts_of(config).items():
        state, model = rollouts.get(plan.key), config.models[plan.model]
        if state is None or state.phase not in (Phase.RUNNING, Phase.PAUSED) or model.sticky is None:
            continue
        outcomes = {} if model.rollout is None else model.rollout.guardrails
        asks = model.rollout is not None and model.rollout.request_ids
        found.append(
            Running(
                step_name(name, state.step),
                plan.model,
                ROLLOUT + name,
                frozenset((plan.before, plan.after)),
                *_measures(outcomes),
                knows_requests=asks and any(each.measure is None for each in outcomes.values()),
                sums=_sums(outcomes),
                counts_variant=True,
            )
        )
    return found


def rolled_of(config: Config, rollouts: Mapping[RolloutKey, State]) -> dict[str, tuple[str, str]]:
    """The variants whose calls are counted, by public model: of rollouts under way."""
    return {
        plan.model: (plan.before, plan.after)
        for plan in rollouts_of(config).values()
        if plan.key in rollouts and rollouts[plan.key].phase in (Phase.RUNNING, Phase.PAUSED)
    }


def _running(model: str, arms: Arms, experiment: Experiment) -> Running:
    outcomes = experiment.outcomes
    measured = {name: each for name, each in outcomes.items() if each.measure is not None}
    return Running(
        arms.name,
        model,
        arms.reason,
        frozenset(arms.shares),
        *_measures(outcomes),
        knows_requests=experiment.request_ids and len(measured) < len(outcomes),
        sums=_sums(outcomes),
        bandit=arms if arms.slices else None,
    )


def _sums(outcomes: Mapping[str, OutcomeSection]) -> frozenset[str]:
    """What the gateway measures of which a unit's mean, and of how many calls it is, are enough."""
    return frozenset(name for name, each in outcomes.items() if each.measure is not None and each.kind != "quantile")


def _measures(
    outcomes: Mapping[str, OutcomeSection],
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str, float], ...], tuple[tuple[str, str], ...]]:
    """What the gateway measures itself: of a call, by comparing its answer, and of its scores, as in `Running`."""
    return (
        tuple((name, each.measure) for name, each in outcomes.items() if each.measure in ("latency", "error", "size")),
        tuple(
            (name, each.reference, float(each.measure == "agreement"))
            for name, each in outcomes.items()
            if each.reference is not None
        ),
        tuple((name, each.output or "") for name, each in outcomes.items() if each.measure == "confidence"),
    )


def names_of(config: Config) -> frozenset[Name]:
    """The names whose addresses must be looked up."""
    endpoints = [endpoint for upstream in config.upstreams.values() for endpoint in upstream.endpoints]
    return frozenset(split_endpoint(endpoint) for endpoint in endpoints if endpoint.startswith(DISCOVERED))


def merges_of(config: Config) -> dict[str, MergeSettings]:
    """The public models whose requests are merged."""
    merges = {name: model.merge for name, model in config.models.items()}
    return {
        name: MergeSettings(
            m.rows,
            m.bytes,
            m.in_flight,
            m.delay,
            None if m.metadata is None else frozenset(m.metadata),
            m.ignore_ids,
            m.recheck,
            _told_caller(config),
        )
        for name, m in merges.items()
        if m is not None
    }


def _told_caller(config: Config) -> bytes:
    """The metadata key under which the gateway tells Triton who calls; b"": it does not."""
    access = config.checked_access
    return b"" if access is None or access.tell_upstream is None else access.tell_upstream.encode()


def shares_of(config: Config) -> dict[str, ShareSettings]:
    """The public models whose identical requests share answers, for one worker: memory is for all of them."""
    shares = {name: model.share for name, model in config.models.items()}
    return {
        name: ShareSettings(
            s.coalesce,
            (s.cache or 0) // config.workers,
            s.ttl,
            None if s.metadata is None else frozenset(s.metadata),
            _told_caller(config),
        )
        for name, s in shares.items()
        if s is not None
    }


def hedges_of(config: Config) -> dict[str, HedgeSettings]:
    """The public models whose slow calls are sent a second time."""
    hedges = {name: model.hedge for name, model in config.models.items()}
    return {name: HedgeSettings(h.quantile, h.after or 0.0) for name, h in hedges.items() if h is not None}


def checks_of(config: Config) -> dict[str, CheckSettings]:
    """The public models whose answers are looked at."""
    answers = {name: model.answers for name, model in config.models.items()}
    return {name: CheckSettings(a.finite, a.contract, a.max_bytes) for name, a in answers.items() if a is not None}


def shadows_of(config: Config, routes: Routes) -> dict[str, tuple[ShadowSettings, ...]]:
    """The public models of whose calls other variants get copies."""
    found = {}
    for name, model in config.models.items():
        route = routes.public.get(name)
        if route is None or not model.shadow:
            continue
        variants = {variant.name: variant for variant in route.variants}
        found[name] = tuple(
            ShadowSettings(
                variants[shadow],
                each.compare.comparison(),
                each.share,
                each.in_flight,
                each.timeout,
                ParitySettings(each.parity.copies, each.parity.agreement) if each.parity is not None else None,
            )
            for shadow, each in model.shadow.items()
        )
    return found


def admission_of(config: Config) -> AdmissionSettings:
    """The limits of calls for one worker. A limit in the config is for all workers together."""
    limits: dict[GateKey, int] = {}
    for model in config.models.values():
        for variant in (model.variants or {}).values():
            key, limit = (variant.upstream, variant.model), variant.limit
            if limit != "auto":
                limits[key] = NONE if limit == "none" else max(1, limit // config.workers)
    return AdmissionSettings(
        limits,
        config.admission.caller or (CALLER if config.checked_access else ""),
        config.admission.priority or "",
        config.workers,
    )


def policy_of(access: AccessConfig) -> Policy:
    """What callers may, as a config says."""
    members: dict[str, set[str]] = {}
    for group, names in access.groups.items():
        for name in names:
            members.setdefault(name, set()).add(group)
    return Policy([_granted(each) for each in access.grants], {name: frozenset(each) for name, each in members.items()})


def _granted(grant: GrantConfig) -> Grant:
    return Grant(
        frozenset(grant.callers),
        frozenset(grant.groups),
        grant.everybody,
        grant.anonymous,
        Names.of(grant.models),
        Names.of(grant.direct),
        named_by(grant.rpcs),
        frozenset(grant.allow),
        grant.max_message_bytes,
    )


def admin_of(config: Config) -> AdminAccess:
    """Who may read the admin plane."""
    admin = config.admin
    tls = (admin.tls.cert, admin.tls.key, admin.tls.client_ca) if admin.tls is not None else None
    return AdminAccess(tokens_of(admin.tokens), frozenset(f"/{name}" for name in admin.open), tls)


def quotas_of(config: Config) -> QuotaSettings:
    """The quotas, for the gateway as a whole."""
    quotas = config.quotas
    return QuotaSettings(
        quotas.caller or (CALLER if config.checked_access else ""),
        {name: _caller_quota(caller) for name, caller in quotas.callers.items()},
        _caller_quota(quotas.default),
        {name: _limits(model) for name, model in quotas.models.items()},
        config.workers,
    )


def _caller_quota(caller: CallerLimits) -> CallerQuota:
    models = {name: _limits(model) for name, model in caller.models.items()}
    return CallerQuota(_limits(caller), models, None if caller.priority is None else caller.priority == "batch")


def _limits(quota: QuotaLimits) -> Limits:
    return Limits(quota.requests or 0.0, quota.bytes or 0.0, quota.rows or 0.0, quota.concurrent or 0, quota.burst)


def shared_quotas_of(config: Config) -> SharedBuckets | None:
    """What the store of quotas is to say; None if there is none."""
    shared = config.quotas.shared
    return None if shared is None else SharedBuckets(1.0 / (shared.gateways * config.workers), shared.period)


def store_of(config: Config) -> StoreSettings:
    """The store of quotas, for one worker."""
    shared = config.quotas.shared
    assert shared is not None  # noqa: S101  (the caller's choice)
    member = f"{socket.gethostname()}-{secrets.token_hex(8)}"  # hosts of containers may have one name
    return StoreSettings(shared.url, shared.password_file, shared.timeout, shared.prefix, member)


def usage_of(config: Config, quotas: Quotas, worker: str) -> Usage | None:
    """Counts who used what; None unless the file says anything of quotas."""
    if "quotas" not in config.model_fields_set:
        return None
    log = config.quotas.usage
    settings = UsageLog(log.directory, log.interval, log.file_bytes, log.file_age, log.files) if log else None
    return Usage(settings, UsageCounts(quotas), worker)


def memory_of(config: Config, limit: Callable[[], int]) -> int:
    """Bytes that one worker's pictures may take. limit: of the memory that all of this may use.

    A third of it by default: a sixth is for pipelines' messages and tensors, a quarter for what is collected
    (`collected_of`), the rest for all else.
    """
    memory = config.pipelines.memory
    return (_unshared(config, limit()) // 3 if memory is None else memory) // config.workers


def _unshared(config: Config, limit: int) -> int:
    """Bytes that are left for other uses: half, if more than that is to be shared."""
    return max(limit // 2, limit - shared_of(config))


def shared_of(config: Config) -> int:
    """Bytes of memory that all workers share with endpoints, which count as the gateway's."""
    return sum(map(_shared_of, config.upstreams.values()))


def _shared_of(upstream: Upstream) -> int:
    """The same of one upstream. A name, for any number of endpoints, counts as one: what there is for it is for all."""
    shared = upstream.shared_memory
    if isinstance(shared, ConfigSharedMemory):
        return shared.bytes * len(upstream.endpoints)
    if shared == "off":
        return 0
    here = [each for each in upstream.endpoints if each.startswith(DISCOVERED) or is_this_host(each)]
    return ConfigSharedMemory().bytes * len(here)


def collected_of(config: Config, limit: Callable[[], int]) -> int:
    """Bytes of messages that one worker may be collecting. limit: as above; a quarter of it by default."""
    share = _unshared(config, limit()) // 4 // config.workers
    return config.server.max_collected_bytes or max(LEAST_COLLECTED, min(share, MOST_COLLECTED))


def server_of(
    config: Config,
    listen: str,
    *,
    channel: socket.socket | None,
    refused: Callable[[str], None],
    turned_away: Callable[[str], None],
) -> ServerSettings:
    """The settings of the listener. refused, turned_away: called with the reason when a connection is."""
    server, tls = config.server, config.server.tls
    return ServerSettings(
        listen,
        server.max_message_bytes,
        max_collected_bytes=collected_of(config, memory_limit),
        channel=channel,
        tls=ServerTls(tls.cert, tls.key, tls.client_ca, tls.client_certificate == "optional") if tls else None,
        max_streams=server.max_streams,
        max_connections=server.max_connections,
        max_connection_age=server.max_connection_age,
        refused=refused,
        turned_away=turned_away,
    )


def upstreams_of(
    config: Config, found: Callable[[Name], Sequence[str]] = lambda _: (), budget: Budget | None = None
) -> dict[str, UpstreamSettings]:
    """The upstreams that a config declares, each with the models to watch there.

    found: the addresses of a name (`Discovery.addresses`). budget: for answers that are collected whole.
    :raises OSError: if a file with a certificate or key can't be read.
    """
    settings = {}
    for name, upstream in config.upstreams.items():
        hosts = _hosts(upstream, found)
        settings[name] = UpstreamSettings(
            endpoints=tuple(hosts),
            models=_watched(name, config),
            probe=ProbeSettings(
                upstream.probe_interval, upstream.probe_timeout, upstream.slow_probes_to_fail, _tried(name, config)
            ),
            dial=_dial(upstream, config, hosts, budget),
            identity=(_identity(upstream.tls), upstream.shared_memory, config.workers),
            subset=upstream.subset or 0,
            memory=_memory(upstream, config.workers),
        )
    return settings


def _memory(upstream: Upstream, workers: int) -> SharedMemorySettings | None:
    """What each endpoint of an upstream shares with one worker."""
    shared = upstream.shared_memory
    if shared == "off":
        return None
    own = shared if isinstance(shared, ConfigSharedMemory) else ConfigSharedMemory()
    most = _shared_of(upstream) // workers
    return SharedMemorySettings(own.bytes // workers, LEAST_PLACED, Path(own.path), anywhere=own is shared, most=most)


def _hosts(upstream: Upstream, found: Callable[[Name], Sequence[str]]) -> dict[str, str | None]:
    """Each address of an upstream, and the name that it was looked up by, which certificates are made for."""
    hosts: dict[str, str | None] = {}
    for endpoint in upstream.endpoints:
        if endpoint.startswith(DISCOVERED):
            host, port = split_endpoint(endpoint)
            for address in found((host, port)):
                hosts.setdefault(address, host.rstrip("."))
        else:
            hosts.setdefault(endpoint, None)
    return hosts


def _identity(tls: ConfigTls | None) -> object:
    """Equal for equal settings of connections. It has the contents of files, so a renewed one makes new connections."""
    files = (tls.ca, tls.cert, tls.key) if tls is not None else ()
    return tls, tuple(Path(file).read_bytes() if file else None for file in files)


def _tried(upstream: str, config: Config) -> dict[ModelKey, ProbeInference]:
    """The models that are tried out by inferences."""
    variants = [variant for model in config.models.values() for variant in (model.variants or {}).values()]
    return {
        (v.model, v.version): ProbeInference(request_of(v.probe), v.probe.interval, v.probe.timeout)
        for v in variants
        if v.upstream == upstream and v.probe is not None
    }


def _watched(upstream: str, config: Config) -> tuple[ModelKey, ...]:
    variants = [variant for model in config.models.values() for variant in (model.variants or {}).values()]
    return tuple(dict.fromkeys((v.model, v.version) for v in variants if v.upstream == upstream))


def _dial(
    upstream: Upstream, config: Config, hosts: Mapping[str, str | None], budget: Budget | None
) -> Callable[[str], Connection]:
    tls = upstream.tls

    def dial(address: str) -> Connection:
        files = Tls(tls.ca, tls.cert, tls.key, tls.server_name or hosts[address]) if tls is not None else None
        return wire_channel(address, config.server.max_message_bytes, files, budget, pool=len(hosts))

    return dial


def _rolling(model: str, rollout: Rollout | None, rollouts: Mapping[RolloutKey, State]) -> Rolling | None:
    if rollout is None:
        return None
    state = rollouts.get(rollout.plan(model).key)
    return Rolling(rollout.name, rollout.before, rollout.after, 0.0 if state is None else state.share)


def _route(name: str, model: Model, arms: tuple[Arms, ...], rollouts: Mapping[RolloutKey, State]) -> Route:
    assert model.variants is not None  # noqa: S101  (the caller's choice)
    return Route(
        name,
        tuple(
            Variant(key, v.upstream, v.model, v.version, v.attempt_timeout or 0.0) for key, v in model.variants.items()
        ),
        split=Split(tuple(model.split.items())) if model.split else Split.all_to(next(iter(model.variants))),
        sticky=_sticky(name, model),
        rules=tuple(map(_rule, model.rules)),
        fallback=model.fallback,
        attempts=model.attempts,
        retry=Retry(frozenset(map(Meaning, model.retry.on)), model.retry.most),
        experiments=arms,
        rollout=_rolling(name, model.rollout, rollouts),
    )


def _sticky(name: str, model: Model) -> Sticky | None:
    sticky = model.sticky
    if sticky is None:
        return None
    keys = []
    if sticky.metadata is not None:
        keys.append(Key("metadata", sticky.metadata))
    if sticky.parameter is not None:
        keys.append(Key("parameter", sticky.parameter))
    return Sticky(tuple(keys), sticky.salt or name)


def _rule(rule: ConfigRule) -> Rule:
    on_metadata = [Condition(Key("metadata", key), _test(c)) for key, c in rule.match.metadata.items()]
    on_parameters = [Condition(Key("parameter", key), _test(c)) for key, c in rule.match.parameters.items()]
    return Rule(rule.name, (*on_metadata, *on_parameters), rule.variant)


def _test(condition: ConfigCondition) -> Test:
    if condition.any_of is not None:
        return AnyOf(frozenset(_texts(condition.any_of)))
    if condition.prefix is not None:
        return Prefix(condition.prefix)
    if condition.regex is not None:
        return Regex(condition.regex)
    return Present(condition.present is not False)


def _texts(values: Iterable[Scalar]) -> Iterable[str]:
    return map(as_text, values)
