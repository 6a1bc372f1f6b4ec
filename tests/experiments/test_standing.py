"""How an experiment stands: what is kept of it from one look to the next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gateway.experiments.analysis.experiment import analysed, looks
from gateway.experiments.plan import Amount, Better, Guardrail, Kind, OutcomeSpec, Plan
from gateway.experiments.records import Exposure, Outcome
from gateway.experiments.standing import MOST_POINTS, first_breaches, following, nothing, standing
from gateway.experiments.units import Units, join
from gateway.experiments.verdict import Guard, Report

BOUGHT = OutcomeSpec("bought", Kind.BINARY, Better.HIGHER)
LATENCY = OutcomeSpec("latency", Kind.DURATION, Better.LOWER)
PLAN = Plan(
    "spring",
    {"old": 1.0, "new": 1.0},
    "old",
    BOUGHT,
    Amount(0.02, is_relative=True),
    guardrails=(Guardrail(LATENCY, Amount(0.1, is_relative=True)),),
    units=1_000,
)


def seen(count: int, slower: float) -> Units:
    rng = np.random.default_rng(4)
    exposures, outcomes = [], []
    for place in range(count):
        unit, at = str(place), 60.0 * place
        exposures.append(Exposure(PLAN.order[place % 2], unit, at))
        outcomes.append(Outcome("bought", float(rng.random() < 0.3), at + 1.0, unit))
        outcomes.append(Outcome("latency", rng.lognormal(-3.0, 0.3) * (1.0 + slower * (place % 2)), at + 1.0, unit))
    return join(PLAN, exposures, outcomes)


def told(report: Report, before: Sequence[Report] = ()) -> dict[str, Any]:
    return standing(report, before, None)


def at(report: Report, when: float, state: Guard | None = None) -> Report:
    """The same at another time, maybe with another state of its guardrail."""
    guardrails = report.guardrails if state is None else tuple(replace(each, state=state) for each in report.guardrails)
    return replace(report, at=when, guardrails=guardrails)


def test_a_breached_guardrail_names_its_arm_and_how_far_beyond_its_limit_it_is() -> None:
    made = told(analysed(PLAN, seen(1_000, slower=0.5)))
    (guardrail,) = made["guardrails"]
    assert (guardrail["arm"], guardrail["outcome"], guardrail["state"]) == ("new", "latency", "breached")
    assert guardrail["distance"] == 0.1 - guardrail["relative_low"] < 0.0
    assert guardrail["text"].startswith("latency of 'new': ")
    assert guardrail["text"].endswith("(at most 10 % worse)")
    assert guardrail["breached_at"] == made["at"]
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_what_has_no_end_yet_is_null() -> None:
    made = told(analysed(PLAN, seen(50, slower=0.5)))
    (guardrail,) = made["guardrails"]
    assert (guardrail["state"], guardrail["distance"], guardrail["breached_at"]) == ("undecided", None, None)
    json.dumps(made, allow_nan=False)


def test_a_breach_is_new_once_whatever_later_looks_say() -> None:
    report = analysed(PLAN, seen(1_000, slower=0.5))
    first = told(report)
    assert [each["outcome"] for each in first_breaches(None, first)] == ["latency"]
    assert first_breaches(nothing("spring", "nobody takes part yet"), first) == first["guardrails"]
    undecided = following(first, told(at(report, report.at + 60.0, Guard.UNDECIDED)))
    assert first_breaches(first, undecided) == []
    again = following(undecided, told(at(report, report.at + 120.0)))
    assert first_breaches(undecided, again) == []
    assert [each["breached_at"] for each in again["guardrails"]] == [report.at]


def test_the_way_to_a_verdict_grows_and_stays_as_long_as_a_plot_is_wide() -> None:
    units = seen(1_000, slower=0.0)
    report = analysed(PLAN, units)
    made = told(report, list(looks(PLAN, units, 10)))
    (first,) = made["primary"]
    assert len(first["path"]) == MOST_POINTS
    for number in range(1, 500):
        made = following(made, told(at(report, report.at + 60.0 * number)))
    times = [point[0] for point in made["primary"][0]["path"]]
    assert times == sorted(times)
    assert (len(times), times[0], times[-1]) == (MOST_POINTS, first["path"][0][0], made["at"])
    gaps = np.diff(times)
    assert gaps.max() <= 4.0 * gaps.mean()  # no part of it is forgotten


def test_nothing_is_followed_by_whatever_comes() -> None:
    made = told(analysed(PLAN, seen(100, slower=0.0)))
    assert following(nothing("spring", "nobody takes part yet"), made) == made
    assert following(made, nothing("spring", "its arms are others")) == nothing("spring", "its arms are others")
