"""I/O: what the store has of a rollout's step, analysed, by a process of its own (`analysis_process`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gateway.experiments.plan import Plan
from gateway.experiments.verdict import GuardrailState

if TYPE_CHECKING:
    from gateway.store.database import Store


@dataclass(frozen=True, slots=True)
class StepQuestion:
    """What one step is to be analysed by."""

    url: str
    unit_key: str | None
    name: str  # of the step's exposures
    rollout: str
    version: int  # of the state
    asked: float  # when, by the store's clock
    plan: Plan | None  # None: units are counted, and nothing is compared

    def answered(self) -> StepAnalysis:
        return analyse_step(self)

    def failed(self, trouble: str) -> StepAnalysis:
        return StepAnalysis(self, trouble=trouble)


@dataclass(frozen=True, slots=True)
class StepAnalysis:
    """What was found."""

    question: StepQuestion
    units: Mapping[str, int] = field(default_factory=dict)  # by variant
    guardrails: tuple[GuardrailState, ...] = ()
    is_mismatched: bool = False
    trouble: str = ""  # why nothing was found


def analyse_step(question: StepQuestion) -> StepAnalysis:
    """:raises StoreAway: if the store can't be used. ImportError: without SciPy."""
    from gateway.store.database import Store  # noqa: PLC0415  (SQLAlchemy, which takes 14 MB)

    store = Store(question.url, question.unit_key)
    try:
        if question.plan is None:
            return StepAnalysis(question, store.arms(question.name))
        return _compared(store, question, question.plan)
    finally:
        store.close()


def _compared(store: Store, question: StepQuestion, plan: Plan) -> StepAnalysis:
    import numpy as np  # noqa: PLC0415

    from gateway.experiments.analysis.experiment import analysed  # noqa: PLC0415
    from gateway.experiments.units import join  # noqa: PLC0415

    units = join(plan, store.exposures(question.name), store.outcomes(question.name, plan.measured))
    if not units.at.size:
        return StepAnalysis(question)
    # What a unit did before this step it may have done on the new variant already: it is no past to adjust by.
    units = units.without_past()
    report = analysed(plan, units, max(units.end, question.asked))
    counts = dict(zip(plan.order, map(int, np.bincount(units.arm, minlength=len(plan.order))), strict=True))
    return StepAnalysis(question, counts, report.guardrails, report.sample_ratio.is_mismatched)
