"""Config: findings that need more than one field. Pure: a config in, problems out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.config.bandit_check import check_bandit
from gateway.config.experiments import Experiment
from gateway.config.findings import Path, Problem, Severity, known
from gateway.config.models import Model, Sticky
from gateway.config.quota_check import check_quotas
from gateway.config.rollout_check import check_references, check_rollouts
from gateway.config.schema import Config
from gateway.config.units import DISCOVERED, duration_text, is_loopback_host, split_address, split_endpoint
from gateway.config.upstreams import Upstream
from gateway.experiments.plan import MEASURED_SECONDS
from gateway.steps import PartDeclaration

_ANY_HOST = ("0.0.0.0", "::")  # noqa: S104  (compared with, not bound to)
_THIS_HOST = (*_ANY_HOST, "localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Names:
    """Every name that the file defines, also those of invalid entries, so that these are not called unknown."""

    upstreams: tuple[str, ...]
    variants: Mapping[str, tuple[str, ...]]  # by public model
    used: frozenset[str]  # upstreams that some variant uses

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Names:
        models = _mapping(data.get("models"))
        variants = {name: _mapping(_mapping(model).get("variants")) for name, model in models.items()}
        named = [_mapping(variant).get("upstream") for each in variants.values() for variant in each.values()]
        return cls(
            upstreams=tuple(_mapping(data.get("upstreams"))),
            variants={name: tuple(each) for name, each in variants.items()},
            used=frozenset(name for name in named if isinstance(name, str)),
        )


def with_safe_control(config: Config) -> Config:
    """The config with `control: none` if other hosts reach the listener, unless the file sets `control`."""
    if "control" in config.server.model_fields_set or is_loopback_host(split_address(config.listen)[0]):
        return config
    server = config.server.model_copy(update={"control": "none"})
    return config.model_copy(update={"server": server})


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def check(config: Config, names: Names) -> Iterator[Problem]:
    """All problems of `config` that concern more than one field."""
    yield from _listening(config)
    yield from _control(config)
    yield from _deadlines(config)
    yield from _upstreams(config, names)
    yield from _direct(config, names)
    for name, model in config.models.items():
        yield from _variants(("models", name), model, names)
        yield from _references(("models", name), model, names.variants.get(name, ()))
        yield from _calls(("models", name), model, names)
        yield from _sharing(("models", name), model)
        yield from _hedging(("models", name), model, config)
        yield from _wrong_answers(("models", name), model)
    yield from _limits(config)
    yield from check_quotas(config)
    yield from _cycles(config)
    yield from _hidden_names(config)
    yield from _captures(config)
    yield from _experiments(config)
    yield from check_rollouts(config)


def _limits(config: Config) -> Iterator[Problem]:
    """Problems of limits: a Triton model has one limit for all public models that call it."""
    first: dict[tuple[str, str], tuple[str, int | str]] = {}
    for name, model in config.models.items():
        for key, variant in (model.variants or {}).items():
            of, said = first.setdefault((variant.upstream, variant.model), (f"{name}.{key}", variant.limit))
            if said != variant.limit:
                wrong = f"is {variant.limit} here and {said} for {of}, which is the same model of the same upstream"
                yield Problem(("models", name, "variants", key, "limit"), wrong, "give both the same limit")


def _sharing(at: Path, model: Model) -> Iterator[Problem]:
    share = model.share
    if share is not None and share.cache is None and "ttl" in share.model_fields_set:
        path = (*at, "share", "ttl")
        yield Problem(path, "has no effect without 'cache'", "a size for 'cache'", Severity.WARNING)


def _hedging(at: Path, model: Model, config: Config) -> Iterator[Problem]:
    """A slow call's second attempt needs a model that may run twice, and somewhere to go."""
    if model.hedge is None:
        return
    path = (*at, "hedge")
    if not model.retry.on:
        yield Problem(path, "runs slow requests twice, which 'retry: {on: []}' forbids", "one of the two")
    if model.merge is not None:
        yield Problem(path, "holds for no call that 'merge' merges", "one of the two", Severity.WARNING)
    used = [config.upstreams[v.upstream] for v in (model.variants or {}).values() if v.upstream in config.upstreams]
    endpoints = [upstream.endpoints for upstream in used]
    if used and all(len(each) == 1 and not each[0].startswith(DISCOVERED) for each in endpoints):
        wrong = "no variant has a second endpoint for a second attempt"
        yield Problem(path, wrong, "an upstream with several endpoints", Severity.WARNING)


def _wrong_answers(at: Path, model: Model) -> Iterator[Problem]:
    """A wrong answer's call needs a model that may run twice, and another variant."""
    answers = model.answers
    kinds = [key for key in ("finite", "contract") if answers is not None and getattr(answers, key) == "fallback"]
    for key in kinds:
        path = (*at, "answers", key)
        if not model.retry.on:
            yield Problem(path, "runs a request twice, which 'retry: {on: []}' forbids", "'count', or no such 'retry'")
        if model.fallback == () or len(model.variants or {}) == 1:
            wrong = "there is no variant to fall back to, so the call fails where a pool has no other endpoint"
            yield Problem(path, wrong, "another variant, or 'count'", Severity.WARNING)
    if answers is not None and answers.finite == answers.contract == "ignore":
        yield Problem((*at, "answers"), "looks for nothing", "'count' or 'fallback', or no 'answers'")


def _experiments(config: Config) -> Iterator[Problem]:
    """Problems of experiments, alone and beside each other."""
    by_model: dict[str, list[str]] = {}
    for name, experiment in config.experiments.items():
        at: Path = ("experiments", name)
        yield from (Problem((*at, *path), wrong, right) for path, wrong, right in experiment.problems())
        yield from _of_model(at, experiment, config)
        yield from check_bandit(at, experiment, config)
        measured = [key for key, outcome in experiment.outcomes.items() if outcome.measure]
        if measured and experiment.window is not None and experiment.window < MEASURED_SECONDS:
            wrong = (
                f"'{measured[0]}' is measured by the gateway, and may be written {MEASURED_SECONDS:g} s after its call"
            )
            right = "a longer one, or what comes later counts for nothing"
            yield Problem((*at, "window"), wrong, right, Severity.WARNING)
        if experiment.model is not None:
            by_model.setdefault(experiment.model, []).append(name)
    for model, names in by_model.items():
        layers = {config.experiments[name].layer for name in names}
        if len(names) > 1 and (len(layers) > 1 or None in layers):
            path = ("experiments", names[-1], "layer")
            wrong = f"{', '.join(map(repr, names))} are all about '{model}', and a unit can be in one of them only"
            yield Problem(path, wrong, "one 'layer' for all of them, and a 'share' of it for each")
    yield from _layers(config)


def _of_model(at: Path, experiment: Experiment, config: Config) -> Iterator[Problem]:
    name = experiment.model
    if name is None:
        yield Problem((*at, "model"), "is missing", "the public model that it is about")
        return
    model = config.models.get(name)
    if model is None:
        yield Problem((*at, "model"), f"no public model '{name}'", known(tuple(config.models), name))
        return
    if model.variants is None:
        wrong = f"'{name}' is a pipeline, which has no variants"
        yield Problem((*at, "model"), wrong, "a model with variants, such as one that the pipeline calls")
        return
    if model.sticky is None:
        wrong = f"'{name}' has no 'sticky', so nothing says who is a unit"
        yield Problem((*at, "model"), wrong, f"'models.{name}.sticky' with the metadata key that tells a unit")
    if experiment.arms is None:
        arms = [arm for arm, share in (model.split or {}).items() if share > 0.0]
        if len(arms) < 2:
            wrong = f"is missing, and the split of '{name}' has fewer than two variants with a share"
            yield Problem((*at, "arms"), wrong, "shares of at least two of its variants")
        elif experiment.baseline is not None and experiment.baseline not in arms:
            yield Problem((*at, "baseline"), f"no arm '{experiment.baseline}'", known(arms, experiment.baseline))
    plan = dict(experiment.arms or {arm: share for arm, share in (model.split or {}).items() if share > 0.0})
    treatments = plan.keys() - {experiment.baseline or next(iter(plan), "")}
    yield from check_references((*at, "outcomes"), experiment.outcomes, name, model, treatments)
    for arm in experiment.arms or ():
        if arm not in model.variants:
            wrong = f"'{name}' has no variant '{arm}'"
            yield Problem((*at, "arms", arm), wrong, known(tuple(model.variants), arm))


def _layers(config: Config) -> Iterator[Problem]:
    """Problems of experiments that share their units."""
    taken: dict[str, float] = {}
    units: dict[str, tuple[str, Sticky]] = {}
    for name, experiment in config.experiments.items():
        layer, model = experiment.layer, config.models.get(experiment.model or "")
        if layer is None:
            continue
        taken[layer] = taken.get(layer, 0.0) + experiment.share
        if taken[layer] > 1.0 + 1e-9:
            wrong = f"experiments of layer '{layer}' have {taken[layer]:.4g} of its units together"
            yield Problem(("experiments", name, "share"), wrong, "shares whose sum is 1 at most")
        if model is None or model.sticky is None:
            continue
        first, sticky = units.setdefault(layer, (name, model.sticky))
        if (sticky.metadata, sticky.parameter) != (model.sticky.metadata, model.sticky.parameter):
            wrong = f"layer '{layer}' is shared with '{first}', whose model has another 'sticky'"
            yield Problem(("experiments", name, "layer"), wrong, "models that know a unit by the same keys")


def _captures(config: Config) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, capture in enumerate(config.telemetry.capture):
        path = ("telemetry", "capture", index, "model")
        if first.setdefault(capture.model, index) != index:
            yield Problem(path, f"'{capture.model}' is captured twice", "write one entry per model")
        if capture.model not in config.models and config.direct.models == "none":
            yield Problem(path, f"no model '{capture.model}'", known(tuple(config.models), capture.model))


def _listening(config: Config) -> Iterator[Problem]:
    host, port = split_address(config.listen)
    admin_host, admin_port = split_address(config.admin.listen)
    same_host = host == admin_host or host in _ANY_HOST or admin_host in _ANY_HOST
    if port and port == admin_port and same_host:
        yield Problem(
            ("admin", "listen"),
            f"'{config.admin.listen}' collides with listen '{config.listen}'",
            "choose another port",
        )
    if port == 0 and config.workers > 1:
        yield Problem(
            ("workers",), f"{config.workers} workers cannot share port 0", "set a fixed port in 'listen', or 1 worker"
        )
    for name, upstream in config.upstreams.items():
        for index, endpoint in enumerate(upstream.endpoints):
            to_host, to_port = split_endpoint(endpoint)
            itself = (
                to_host == host or (host in _ANY_HOST and to_host in _THIS_HOST) or {host, to_host} <= set(_THIS_HOST)
            )
            if to_port == port and itself:
                path = ("upstreams", name, "endpoints", index)
                yield Problem(
                    path, f"'{endpoint}' is where this gateway listens", "give the address of a Triton server"
                )


def _control(config: Config) -> Iterator[Problem]:
    if config.server.control == "loopback" and not is_loopback_host(split_address(config.listen)[0]):
        wrong = (
            f"'loopback' also lets in every caller that a proxy or sidecar on this host forwards to '{config.listen}'"
        )
        yield Problem(
            ("server", "control"),
            wrong,
            "say 'none', or leave the key out, which has the same effect here",
            Severity.WARNING,
        )


def _deadlines(config: Config) -> Iterator[Problem]:
    default, most = config.server.default_deadline, config.server.max_deadline
    if default is not None and most is not None and default > most:
        wrong = f"is {duration_text(default)}, above max_deadline"
        yield Problem(("server", "default_deadline"), wrong, f"at most {duration_text(most)}")


def _upstreams(config: Config, names: Names) -> Iterator[Problem]:
    for name, upstream in config.upstreams.items():
        first: dict[str, int] = {}
        for index, endpoint in enumerate(upstream.endpoints):
            if first.setdefault(endpoint.lower(), index) != index:
                path = ("upstreams", name, "endpoints", index)
                yield Problem(path, f"'{endpoint}' is listed twice", "write each endpoint once")
        yield from _subset(("upstreams", name), upstream, config)
        if name not in names.used and config.direct.models != "all":
            yield Problem(("upstreams", name), "no variant uses it", "", Severity.WARNING)


def _subset(at: Path, upstream: Upstream, config: Config) -> Iterator[Problem]:
    if upstream.subset is None:
        return
    path, count = (*at, "subset"), len(upstream.endpoints)
    if upstream.subset >= count and not any(endpoint.startswith(DISCOVERED) for endpoint in upstream.endpoints):
        wrong = f"has no effect: {upstream.subset} of {count} {'endpoint' if count == 1 else 'endpoints'} are all"
        yield Problem(path, wrong, "fewer than there are endpoints, or leave it out", Severity.WARNING)
    if config.server.control == "all":
        wrong = (
            "keeps RPCs that change servers, which server.control allows, from this upstream: they would not reach all"
        )
        yield Problem(path, wrong, "server.control: none, or no subset", Severity.WARNING)


def _direct(config: Config, names: Names) -> Iterator[Problem]:
    direct = config.direct
    if direct.upstream is not None and direct.upstream not in names.upstreams:
        path = ("direct", "upstream")
        yield Problem(path, f"no upstream '{direct.upstream}'", known(names.upstreams, direct.upstream))
    elif direct.models == "all" and direct.upstream is None and len(names.upstreams) > 1:
        right = f"set direct.upstream to one of: {', '.join(names.upstreams)}"
        yield Problem(("direct",), "does not say which upstream gets the names that no variant uses", right)
    elif direct.models != "all" and direct.upstream is not None:
        path = ("direct", "upstream")
        yield Problem(
            path, f"has no effect with direct.models '{direct.models}'", "direct.models: all", Severity.WARNING
        )
    if not names.variants and direct.models != "all":
        yield Problem(("models",), "there is nothing to serve", "a public model, or direct.models: all")


def _variants(at: Path, model: Model, names: Names) -> Iterator[Problem]:
    first: dict[tuple[str, str, str], str] = {}
    for name, variant in (model.variants or {}).items():
        path = (*at, "variants", name)
        if variant.upstream not in names.upstreams:
            right = known(names.upstreams, variant.upstream)
            yield Problem((*path, "upstream"), f"no upstream '{variant.upstream}'", right)
        twin = first.setdefault((variant.upstream, variant.model, variant.version), name)
        if twin != name:
            yield Problem(
                path, f"is the same as variant '{twin}'", "choose another model, version or upstream", Severity.WARNING
            )


def _references(at: Path, model: Model, variants: Sequence[str]) -> Iterator[Problem]:
    """Problems of split, rules and fallback, which must name variants of this model."""
    named: list[tuple[Path, str]] = [((*at, "split", name), name) for name in model.split or ()]
    named += [((*at, "fallback", index), name) for index, name in enumerate(model.fallback or ())]
    named += [((*at, "rules", index, "variant"), rule.variant) for index, rule in enumerate(model.rules)]
    named += [((*at, "shadow", name), name) for name in model.shadow]
    for path, name in named:
        if name not in variants:
            yield Problem(path, f"no variant '{name}'", known(variants, name))
    yield from _twice((*at, "fallback"), (), model.fallback or ())
    yield from _twice((*at, "rules"), ("name",), [rule.name for rule in model.rules])


def _twice(at: Path, below: Path, names: Sequence[str]) -> Iterator[Problem]:
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Problem((*at, index, *below), f"'{name}' is listed twice", "write each name once")


def _called(model: Model) -> list[tuple[Path, str]]:
    """The public models that a pipeline calls, each with its path in the file."""
    if model.pipeline is None:
        return []
    return list(_calls_of(("pipeline", "steps"), model.pipeline.steps))


def _calls_of(at: Path, parts: Sequence[PartDeclaration]) -> Iterator[tuple[Path, str]]:
    for index, part in enumerate(parts):
        if part.call is not None:
            yield (*at, index, "call"), part.call
        if part.fan_out is not None:
            yield from _calls_of((*at, index, "fan_out", "steps"), part.fan_out.steps)


def _calls(at: Path, model: Model, names: Names) -> Iterator[Problem]:
    for path, name in _called(model):
        if name not in names.variants:
            yield Problem((*at, *path), f"no public model '{name}'", known(tuple(names.variants), name))


def _cycles(config: Config) -> Iterator[Problem]:
    """Problems of calls that lead back to their own pipeline."""
    calls = {name: [called for _, called in _called(model)] for name, model in config.models.items()}
    for name, model in config.models.items():
        for path, called in _called(model):
            way = _way(calls, called, name)
            if way:
                wrong = f"calls itself: {' → '.join((name, *way))}"
                yield Problem(("models", name, *path), wrong, "call a model that does not lead back here")


def _way(calls: Mapping[str, Sequence[str]], start: str, goal: str) -> tuple[str, ...]:
    """The models on the way from `start` to `goal`, both included; () if there is none."""
    ways: list[tuple[str, ...]] = [(start,)]
    seen = {start}
    for way in ways:
        if way[-1] == goal:
            return way
        fresh = [name for name in calls.get(way[-1], ()) if name not in seen]
        seen.update(fresh)
        ways += [(*way, name) for name in fresh]
    return ()


def _hidden_names(config: Config) -> Iterator[Problem]:
    """Warnings about Triton models that a public model of the same name hides from direct calls."""
    if config.direct.models == "none":
        return
    for name, model in config.models.items():
        for variant_name, variant in (model.variants or {}).items():
            if variant.model != name and variant.model in config.models:
                path = ("models", name, "variants", variant_name, "model")
                wrong = f"'{variant.model}' is also a public model, and calls of that name reach the public model"
                yield Problem(path, wrong, "choose another public name if they should reach this one", Severity.WARNING)
