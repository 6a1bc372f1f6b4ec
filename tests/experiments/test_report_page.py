"""The page of a report: what it draws, and that it is well formed whatever names are."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from gateway.experimentation.report_page import page
from gateway.experiments.analysis.distributions import distributions
from gateway.experiments.analysis.experiment import analysed, looks
from gateway.experiments.plan import Amount, Better, Guardrail, Kind, OutcomeSpec, PerUnit, Plan
from gateway.experiments.records import Exposure, Outcome
from gateway.experiments.units import Units, join

LATENCY = OutcomeSpec("latency", Kind.DURATION, Better.LOWER)
SPENT = OutcomeSpec("spent <b>", Kind.NUMERIC, Better.HIGHER, per_unit=PerUnit.SUM)
PLAN = Plan(
    "spring & summer",
    {"fp32": 1, 'int8"': 1},
    "fp32",
    OutcomeSpec("bought", Kind.BINARY, Better.HIGHER),
    Amount(0.05, is_relative=True),
    guardrails=(Guardrail(LATENCY, Amount(0.1, is_relative=True)),),
    secondary=(SPENT,),
    units=1000,
)


def seen(count: int) -> Units:
    draw = np.random.default_rng(7)
    exposures, outcomes = [], []
    for number in range(count):
        unit, arm, at = f"u{number}", PLAN.order[number % 2], 1.7e9 + 60.0 * number
        exposures.append(Exposure(arm, unit, at))
        outcomes.append(Outcome("bought", float(draw.random() < 0.3), at + 1, unit))
        outcomes.append(Outcome("latency", float(draw.lognormal(-3.0, 0.5)), at + 1, unit))
        outcomes += [Outcome("spent <b>", float(draw.gamma(2.0, 10.0)), at + 2, unit) for _ in range(2)]
    return join(PLAN, exposures, outcomes)


def drawn(text: str) -> dict[str, ElementTree.Element]:
    """The plots by their labels; each is XML of its own."""
    plots = [ElementTree.fromstring(f"<svg{part.partition('</svg>')[0]}</svg>") for part in text.split("<svg")[1:]]
    return {plot.attrib["aria-label"]: plot for plot in plots}


def test_effects_intervals_spreads_and_units_are_drawn() -> None:
    units = seen(1000)
    report = analysed(PLAN, units)
    plots = drawn(page(PLAN, report, list(looks(PLAN, units, 100)), list(distributions(PLAN, units))))
    assert list(plots) == [
        "The effect over time, with its interval",
        "The interval of each outcome, relative to the baseline",
        "How latency is spread in each arm",
        "How spent <b> is spread in each arm",
        "Units by arm beside what was planned",
        "Units by arm over time",
    ]
    intervals = plots["The interval of each outcome, relative to the baseline"]
    assert len(intervals.findall("rect")) == 3
    assert [line.attrib["class"] for line in intervals.findall("line")] == ["zero", "bound"]


def test_a_page_of_few_units_says_that_they_are_few() -> None:
    units = seen(3)
    text = page(PLAN, analysed(PLAN, units), (), list(distributions(PLAN, units)))
    assert text.count("Too few units for a plot yet.") == 2


def test_a_spread_is_in_shares_of_each_arm_and_takes_in_what_is_beyond() -> None:
    latency, spent = distributions(PLAN, seen(1000))
    assert (latency.outcome, latency.what, spent.outcome) == ("latency", "units", "spent <b>")
    for each in (latency, spent):
        assert list(each.shares) == list(PLAN.order)
        assert [sum(shares) for shares in each.shares.values()] == pytest.approx([1.0, 1.0])
    assert spent.medians["fp32"] == pytest.approx(2 * 17, rel=0.15)  # the sum of a unit's two
