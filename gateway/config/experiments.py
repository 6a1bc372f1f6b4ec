"""Config of experiments: arms, unit, outcomes, guardrails. Schema → `gateway.experiments.plan`; no statistics here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema, model_validator

from gateway.config.findings import Path, known
from gateway.config.section import Section
from gateway.config.units import HOURS, SECONDS, Duration, ModelName, Name, Number, Switch, Whole, refused
from gateway.experiments.plan import Amount, BanditPlan, Better, Guardrail, Kind, Missing, OutcomeSpec, PerUnit, Plan

_PERCENT = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?%", re.ASCII)
_PART = re.compile(r"(\d{1,2}(?:\.\d{1,9})?) ?%", re.ASCII)
_MOST_UNITS = 1_000_000_000
_BETTER: Mapping[str, str] = {"latency": "lower", "error": "lower", "disagreement": "lower", "agreement": "higher"}


def _amount(value: object) -> Amount:
    if isinstance(value, Amount):
        return value
    if isinstance(value, str) and (found := _PERCENT.fullmatch(value)) and float(found[1]) > 0.0:
        return Amount(float(found[1]) / 100.0, is_relative=True)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0.0 < value < 1e300:
        return Amount(float(value), is_relative=False)
    raise refused("")


def _written(amount: Amount) -> str:
    return f"{amount.size * 100!r}%" if amount.is_relative else repr(amount.size)


Size = Annotated[
    Amount,
    PlainValidator(_amount),
    PlainSerializer(_written, return_type=str),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^\d+(\.\d+)? ?%$"},
            ],
            "x-kind": "number or percentage",
            "x-range": "above 0: 2% of the baseline's value, or 0.02 in the outcome's own unit",
        }
    ),
]


def _part(value: object) -> float:
    if isinstance(value, str) and (found := _PART.fullmatch(value)):
        value = float(found[1]) / 100.0
    if isinstance(value, int | float) and not isinstance(value, bool) and 0.0 < value < 1.0:
        return float(value)
    raise refused("")


Part = Annotated[
    float,
    PlainValidator(_part),
    PlainSerializer(lambda part: part, return_type=float),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                {"type": "string", "pattern": r"^\d{1,2}(\.\d+)? ?%$"},
            ],
            "x-kind": "number or percentage",
            "x-range": "above 0 and below 1: 0.05 or 5%",
        }
    ),
]
Level = Annotated[Number, Field(ge=1e-6, le=0.5)]
ShareOfUnits = Annotated[Number, Field(gt=0, le=1_000_000)]


class OutcomeSection(Section):
    """One thing that is measured of each unit."""

    kind: Literal["binary", "numeric", "duration", "ratio", "quantile"] = Field(
        description="`binary`: did any report of the unit say 1. `numeric` and `duration` (seconds): the mean of the "
        "unit's reports. `ratio`: the sum of all reports over their number, or over the sum of `over`; units vary, not "
        "requests. `quantile`: of all reports.",
    )
    better: Literal["higher", "lower"] = Field(description="In which direction it is better.")
    quantile: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Which quantile, for that kind: 0.99 is the 99th percentile.", examples=[0.99]
    )
    over: Name | None = Field(
        default=None, description="For a ratio: the name of the outcome below the line.", examples=["sessions"]
    )
    per_unit: Literal["mean", "sum"] = Field(
        default="mean", description="What several numbers or durations of one unit become."
    )
    measure: Literal["latency", "error", "size", "agreement", "disagreement", "confidence"] | None = Field(
        default=None,
        description="The gateway measures it itself, for each call of a unit that takes part, and nobody reports it. "
        "`latency`: seconds until the answer, to 1 %. `error`: 1 if the call failed by no fault of its caller, else 0. "
        "`size`: bytes of the answer, to 1 %. `agreement`: 1 if the answer agrees with that of variant `reference`, "
        "else 0, for the calls that the model shadows there; `disagreement`: its contrary. `confidence`: the score of "
        "the best class, as the model gives it, to 1 %: the largest along the last axis of `output`, mean of the rows, "
        "of answers up to 1 MiB.",
    )
    reference: Name | None = Field(
        default=None,
        description="Of `agreement` and its contrary: the variant to agree with, a shadow of the model. An arm that is "
        "the reference agrees with itself, so only the baseline may be.",
        examples=["fp32"],
    )
    output: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="Of `confidence`: the output of scores. Without it the only output."
    )
    missing: Literal["excluded", "zero"] = Field(
        default="excluded",
        description="What a unit without a report is, of numbers and durations: left out, or 0, as one that bought "
        "nothing. A binary outcome is 0 then.",
    )

    @model_validator(mode="after")
    def _fitting(self) -> OutcomeSection:
        if (self.kind == "quantile") != (self.quantile is not None):
            raise refused("'quantile' and that kind go together", "kind: quantile with a 'quantile', or neither")
        if self.over is not None and self.kind != "ratio":
            raise refused(f"'over' has no meaning for {self.kind}", "kind: ratio, or no 'over'")
        self._measured()
        for key in ("per_unit", "missing"):
            if key in self.model_fields_set and self.kind not in ("numeric", "duration"):
                raise refused(f"'{key}' has no meaning for {self.kind}", f"kind: numeric or duration, or no '{key}'")
        return self

    def _measured(self) -> None:
        compares = self.measure in ("agreement", "disagreement")
        if self.reference is not None and not compares:
            raise refused("'reference' has no meaning here", "'measure: agreement', or no 'reference'")
        if self.output is not None and self.measure != "confidence":
            raise refused("'output' has no meaning here", "'measure: confidence', or no 'output'")
        if compares and self.reference is None:
            raise refused("does not say with whom", "'reference' with a variant that is a shadow of the model")
        if self.measure == "agreement" and self.kind not in ("numeric", "ratio"):
            right = "kind: numeric or ratio, or 'measure: disagreement' with kind: binary, did any answer disagree"
            raise refused(f"agreement is no {self.kind}", right)
        if self.measure == "disagreement" and self.kind not in ("binary", "numeric", "ratio"):
            raise refused(f"disagreement is no {self.kind}", "kind: binary, did any answer disagree, numeric or ratio")
        better = _BETTER.get(self.measure or "", self.better)
        if better != self.better:
            raise refused(f"'{self.measure}' that is {self.better} is worse", f"better: {better}")
        if self.measure == "confidence" and self.kind in ("binary", "duration"):
            raise refused(f"confidence is no {self.kind}", "kind: numeric, ratio or quantile")

    def spec(self, name: str) -> OutcomeSpec:
        return OutcomeSpec(
            name,
            Kind(self.kind),
            Better(self.better),
            self.quantile or 0.0,
            self.over or "",
            PerUnit(self.per_unit),
            Missing(self.missing),
            self.measure or "",
        )


class GuardrailSection(Section):
    """What may not get worse by so much."""

    worse_by: Size = Field(description="By how much it may be worse than the baseline.", examples=["5%"])


class Bandit(Section):
    """Shares that follow a reward, in epochs (docs/experiments.md, "A bandit").

    Each epoch is for units that had no arm before, and its shares never change; so a unit stays on its arm. Units whose
    epoch is to come have the baseline. Which shares there were is kept in the `store`.
    """

    reward: Name | None = Field(
        default=None,
        description="The outcome that shares follow, by default `primary`: binary, or a mean of numbers or durations.",
        examples=["converted"],
    )
    floor: Part = Field(
        default=0.05,
        description="The least share of each arm. The smaller it is, the less is lost to arms that are worse, and the "
        "less is known of them.",
    )
    epoch: Annotated[float, Duration(1 * SECONDS, 90 * 24 * HOURS)] = Field(
        description="How long an epoch is at least, whose units have the same shares. They are even until the windows "
        "of 100 units of each arm have passed.",
        examples=["1h"],
    )
    epochs: Whole = Field(
        default=20,
        ge=2,
        le=200,
        description="How many there are, an equal part of the units in each. After the last one no shares move.",
    )


def _arms(shares: Mapping[str, float]) -> Mapping[str, float]:
    if len(shares) < 2:
        raise refused("has one arm", "at least two")
    return shares


class Experiment(Section):
    """What a person writes down before an experiment starts (docs/experiments.md)."""

    model: ModelName | None = Field(default=None, description="The public model.", examples=["imagenet"])
    arms: (
        Annotated[
            Mapping[Name, ShareOfUnits],
            Field(min_length=1, max_length=20),
            AfterValidator(_arms),
        ]
        | None
    ) = Field(
        default=None,
        description="Shares of the arms, which are variants of the model; only their proportions count. Without it the "
        "model's `split`.",
        examples=[{"fp32": 50, "int8": 50}],
    )
    baseline: Name | None = Field(
        default=None, description="The arm that others are compared with; by default the first.", examples=["fp32"]
    )
    unit: str = Field(
        default="unit",
        min_length=1,
        max_length=200,
        description="What is assigned to an arm and stays there, in words. In the gateway it is what the model's "
        "`sticky` reads.",
        examples=["x-user-id"],
    )
    layer: Name | None = Field(
        default=None,
        description="Experiments of one layer have different units. Those of different layers do not mind each other. "
        "Two experiments of one model need a layer.",
        examples=["ranking"],
    )
    share: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="The share of the layer's units, or of all units, that take part. Experiments of a layer have "
        "their shares of it in the order of the file, so one that has ended stays there until the others have.",
    )
    holdout: Annotated[Number, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="The share of those units that keep the baseline and are in no arm: what nobody experiments with.",
    )
    request_ids: Switch = Field(
        default=True,
        description="Remember whose each request is, so that outcomes may be reported by its id: a row in the store "
        "for each call that has one. Say false where they are reported by unit.",
    )
    outcomes: Mapping[Name, OutcomeSection] = Field(
        min_length=1, max_length=100, description="What is measured, by the names that reports use."
    )
    primary: Name = Field(description="The one outcome that decides.", examples=["converted"])
    guardrails: Mapping[Name, GuardrailSection] = Field(
        default_factory=dict, description="Outcomes that guard, and what they allow."
    )
    secondary: tuple[Name, ...] = Field(
        default=(), max_length=100, description="Outcomes to know of as well. They share one error rate."
    )
    smallest_effect: Size = Field(
        description="The smallest effect of the primary outcome that is worth knowing.", examples=["2%"]
    )
    alpha: Level = Field(
        default=0.05,
        description="The probability that a difference of the primary outcome is ever called where there is none. "
        "Guardrails together have it as well, and secondary outcomes.",
    )
    sample_ratio_alpha: Level = Field(
        default=0.01, description="The same of the alarm that units do not come to arms as planned."
    )
    units: Whole = Field(
        default=10_000,
        ge=100,
        le=_MOST_UNITS,
        description="About how many units are expected. Intervals are narrowest there, and hold everywhere.",
    )
    window: Annotated[float, Duration(1 * SECONDS, 24 * 365 * HOURS)] | None = Field(
        default=None,
        description="How long after its exposure reports of a unit count. A unit counts once that has passed. Say it "
        "where reports are late. Without it everything counts that has been reported.",
        examples=["24h"],
    )

    bandit: Bandit | None = Field(
        default=None,
        description="Let shares follow a reward, in place of shares that stay. Better arms get more units, and of the "
        "others less is known.",
    )

    def problems(self) -> Iterator[tuple[Path, str, str]]:
        """What concerns more than one key: where, what is wrong, what would be right."""
        if self.bandit is not None:
            yield from self._of_bandit(self.bandit)
        arms, outcomes = tuple(self.arms or ()), tuple(self.outcomes)
        if self.baseline is not None and arms and self.baseline not in arms:
            yield ("baseline",), f"no arm '{self.baseline}'", known(arms, self.baseline)
        named: list[tuple[Path, str]] = [(("primary",), self.primary)]
        named += [(("guardrails", name), name) for name in self.guardrails]
        named += [(("secondary", index), name) for index, name in enumerate(self.secondary)]
        for path, name in named:
            if name not in self.outcomes:
                yield path, f"no outcome '{name}'", known(outcomes, name)
        for index, name in enumerate(self.secondary):
            if name in (self.primary, *self.secondary[:index]):
                yield ("secondary", index), f"'{name}' is named already", "each outcome once"

    def _of_bandit(self, bandit: Bandit) -> Iterator[tuple[Path, str, str]]:
        reward, arms = bandit.reward or self.primary, self.arms or {}
        if bandit.reward is not None and bandit.reward not in self.outcomes:
            yield ("bandit", "reward"), f"no outcome '{bandit.reward}'", known(tuple(self.outcomes), bandit.reward)
        weighed = dict.fromkeys((reward, self.primary, *self.guardrails))
        for name in weighed:
            kind = self.outcomes[name].kind if name in self.outcomes else ""
            if kind in ("ratio", "quantile"):
                wrong = f"{kind} can't be told from units that came to arms with shares that moved"
                yield ("outcomes", name, "kind"), wrong, "kind: binary, numeric or duration, or no 'bandit'"
        if arms and bandit.floor * len(arms) >= 1.0:
            yield ("bandit", "floor"), *too_high(bandit.floor, len(arms))
        if len(set(arms.values())) > 1:
            yield ("arms",), "have shares of their own, and a bandit begins with even ones", "the same for each arm"
        if self.window is None:
            wrong = "is missing, and a bandit learns from units that have had their time to be rewarded"
            yield ("window",), wrong, "how long after a unit's first call its reward may come"
        elif self.window >= bandit.epoch * bandit.epochs:
            wrong = "is as long as all epochs together, so shares would stay even"
            yield ("window",), wrong, "longer or more epochs, or a reward that comes sooner"

    def plan(self, name: str, split: Mapping[str, float] | None = None) -> Plan:
        """The plan, which `problems` has nothing against. split: the model's, for arms that are not given."""
        arms = dict(self.arms or {arm: share for arm, share in (split or {}).items() if share > 0.0})
        specs = {key: each.spec(key) for key, each in self.outcomes.items()}
        bandit = None
        if self.bandit is not None:
            arms = dict.fromkeys(arms, 1.0)
            reward = specs[self.bandit.reward or self.primary]
            bandit = BanditPlan(tuple(arms), reward, self.bandit.floor, self.bandit.epochs, self.bandit.epoch)
        return Plan(
            name=name,
            shares=arms,
            baseline=self.baseline or next(iter(arms)),
            primary=specs[self.primary],
            smallest_effect=self.smallest_effect,
            guardrails=tuple(Guardrail(specs[key], each.worse_by) for key, each in self.guardrails.items()),
            secondary=tuple(specs[key] for key in self.secondary),
            alpha=self.alpha,
            sample_ratio_alpha=self.sample_ratio_alpha,
            units=self.units,
            window=self.window,
            unit=self.unit,
            model=self.model or "",
            bandit=bandit,
        )


def too_high(floor: float, arms: int) -> tuple[str, str]:
    """What is wrong with a floor that leaves nothing to move, and what would be right."""
    return f"{floor:g} for each of {arms} arms leaves nothing to move", f"below {1.0 / arms:.4g}"
