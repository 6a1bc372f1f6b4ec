"""routing (pure): the routes in force, as one immutable snapshot, with everything precomputed."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache, partial
from types import MappingProxyType

from mypy_extensions import mypyc_attr

from gateway.routing.arms import Arms
from gateway.routing.match import Rule
from gateway.routing.rendezvous import Rendezvous
from gateway.routing.rolling import Rolling
from gateway.routing.split import Split, Sticky
from gateway.types import Plan, Retry, Variant
from gateway.v2.versions import maybe_version

FORBID: tuple[str, ...] = ()
"""As `Route.fallback`: only the chosen variant may answer."""

ATTEMPTS = 3
"""Default for the attempts of a call in total: two endpoints of one pool, then a fallback."""

RETRY = Retry()
"""What is sent again although it may have been executed, unless the config says otherwise."""

MAX_NAME = 255
"""Characters. A model's name is a directory's name in Triton, so a longer name can't exist and is not looked up."""


@dataclass(frozen=True, slots=True)
class Route:
    """How calls of one public model are answered.

    :raises ValueError: if there is no variant, two have one name, or the split, a rule or the fallback names none.
    """

    model: str
    variants: tuple[Variant, ...]  # in the order of the config, with different names
    split: Split
    sticky: Sticky | None = None
    rules: tuple[Rule, ...] = ()
    fallback: tuple[str, ...] | None = None  # variants after the chosen one, in order; None: all, as listed; or FORBID
    attempts: int = ATTEMPTS  # attempts in total, over all variants and endpoints; at least 1
    retry: Retry = RETRY  # of what may have been executed
    experiments: tuple[Arms, ...] = ()  # that assign units, which the sticky keys tell; the first that wants one has it
    rollout: Rolling | None = None  # that moves units; then nobody is in experiments
    default_reason: str = "only"  # why `only_variant` is chosen, for the plan: "only", "version" or "direct"

    # Precomputed: the only variant with a share, the stable split, and the plans for when all variants are available
    only_variant: str | None = field(init=False, repr=False, compare=False)
    rendezvous: Rendezvous | None = field(init=False, repr=False, compare=False)
    draws: Split = field(init=False, repr=False, compare=False)  # for calls without a sticky key
    plans: Mapping[str, Mapping[str, Plan]] = field(init=False, repr=False, compare=False)  # by reason and variant
    _by_version: Mapping[str, Route | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._validate()
        shares = self.split.shares
        only_variant = next(iter(shares)) if len(shares) == 1 else None
        wheel = Rendezvous(shares, self.sticky.salt) if self.sticky and not only_variant else None
        draws = self.split if self.rollout is None else self.rollout.of_split(self.split)
        object.__setattr__(self, "draws", draws)
        prepared = {
            "only_variant": only_variant,
            "rendezvous": wheel,
            "plans": self._prepare_plans(),
            "_by_version": self._prepare_versions(),
        }
        for name, value in prepared.items():
            object.__setattr__(self, name, value)

    def maybe_for_version(self, version: str) -> Route | None:
        """The route for a request that asks for a version: variants that pin another version are left out.

        The others keep their proportions, and sticky callers stay where they are if their variant is left. If no
        variant with a share is left, the first in fallback order (or as listed) gets everything; if no variant is left,
        the answer is None. A text that is not a version leaves the variants that pin none, and Triton itself refuses
        it.
        """
        if not version:
            return self
        asked = version if version in self._by_version else maybe_version(version) or ""
        return self._by_version.get(asked, self._by_version[""])

    def _validate(self) -> None:
        names = [variant.name for variant in self.variants]
        if not names:
            raise ValueError(f"model '{self.model}' needs a variant")
        if len(set(names)) != len(names):
            raise ValueError(f"model '{self.model}' has two variants of one name")
        if self.attempts < 1:
            raise ValueError(f"model '{self.model}' needs at least 1 attempt")
        rules = [rule.name for rule in self.rules]
        if len(set(rules)) != len(rules):
            raise ValueError(f"model '{self.model}' has two rules of one name")
        mentioned = [name for name, _ in self.split.weights]
        mentioned += [*(rule.variant for rule in self.rules), *(self.fallback or ())]
        mentioned += [name for each in self.experiments for name in each.variants]
        if self.rollout is not None:
            mentioned += [self.rollout.before, self.rollout.after]
        for name in mentioned:
            if name not in names:
                raise ValueError(f"model '{self.model}' has no variant '{name}'")

    def _prepare_plans(self) -> Mapping[str, Mapping[str, Plan]]:
        by_name = {variant.name: variant for variant in self.variants}
        fallback = self._fallback() if self.fallback is None else self.fallback

        def prepared(reason: str, chosen: Iterable[str]) -> Mapping[str, Plan]:
            orders = {name: dict.fromkeys((name, *fallback)) for name in chosen}
            return {name: Plan(tuple(by_name[n] for n in order), reason) for name, order in orders.items()}

        plans = {reason: prepared(reason, self.split.shares) for reason in ("sticky", self.default_reason)}
        plans["split"] = prepared("split", self.draws.shares)
        if self.rollout is not None:
            plans[self.rollout.reason] = prepared(self.rollout.reason, (self.rollout.before, self.rollout.after))
        plans.update({rule.reason: prepared(rule.reason, [rule.variant]) for rule in self.rules})
        for each in self.experiments:
            for reason in (each.reason, each.holdout_reason, each.waiting_reason, each.ended_reason):
                plans[reason] = prepared(reason, each.variants)
        return plans

    def _fallback(self) -> tuple[str, ...]:
        """Every variant as listed. What a rollout has yet to bring in, or has taken back, stands in for no other."""
        rollout = self.rollout
        left_out = None if rollout is None or rollout.is_over else rollout.after
        return tuple(variant.name for variant in self.variants if variant.name != left_out)

    def _prepare_versions(self) -> Mapping[str, Route | None]:
        pins = {variant.version for variant in self.variants}
        return {version: self._maybe_narrowed(version) for version in pins | {""}}

    def _maybe_narrowed(self, version: str) -> Route | None:
        """The route for a version that a variant pins, or, with "", for a version that none pins."""
        left = tuple(variant for variant in self.variants if variant.version in ("", version))
        if left == self.variants:
            return self
        if not left:
            return None
        names = [variant.name for variant in left]
        fallback = None if self.fallback is None else tuple(name for name in self.fallback if name in names)
        rollout = self.rollout
        return replace(
            self,
            variants=left,
            split=self.split.maybe_among(names) or Split.all_to((*(fallback or ()), *names)[0]),
            rules=tuple(rule for rule in self.rules if rule.variant in names),
            fallback=fallback,
            experiments=(),  # whose arms are not all there, so that its units would not be alike
            rollout=rollout if rollout is not None and {rollout.before, rollout.after} <= set(names) else None,
            default_reason="version",
        )


class Direct(Enum):
    """Which Triton models may be called by their own names, beside the public names."""

    ALL = "all"  # every model; names that are not known go to the default upstream
    VARIANTS = "variants"  # models that stand behind a public name
    NONE = "none"


@mypyc_attr(allow_interpreted_subclasses=True)
class Routes:
    """All routes in force; a reload makes a new object. A public name hides a Triton model of the same name.

    public:  routes by public name, in the order of the config.
    """

    __slots__ = ("_elsewhere", "_known", "default_upstream", "direct", "public")

    def __init__(
        self, public: Iterable[Route] = (), *, direct: Direct = Direct.VARIANTS, default_upstream: str = ""
    ) -> None:
        """:raises ValueError: if two routes have one name, or `Direct.ALL` has no upstream to send to."""
        routes = tuple(public)
        self.public: Mapping[str, Route] = MappingProxyType({route.model: route for route in routes})
        self.direct = direct
        self.default_upstream = default_upstream
        if len(self.public) != len(routes):
            raise ValueError("two public models have one name")
        if direct is Direct.ALL and not default_upstream:
            raise ValueError("direct: all needs a default upstream")
        own_names = {} if direct is Direct.NONE else _direct_routes(routes)
        self._known: dict[str, Route] = {**own_names, **self.public}
        # Callers invent these names, so only some are remembered. The cache is not bound to `self`, so that a replaced
        # table is freed at once, and not by a garbage collection.
        self._elsewhere: Callable[[str], Route | None] = lru_cache(1024)(partial(_to_upstream, default_upstream))

    def limited_to(self, covers: Callable[[str, bool], bool], pipelines: Container[str]) -> Routes:
        """The routes of which `covers(name, is_public)` says yes; the others are not known there.

        pipelines: names that are public too. As here, a public name hides the Triton model of the same name, also from
        those who may not use the public one.
        """
        limited = Routes()
        limited.public = MappingProxyType({name: route for name, route in self.public.items() if covers(name, True)})
        limited.direct, limited.default_upstream = self.direct, self.default_upstream
        limited._known = {
            name: route
            for name, route in self._known.items()
            if (covers(name, True) if name in self.public else name not in pipelines and covers(name, False))
        }
        limited._elsewhere = partial(_if_covered, covers, pipelines, self._known, self._elsewhere)
        return limited

    def lookup(self, model: str) -> Route | None:
        """The route for a name that a caller used; None if that model may not be called."""
        route = self._known.get(model)
        if route is None and self.direct is Direct.ALL and 0 < len(model) <= MAX_NAME:
            return self._elsewhere(model)
        return route

    @property
    def names(self) -> list[str]:
        """All names that are known without asking an upstream: public names, and models that may be called directly."""
        return list(dict.fromkeys([*self.public, *self._known]))

    def is_known(self, model: str) -> bool:
        """Is it one of `names`? Their number is bounded, so they may label metrics."""
        return model in self._known


def _to_upstream(upstream: str, model: str) -> Route:
    return _direct_route(model, (upstream,), ATTEMPTS, RETRY)


def _if_covered(
    covers: Callable[[str, bool], bool],
    pipelines: Container[str],
    known: Container[str],
    elsewhere: Callable[[str], Route | None],
    model: str,
) -> Route | None:
    return elsewhere(model) if model not in pipelines and model not in known and covers(model, False) else None


def _direct_routes(public: Iterable[Route]) -> dict[str, Route]:
    """A route for each variant's Triton model under its own name: any version, its upstreams in order of the config.

    If several public models call it, the largest of their `attempts` and the strictest of their `retry` hold.
    """
    found: dict[str, dict[str, None]] = {}  # the upstreams of each model
    attempts: dict[str, int] = {}
    retries: dict[str, Retry] = {}
    for route in public:
        for variant in route.variants:
            model = variant.model
            found.setdefault(model, {})[variant.upstream] = None
            attempts[model] = max(attempts.get(model, 0), route.attempts)
            retries[model] = _stricter(retries.get(model, route.retry), route.retry)
    return {
        model: _direct_route(model, tuple(upstreams), attempts[model], retries[model])
        for model, upstreams in found.items()
    }


def _stricter(one: Retry, other: Retry) -> Retry:
    """What both allow: who says of one public model that it must not run twice says so of what is behind it."""
    return one if one == other else Retry(one.on & other.on, min(one.most, other.most))


def _direct_route(model: str, upstreams: tuple[str, ...], attempts: int, retry: Retry) -> Route:
    names = [model if len(upstreams) == 1 else f"{model}@{upstream}" for upstream in upstreams]
    variants = tuple(Variant(name, upstream, model) for name, upstream in zip(names, upstreams, strict=True))
    return Route(model, variants, Split.all_to(names[0]), attempts=attempts, retry=retry, default_reason="direct")
