"""What an experiment says so far, as values that read like an answer. No statistics here, and no files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import Any, Final

from gateway.experiments.plan import Amount, Better, Kind, OutcomeSpec, Plan

NOT_COMPARED: Final = "not compared, since shares changed on the way: weights are for means and proportions"
"""The method of a ratio or a quantile of a bandit."""

_EPOCHS_TOLD: Final = 24  # to people

# The numbers of `units.Account` in words: what there was, and what does not count.
_RECORDS: Final = {
    "exposures": "exposures",
    "units": "units",
    "outcomes": "outcomes",
    "before_exposure": "before exposure",
}
_LEFT_OUT: Final = {
    "repeated_exposures": "repeated exposures",
    "unknown_arms": "exposures to arms that are not in the plan",
    "forced_units": "forced units",
    "units_in_two_arms": "units in two arms",
    "without_propensity": "exposures without propensity",
    "repeated_reports": "repeated reports",
    "without_exposure": "reports without exposure",
    "of_excluded_units": "reports of units that are left out",
    "of_other_names": "reports of other outcomes",
    "after_window": "reports after the window",
    "after_end": "reports after the end",
}


class Judgement(Enum):
    """What an interval says of a difference."""

    BETTER = "better"
    WORSE = "worse"
    EQUIVALENT = "equivalent"  # whatever difference there is, it is smaller than is worth knowing
    UNDECIDED = "undecided"


class Guard(Enum):
    """Where a guardrail stands."""

    HELD = "held"  # it is not so much worse
    BREACHED = "breached"  # it is
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Past:
    """What was reported of units before their exposure, by which an interval was adjusted (CUPED)."""

    units: int  # that have one, of both arms together
    removed: float  # the part of the difference's variance that it took away; 0.4 is 40 %


@dataclass(frozen=True, slots=True)
class Effect:
    """A treatment less the baseline, for one outcome. The intervals hold at all looks at once, at level alpha."""

    outcome: str
    kind: Kind
    better: Better
    arm: str
    baseline: str
    units: int  # of the arm, that count
    baseline_units: int
    value: float  # of the arm
    baseline_value: float
    difference: float
    low: float
    high: float
    relative: float  # of the baseline's value; 0.02 is 2 %
    relative_low: float
    relative_high: float
    p_value: float  # valid at any time: at most x with probability x at most, whenever one looks
    alpha: float
    method: str
    judgement: Judgement
    past: Past | None = None  # None: there was none to adjust by, or the kind of outcome has no use for it

    @property
    def is_reported(self) -> bool:
        """Are there reports of units of both arms?"""
        return min(self.units, self.baseline_units) > 0


@dataclass(frozen=True, slots=True)
class GuardrailState:
    """A guardrail, and its distance."""

    effect: Effect
    worse_by: Amount
    state: Guard


@dataclass(frozen=True, slots=True)
class SampleRatio:
    """Units by arm beside what the shares expect."""

    units: dict[str, int]
    expected: dict[str, float]
    p_value: float
    alpha: float

    @property
    def is_mismatched(self) -> bool:
        return self.p_value <= self.alpha


@dataclass(frozen=True, slots=True)
class SharesOfEpoch:
    """What units of one epoch of a bandit were shared out by."""

    since: float  # Unix time
    shares: dict[str, float]  # by arm: the propensities of its units
    units: dict[str, int]  # by arm, as they came


class Answer(Enum):
    """What to make of it all."""

    TREATMENT = "treatment"  # an arm is better than the baseline, and no guardrail is breached
    BASELINE = "baseline"  # every other arm is worse, or breaches a guardrail
    EQUIVALENT = "equivalent"
    UNDECIDED = "undecided"
    INVALID = "invalid"  # units do not come to arms as planned, so no number is to be trusted


@dataclass(frozen=True, slots=True)
class Report:
    """An experiment at one look."""

    experiment: str
    at: float  # Unix time of the look
    units: int
    answer: Answer
    arm: str  # which is better, or at least not worse; "" where that is open
    primary: tuple[Effect, ...]  # one per treatment
    guardrails: tuple[GuardrailState, ...]
    secondary: tuple[Effect, ...]
    sample_ratio: SampleRatio
    seconds_left: float | None  # to a conclusion at the present rate; None if it cannot be told
    units_left: float | None
    doubts: tuple[str, ...]  # what may be wrong with it
    advice: str
    account: dict[str, int]
    since: float | None = None  # Unix time at which the first unit came
    epochs: tuple[SharesOfEpoch, ...] = ()  # of a bandit, the oldest first

    def as_json(self) -> dict[str, Any]:
        """For machines. What is not finite is null."""
        made: dict[str, Any] = plain(asdict(self))
        made["sample_ratio"]["is_mismatched"] = self.sample_ratio.is_mismatched
        return made

    def lines(self, ended: str = "") -> Iterator[str]:
        """For people. ended: how it was stopped, in place of advice; "" if it was not."""
        yield headline(self)
        yield ""
        yield from self._bandit()
        for effect in self.primary:
            yield f"  {sentence(effect)}"
        for guardrail in self.guardrails:
            yield f"  guardrail {guardrail.state.value}: {guardrail_sentence(guardrail)}"
        for effect in self.secondary:
            yield f"  also: {sentence(effect)}"
        if self.secondary:
            share = f"{self.secondary[0].alpha:.3g} of the {len(self.secondary)} above"
            yield f"  Secondary outcomes share one error rate (Bonferroni): alpha is {share}."
        yield ""
        told = ", ".join(
            f"{arm} {count} of {self.sample_ratio.expected[arm]:.0f} expected"
            for arm, count in self.sample_ratio.units.items()
        )
        verdict = "MISMATCH" if self.sample_ratio.is_mismatched else "as planned"
        ratio = self.sample_ratio
        yield f"  sample ratio {verdict}: {told} (p = {ratio.p_value:.3g}, alarm at {ratio.alpha:g})"
        if len(self.epochs) > _EPOCHS_TOLD:
            yield f"  {len(self.epochs)} epochs, of which these are the last {_EPOCHS_TOLD}:"
        for number, epoch in list(enumerate(self.epochs, 1))[-_EPOCHS_TOLD:]:
            units = ", ".join(f"{arm} {count}" for arm, count in epoch.units.items())
            yield f"  epoch {number} since {moment(epoch.since)}: {shares_text(epoch.shares)}; units: {units}"
        for doubt in self.doubts:
            yield f"  may be wrong: {doubt}"
        yield from self._records()
        yield ""
        yield f"  {ended or self.advice}"

    def _records(self) -> Iterator[str]:
        """What there was, by what method it was judged, and what was left out."""
        if self.since is not None:
            yield f"  units came since {moment(self.since)}; as of {moment(self.at)}"
        effects = (*self.primary, *(each.effect for each in self.guardrails), *self.secondary)
        methods = {effect.outcome: effect.method for effect in effects}
        yield "  methods: " + "; ".join(f"{outcome}: {method}" for outcome, method in methods.items())
        yield "  records: " + self._told(_RECORDS)
        left_out = self.left_out
        if left_out:
            yield f"  left out: {left_out}"

    @property
    def left_out(self) -> str:
        """How many records do not count, and why; "" if all do."""
        return self._told(_LEFT_OUT)

    def _told(self, words: Mapping[str, str]) -> str:
        return ", ".join(f"{self.account[name]} {what}" for name, what in words.items() if self.account[name])

    def _bandit(self) -> Iterator[str]:
        if not self.epochs:
            return
        first, last = self.epochs[0], self.epochs[-1]
        yield (
            f"  A bandit after {len(self.epochs)} epochs: shares followed the reward, from {shares_text(first.shares)} "
            f"to {shares_text(last.shares)}. Units count by the inverse of their propensity."
        )


def shares_text(shares: Mapping[str, float]) -> str:
    """Shares for people, as in: fp32 0.2, int8 0.8."""
    return ", ".join(f"{arm} {share:.3g}" for arm, share in shares.items())


def plain(value: Any) -> Any:  # Any: JSON
    """As JSON has it; what is not finite is None."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def headline(report: Report) -> str:
    """The answer in one line."""
    texts = {
        Answer.TREATMENT: f"'{report.arm}' is better.",
        Answer.BASELINE: f"'{report.arm}', the baseline, is better: no other arm should replace it.",
        Answer.EQUIVALENT: "No arm differs by as much as is worth knowing.",
        Answer.UNDECIDED: "Not decided yet.",
        Answer.INVALID: "No answer: units do not come to arms as planned.",
    }
    return f"{report.experiment}, after {report.units} units: {texts[report.answer]}"


def sentence(effect: Effect, *, is_judged: bool = True) -> str:
    """One effect: by how much, how sure. A guardrail has a judgement of its own."""
    what = f"{effect.outcome} of '{effect.arm}'"
    if math.isnan(effect.value) or math.isnan(effect.baseline_value):
        if effect.method == NOT_COMPARED:
            return f"{what}: {NOT_COMPARED}"
        return f"{what}: nothing reported for {'it' if math.isnan(effect.value) else 'the baseline'}"
    judgement = f", {effect.judgement.value}" if is_judged else ""
    values = f"{_number(effect.value)} against {_number(effect.baseline_value)}"
    interval = f"{_signed(effect.difference)} [{_signed(effect.low)}, {_signed(effect.high)}]"
    relative = f"{_percent(effect.relative)} [{_percent(effect.relative_low)}, {_percent(effect.relative_high)}]"
    return (
        f"{what}: {values}{judgement}; difference {interval}, {relative}, at {1 - effect.alpha:.4g} "
        f"confidence at every look, p = {effect.p_value:.2g}{_adjusted(effect)}"
    )


def _adjusted(effect: Effect) -> str:
    past = effect.past
    if past is None:
        return ""
    units = effect.units + effect.baseline_units
    return f"; the past of {past.units} of {units} units takes {past.removed * 100:.3g} % of the variance away (CUPED)"


def guardrail_sentence(guardrail: GuardrailState) -> str:
    """Its effect, and what is allowed."""
    return f"{sentence(guardrail.effect, is_judged=False)} (at most {amount(guardrail.worse_by)} worse)"


def amount(given: Amount) -> str:
    """ "2 %" or "0.02"."""
    return f"{given.size * 100:g} %" if given.is_relative else f"{given.size:g}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _signed(value: float) -> str:
    return f"{value:+.4g}"


def moment(at: float) -> str:
    """A Unix time for people, to the minute."""
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _percent(value: float) -> str:
    return f"{value * 100:+.3g} %" if math.isfinite(value) else ("?" if math.isnan(value) else f"{value:+.0f}")


def good(low: float, high: float, better: Better) -> tuple[float, float]:
    """The interval turned so that more is better."""
    return (low, high) if better is Better.HIGHER else (-high, -low)


def judged(
    low: float, high: float, relative: tuple[float, float], spec: OutcomeSpec, worth: Amount | None
) -> Judgement:
    """What the interval says; `worth` is the smallest effect worth knowing, if the outcome has one."""
    least, most = good(low, high, spec.better)
    if least > 0.0:
        return Judgement.BETTER
    if most < 0.0:
        return Judgement.WORSE
    if worth is not None:
        inner = relative if worth.is_relative else (low, high)
        if -worth.size < inner[0] and inner[1] < worth.size:
            return Judgement.EQUIVALENT
    return Judgement.UNDECIDED


def guarded(effect: Effect, worse_by: Amount) -> Guard:
    """Where the guardrail stands that allows so much."""
    interval = (effect.relative_low, effect.relative_high) if worse_by.is_relative else (effect.low, effect.high)
    least, most = good(*interval, effect.better)
    if most < -worse_by.size:
        return Guard.BREACHED
    return Guard.HELD if least > -worse_by.size else Guard.UNDECIDED


def distance(guardrail: GuardrailState) -> float:
    """How much the best that is plausible is above the limit, as the limit is stated.

    Below 0 the guardrail is breached; it is inf while nothing is known.
    """
    effect, limit = guardrail.effect, guardrail.worse_by
    if not effect.is_reported:
        return math.inf
    interval = (effect.relative_low, effect.relative_high) if limit.is_relative else (effect.low, effect.high)
    return good(*interval, effect.better)[1] + limit.size


def decided(
    plan: Plan, primary: tuple[Effect, ...], guardrails: tuple[GuardrailState, ...], sample_ratio: SampleRatio
) -> tuple[Answer, str]:
    """The answer, and the arm that it is about."""
    if sample_ratio.is_mismatched:
        return Answer.INVALID, ""
    breached = {each.effect.arm for each in guardrails if each.state is Guard.BREACHED}
    open_arms = [each for each in primary if each.arm not in breached]
    winners = [each for each in open_arms if each.judgement is Judgement.BETTER]
    if winners:
        sign = 1.0 if plan.primary.better is Better.HIGHER else -1.0
        return Answer.TREATMENT, max(winners, key=lambda each: sign * each.difference).arm
    if all(each.judgement is Judgement.WORSE for each in open_arms):
        return Answer.BASELINE, plan.baseline
    if all(each.judgement in (Judgement.EQUIVALENT, Judgement.WORSE) for each in open_arms):
        return Answer.EQUIVALENT, ""
    return Answer.UNDECIDED, ""


def advised(answer: Answer, arm: str, guardrails: tuple[GuardrailState, ...], plan: Plan, days: float | None) -> str:
    """What to do, in a sentence or two."""
    undecided = [each.effect.outcome for each in guardrails if each.effect.arm == arm and each.state is Guard.UNDECIDED]
    breached = sorted({each.effect.arm for each in guardrails if each.state is Guard.BREACHED})
    stop = f"Take traffic from {', '.join(map(repr, breached))}: a guardrail is breached. " if breached else ""
    wait = "" if days is None else f", about {_days(days)} more at the present rate"
    texts = {
        Answer.TREATMENT: f"Move traffic to '{arm}'."
        if not undecided
        else f"Go on until {', '.join(undecided)} is decided too, or move to '{arm}' if that much risk is acceptable.",
        Answer.BASELINE: f"Keep '{arm}'.",
        Answer.EQUIVALENT: f"Stop: what is left is below {amount(plan.smallest_effect)}. Choose by cost or simplicity.",
        Answer.UNDECIDED: f"Go on{wait}. Looking costs nothing: the error rate holds at every look.",
        Answer.INVALID: "Find out first why: lost exposures, an arm that crashes, a redirect, bots. Then begin anew.",
    }
    return stop + texts[answer]


def _days(days: float) -> str:
    if days < 1.0 / 24:
        return f"{max(1.0, days * 24 * 60):.0f} minutes"
    return f"{days * 24:.0f} hours" if days < 2.0 else f"{days:.0f} days"
