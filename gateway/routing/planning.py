"""routing (pure): from a route and a request's facts to a plan: the variants to try, in order, and the reason.

The variant that is chosen is the first of these that applies:

1. the first rule that matches;
2. with a sticky key, its arm of the first experiment that is about it ("experiment:<name>", "holdout:<name>",
   "waiting:<name>" before its epoch of a bandit has begun, and "stopped:<name>" once it has ended);
3. the only variant with a share ("only"; "version" if the version that the caller asked for left no other; "direct");
4. with a sticky key, its place in the weighted rendezvous ("sticky");
5. the draw ("split").

While a rollout has a share, a unit that comes by 3 or 4 to the variant that is to be replaced is asked for its place in
the rollout ("rollout:<name>"), and the draw is by shares that have the rollout's in them.

Then comes the route's fallback order, without the chosen one. Variants that are not available now move to the end and
keep their order there: they are tried last, since they may be back by then, and an error can name them all. If the
chosen one had to move, the reason is "fallback". A sticky caller whose variant is unavailable follows the fallback
order as well and is not assigned anew: the fallback order says who has been prepared to take the load, an experiment's
other arms are not filled with callers who did not draw them, and everyone returns when the variant does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gateway.routing.arms import Arms, place_in
from gateway.routing.match import Rule
from gateway.routing.rolling import Rolling
from gateway.routing.table import Route
from gateway.types import EXPERIMENT, ROLLOUT, Facts, Plan, Variant

Available = Callable[[Variant], bool]

_NO_SUCH_VERSION: Final = Plan((), "version")


def plan(route: Route, facts: Facts, *, draw: float, available: Available) -> Plan:
    """A plan for a request. A target that pins no version is to be asked for `facts.version`.

    draw:     uniform in [0, 1).
    returns:  at least one target, also if none is available; none only if no variant can be the version asked for,
              which is NOT_FOUND.
    """
    ready = choose(route, facts, draw)
    assert ready is not None  # noqa: S101  (it has a draw)
    for target in ready.targets:
        if not available(target):
            return _available_first(ready, available)
    return ready


def choose(route: Route, facts: Facts, draw: float | None = None) -> Plan | None:
    """A plan as if all variants were available; the caller of this function checks that as it goes.

    draw:     uniform in [0, 1). None: what is chosen is to be kept for other requests that are alike.
    returns:  None if the choice takes a draw and there is none; then ask `drawn` for each of those requests.
    """
    narrowed = route.maybe_for_version(facts.version) if facts.version else route
    if narrowed is None:
        return _NO_SUCH_VERSION
    chosen = _maybe_choose(narrowed, facts)
    if chosen is None:
        if draw is None:
            return None
        chosen = "split", narrowed.draws.draw(draw)
    return narrowed.plans[chosen[0]][chosen[1]]


def drawn(route: Route, facts: Facts, draw: float) -> Plan:
    """The plan of one request, when `choose` had none for all that are alike. draw: uniform in [0, 1)."""
    narrowed = route.maybe_for_version(facts.version) if facts.version else route
    if narrowed is None:
        return _NO_SUCH_VERSION
    return narrowed.plans["split"][narrowed.draws.draw(draw)]


def _maybe_choose(route: Route, facts: Facts) -> tuple[str, str] | None:
    """The reason and the name of the chosen variant; None if the choice takes a draw."""
    for rule in route.rules:
        if rule.matches(facts):
            return rule.reason, rule.variant
    if route.experiments and route.sticky is not None:
        unit = route.sticky.maybe_read(facts)
        if unit is not None:
            for experiment in route.experiments:
                assigned = experiment.maybe_assign(unit)
                if assigned is not None:
                    return assigned
    if route.rollout is not None and route.rollout.share > 0.0:
        return _maybe_rolled(route, route.rollout, facts)
    if route.only_variant is not None:
        return route.default_reason, route.only_variant
    if route.sticky and route.rendezvous:
        key = route.sticky.maybe_read(facts)
        if key is not None:
            return "sticky", route.rendezvous.choose(key)
    return None


def _maybe_rolled(route: Route, rollout: Rolling, facts: Facts) -> tuple[str, str] | None:
    """As above, while a rollout has a share."""
    key = route.sticky.maybe_read(facts) if route.sticky else None
    if key is None:
        return None
    name = route.rendezvous.choose(key) if route.rendezvous else route.only_variant
    if name is None or name == rollout.before:
        return rollout.reason, rollout.choose(key)
    return "sticky" if route.rendezvous else route.default_reason, name


def _available_first(ready: Plan, available: Available) -> Plan:
    usable: list[Variant] = []
    others: list[Variant] = []
    for target in ready.targets:
        (usable if available(target) else others).append(target)
    chosen = ready.targets[0]
    if usable and usable[0] != chosen:
        return Plan((*usable, *others), "fallback", chosen.name)
    return Plan((*usable, *others), ready.reason)


@dataclass(frozen=True, slots=True)
class Explanation:
    """A plan, and how it came about."""

    plan: Plan
    lines: tuple[str, ...]  # sentences for people, in the order of the decisions


def explain(route: Route, facts: Facts, *, draw: float, available: Available = lambda _: True) -> Explanation:
    """What `plan` would answer, with every rule that was tried, the hashes or the draw, and the final order."""
    made = plan(route, facts, draw=draw, available=available)
    narrowed = route.maybe_for_version(facts.version)
    lines = []
    if narrowed is not route:
        out = [v for v in route.variants if narrowed is None or v not in narrowed.variants]
        lines += [f"variant {v.name}: out, it is version {v.version} and {facts.version} was asked for" for v in out]
    if narrowed is None:
        return Explanation(made, (*lines, f"no variant can be version {facts.version}"))
    matched, told = _tell_rules(narrowed, facts)
    lines += told
    if matched is None:
        lines += _tell_choice(narrowed, facts, draw)
    lines += _tell_order(made, available)
    return Explanation(made, tuple(lines))


def _tell_rules(route: Route, facts: Facts) -> tuple[Rule | None, list[str]]:
    lines = []
    for rule in route.rules:
        missed = next((c for c in rule.conditions if not c.holds(facts)), None)
        if missed is None:
            lines.append(f"rule {rule.name}: matches, variant {rule.variant}")
            return rule, lines + _tell_forced(route, facts, rule)
        value = missed.key.maybe_read(facts)
        has = "the request has none" if value is None else f"the request has '{value}'"
        lines.append(f"rule {rule.name}: no match, wants {missed}, {has}")
    return None, lines


def _tell_forced(route: Route, facts: Facts, rule: Rule) -> list[str]:
    """The experiments into whose arm a rule takes its calls."""
    unit = route.sticky.maybe_read(facts) if route.sticky else None
    arms = [each.name for each in route.experiments if rule.variant in each.shares and not each.ended_with]
    if not arms:
        return []
    forced = f"arm {rule.variant}, forced by rule {rule.name}"
    if unit is None:
        return [f"experiment {name}: {forced}; not in the data, the request has no sticky key" for name in arms]
    return [f"experiment {name}: {forced}; '{unit}' is left out of the analysis" for name in arms]


def _tell_choice(route: Route, facts: Facts, draw: float) -> list[str]:
    reason, name = _maybe_choose(route, facts) or ("split", route.draws.draw(draw))
    lines = [*_tell_experiments(route, facts), *_tell_rollout(route, facts)]
    if reason.startswith((EXPERIMENT, "holdout:", "waiting:", "stopped:")):
        return lines
    if reason.startswith(ROLLOUT):
        return [*lines, f"{reason}: variant {name}"]
    return [*lines, *_tell_split(route, facts, draw, reason, name)]


def _tell_experiments(route: Route, facts: Facts) -> list[str]:
    unit = route.sticky.maybe_read(facts) if route.sticky else None
    lines = []
    for each in route.experiments:
        if unit is None:
            lines.append(f"experiment {each.name}: not asked, the request has no sticky key")
            continue
        place = place_in(each.layer, unit)
        where = f"'{unit}' is at {place:.4f} of layer '{each.layer}', where it has {each.begin:g} to {each.end:g}"
        assigned = each.maybe_assign(unit)
        if assigned is not None:
            held = f", of which the first {each.holdout:.4g} is held out" if each.holdout else ""
            return [*lines, f"experiment {each.name}: {where}{held}", *_tell_arm(each, unit, *assigned)]
        lines.append(f"experiment {each.name}: {where}: not in it")
    return lines


def _tell_rollout(route: Route, facts: Facts) -> list[str]:
    rollout = route.rollout
    if rollout is None:
        return []
    key = route.sticky.maybe_read(facts) if route.sticky else None
    where = "" if key is None else f"; '{key}' is at {rollout.place(key):.4f}"
    return [
        f"rollout {rollout.name}: the first {rollout.share:.4g} of what '{rollout.before}' would get goes to "
        f"'{rollout.after}'{where}"
    ]


def _tell_arm(arms: Arms, unit: str, reason: str, variant: str) -> list[str]:
    """Which arm, and why."""
    if reason == arms.holdout_reason:
        return [f"{reason}: variant {variant}, the baseline: '{unit}' is held out, so it is in no arm"]
    if reason == arms.ended_reason:
        return [f"{reason}: variant {variant}, which everybody gets since it was stopped"]
    begun = f"{len(arms.epochs)} of {arms.slices} have begun"
    if reason == arms.waiting_reason:
        return [f"{reason}: variant {variant}, the baseline: the epoch of '{unit}' is to come, {begun}"]
    number = arms.maybe_epoch(unit) if arms.slices else None
    told = arms.shares if number is None else arms.epochs[number]
    shares = ", ".join(f"{arm} {share:.4g}" for arm, share in told.items())
    whose = "" if number is None else f", those of epoch {number + 1}, {begun}"
    hashes = [f"  {arm}: hash {found:#018x}" for arm, found in arms.hashes(unit).items()]
    return [f"{reason}: arm {variant}, by the hash of '{unit}' in shares {shares}{whose}", *hashes]


def _tell_split(route: Route, facts: Facts, draw: float, reason: str, name: str) -> list[str]:
    shares = route.split.shares if reason == "sticky" else route.draws.shares
    if reason not in ("split", "sticky"):
        return [f"{reason}: variant {name} is the only one with a share"]
    weights = ", ".join(f"{variant} {share:.4g}" for variant, share in shares.items())
    key = route.sticky.maybe_read(facts) if route.sticky else None
    lines = []
    if route.sticky and key is None:
        lines.append("sticky: the request has none of " + ", ".join(map(str, route.sticky.keys)))
    if key is None or route.rendezvous is None:
        return [*lines, f"split: {draw:.6g} drawn in shares {weights}: variant {name}"]
    lines.append(f"sticky: key '{key}' in shares {weights}: variant {name}")
    return lines + [f"  {variant}: hash {found:#018x}" for variant, found in route.rendezvous.hashes(key).items()]


def _tell_order(made: Plan, available: Available) -> list[str]:
    return [
        f"{number}. {target.name}: model {target.model}"
        + (f" version {target.version}" if target.version else "")
        + f" on {target.upstream}"
        + ("" if available(target) else ", not available")
        for number, target in enumerate(made.targets, 1)
    ]
