"""Config of rollouts: which variant shall take over from which, in which steps, and what must not get worse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from gateway.config.experiments import Level, OutcomeSection, Part, Size
from gateway.config.findings import Path
from gateway.config.section import Section
from gateway.config.units import HOURS, SECONDS, Duration, Name, Switch, Whole, refused
from gateway.experiments.plan import Guardrail
from gateway.experiments.rollout import RolloutPlan, Step

_LONGEST: Final = 60  # characters; the store knows a step's units by the name, "/" and the step
_UNITS: Final = 100  # below which nothing is said of means, ratios and quantiles


def _short(name: str) -> str:
    if len(name) > _LONGEST:
        raise refused(f"has {len(name)} characters", f"at most {_LONGEST}")
    return name


class RolloutStep(Section):
    """A share of units for the new variant, for a while."""

    share: Part = Field(description="The share of units that get the new variant.", examples=["5%"])
    soak: Annotated[float, Duration(1 * SECONDS, 90 * 24 * HOURS)] = Field(
        description="How long it stays at least.", examples=["30m"]
    )
    units: Whole | None = Field(
        default=None,
        ge=0,
        le=1_000_000_000,
        description="How many units of the new variant must have been seen here. Without it 100 if there are "
        "guardrails, of which little can be told before; else none.",
        examples=[500],
    )
    must_hold: Switch = Field(
        default=False,
        description="Go on only once every guardrail is known to hold. Otherwise it goes on unless one is known to be "
        "breached, or has no report at all.",
    )


class RolloutGuardrail(OutcomeSection):
    """What may not get worse by so much: an outcome as in an experiment, and how much."""

    worse_by: Size = Field(
        description="By how much the new variant may be worse than the old one.", examples=["10%", 0.01]
    )


class Rollout(Section):
    """Moves a model's units from one variant to another in steps, or all of them back (docs/rollouts.md).

    How far it is, is kept in the `store`, so that every replica and a restarted gateway has the same.
    """

    name: Annotated[Name, AfterValidator(_short)] = Field(
        description="Names it in the store. One that has ended stays so: another attempt needs another name.",
        examples=["int8-in-spring"],
    )
    before: Name = Field(alias="from", description="The variant that serves now.", examples=["fp32"])
    after: Name = Field(
        alias="to",
        description="The variant that shall take over. It is nobody's fallback before, unless `fallback` names it.",
        examples=["int8"],
    )
    steps: tuple[RolloutStep, ...] = Field(
        min_length=1,
        max_length=50,
        description="Shares that rise. After the last one all units get the new variant.",
        examples=[[{"share": "1%", "soak": "10m"}, {"share": "25%", "soak": "2h"}]],
    )
    guardrails: Mapping[Name, RolloutGuardrail] = Field(
        default_factory=dict,
        max_length=20,
        description="What takes all units back when it is known to be breached. Without any only what is plainly "
        "broken does: nearly all calls fail, get no answer, or have NaN in it.",
        examples=[{"latency": {"kind": "quantile", "quantile": 0.95, "better": "lower", "measure": "latency"}}],
    )
    alpha: Level = Field(
        default=0.05,
        description="The probability that the guardrails ever take back a variant that breaches none, all steps and "
        "looks together.",
    )
    units: Whole = Field(
        default=10_000,
        ge=100,
        le=1_000_000_000,
        description="About how many units are expected in a step. Intervals are narrowest there, and hold everywhere.",
    )
    request_ids: Switch = Field(
        default=True,
        description="Remember whose each request is, so that outcomes may be reported by its id; as of experiments.",
    )

    def problems(self) -> Iterator[tuple[Path, str, str]]:
        """What concerns more than one key: where, what is wrong, what would be right."""
        if self.before == self.after:
            yield ("to",), f"'{self.after}' is where units come from", "another variant"
        share = 0.0
        for index, step in enumerate(self.steps):
            if step.share <= share:
                yield ("steps", index, "share"), f"{step.share:g} is not above the step before", "shares that rise"
            share = step.share
            if step.must_hold and not self.guardrails:
                yield ("steps", index, "must_hold"), "there are no guardrails", "'guardrails', or no 'must_hold'"

    def plan(self, model: str) -> RolloutPlan:
        """The plan, which `problems` has nothing against."""
        least = _UNITS if self.guardrails else 0
        return RolloutPlan(
            self.name,
            model,
            self.before,
            self.after,
            tuple(
                Step(each.share, each.soak, least if each.units is None else each.units, each.must_hold)
                for each in self.steps
            ),
            tuple(Guardrail(each.spec(key), each.worse_by) for key, each in self.guardrails.items()),
            self.alpha,
            self.units,
        )
