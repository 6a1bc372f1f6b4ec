"""What people ask of rollouts, by `inference-gateway rollout` or the admin plane: how they are, and to do something."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Final

from gateway.config import Config
from gateway.config.experiment_file import rollouts_of
from gateway.config.findings import known
from gateway.config.load import load
from gateway.errors import CommandFailed, Misused
from gateway.experimentation.rollout_analysis import StepAnalysis, StepQuestion, analyse_step
from gateway.experimentation.store_settings import store_settings_of
from gateway.experiments.rollout import (
    ENDED,
    Command,
    CommandRefused,
    Evidence,
    Phase,
    RolloutKey,
    RolloutPlan,
    State,
    commanded,
    step_name,
    waits_for,
)
from gateway.experiments.verdict import Guard, distance, guardrail_sentence
from gateway.store import StoreAway, StoreSettings
from gateway.store.database import why_not_there
from gateway.store.rollouts import Decision, RolloutStore

_TRIES: Final = 5  # of a command that others came before


class UnknownRollout(Misused):
    """A name that the config does not have."""


class NotNow(CommandFailed):
    """The rollout is in no state for what was asked."""


@dataclass(frozen=True, slots=True)
class RolloutCommands:
    """The rollouts of a config, and the store that has their state."""

    plans: Mapping[str, RolloutPlan]
    settings: StoreSettings

    @classmethod
    def of(cls, config: Config, url: str | None = None) -> RolloutCommands:
        """url: of the store, instead of the config's."""
        settings = store_settings_of(config)
        return cls(rollouts_of(config), settings if url is None else replace(settings, url=url))

    def plan(self, name: str) -> RolloutPlan:
        """:raises UnknownRollout: if there is none of this name."""
        if name not in self.plans:
            raise UnknownRollout(f"no rollout '{name}'; {known(tuple(self.plans), name)}")
        return self.plans[name]

    @contextmanager
    def _store(self) -> Iterator[RolloutStore]:
        """:raises CommandFailed: if it can't be used, or is not there: what is written to a new one nobody reads."""
        why_not = why_not_there(self.settings.url)
        if why_not:
            raise CommandFailed(why_not)
        try:
            store = RolloutStore(self.settings.url, self.settings.unit_key)
            try:
                yield store
            finally:
                store.close()
        except StoreAway as error:
            raise CommandFailed(f"the store can't be used, and all rollouts stay as they are: {error}") from error

    def do(self, name: str, command: Command, by: str) -> str:
        """Do it, and say what is in force now.

        by: who asked.
        :raises UnknownRollout: if there is no such rollout.
        :raises NotNow: if it is in no state for it.
        :raises CommandFailed: if the store can't be used.
        """
        plan = self.plan(name)
        with self._store() as store:
            for _ in range(_TRIES):
                state = _of(plan, store.history(name))
                try:
                    after = commanded(plan, state, command, by, store.now())
                except CommandRefused as error:
                    raise NotNow(str(error)) from error
                if store.decide(plan, after):
                    return f"{_line(plan, after)}; every replica follows within two seconds"
        raise CommandFailed(f"rollout '{name}' changes too fast; try again")

    def listed(self) -> Iterator[str]:
        """One line for each."""
        with self._store() as store:
            for name, plan in self.plans.items():
                try:
                    yield _line(plan, _of(plan, store.history(name)))
                except NotNow as error:
                    yield f"{name}: {error}"

    def shown(self, name: str) -> Iterator[str]:
        """All that is known of one, analysed anew."""
        plan = self.plan(name)
        with self._store() as store:
            history = store.history(name)
            state, now = _of(plan, history), store.now()
        yield _line(plan, state)
        yield f"  from '{plan.before}' to '{plan.after}' of model '{plan.model}'"
        analysis = self._analysed(plan, state, now)
        if analysis is not None:
            yield from _evidence(plan, state, analysis, now)
        for each in history:
            what = each.state
            step = f"step {what.step + 1}, " if what.phase not in ENDED else ""
            yield f"  {_when(what.at)}  {what.phase.value}, {step}{what.share:g} of units: {what.reason}"

    def _analysed(self, plan: RolloutPlan, state: State, now: float) -> StepAnalysis | None:
        if state.version == 0 or state.step >= len(plan.steps):
            return None
        compared = plan.experiment(state)
        if compared is not None and importlib.util.find_spec("scipy") is None:
            compared = None
        settings, name = self.settings, step_name(plan.name, state.step)
        try:
            return analyse_step(
                StepQuestion(settings.url, settings.unit_key, name, plan.name, state.version, now, compared)
            )
        except StoreAway as error:
            raise CommandFailed(f"the store can't be used: {error}") from error

    def states(self) -> dict[RolloutKey, State]:
        """How far each is.

        :raises CommandFailed: if the store can't be used.
        """
        found = {}
        with self._store() as store:
            for name, plan in self.plans.items():
                history = store.history(name)
                found[plan.key] = history[-1].state if history and history[-1].is_of(plan) else State()
        return found


def commands_of(file: str, url: str | None) -> RolloutCommands:
    """file: a gateway's config. url: of the store, instead of the config's.

    :raises ConfigError: with the findings of the file.
    """
    return RolloutCommands.of(load(file, os.environ).config, url)


def ordered(commands: RolloutCommands, name: str, action: str, by: str) -> tuple[int, Mapping[str, object]]:
    """What the admin plane answers: an HTTP status and JSON values. It waits for the store: on a thread."""
    actions = [each.value for each in Command]
    if action not in actions:
        return 404, {"error": f"no action '{action}'; {known(actions, action)}"}
    try:
        return 200, {"done": commands.do(name, Command(action), by)}
    except UnknownRollout as error:
        return 404, {"error": str(error)}
    except NotNow as error:
        return 409, {"error": str(error)}
    except CommandFailed as error:
        return 503, {"error": str(error)}


def _of(plan: RolloutPlan, history: list[Decision]) -> State:
    """:raises NotNow: if the name was used for another rollout."""
    if not history:
        return State()
    last = history[-1]
    if not last.is_of(plan):
        was = f"from '{last.before}' to '{last.after}' of '{last.model}'"
        raise NotNow(f"the name '{plan.name}' was used for a rollout {was} before; choose another one")
    return last.state


def _line(plan: RolloutPlan, state: State) -> str:
    where = f"step {state.step + 1} of {len(plan.steps)}, " if state.phase not in ENDED else ""
    reason = f": {state.reason}" if state.reason else ""
    return f"{plan.name}: {state.phase.value}, {where}{state.share:.4g} of units get '{plan.after}'{reason}"


def _evidence(plan: RolloutPlan, state: State, analysis: StepAnalysis, now: float) -> Iterator[str]:
    counts = ", ".join(f"{name} {analysis.units.get(name, 0)}" for name in (plan.before, plan.after))
    yield f"  units in this step: {counts}"
    for each in analysis.guardrails:
        left = distance(each)
        told = f", {left:.3g} left" if each.state is not Guard.BREACHED and math.isfinite(left) else ""
        yield f"  guardrail {each.state.value}{told}: {guardrail_sentence(each)}"
    if analysis.is_mismatched:
        yield "  units do not come to variants as planned"
    if state.phase in (Phase.RUNNING, Phase.PAUSED):
        evidence = Evidence(state.step, now, units=analysis.units.get(plan.after, 0), guardrails=analysis.guardrails)
        for reason in waits_for(plan, state, evidence, now):
            yield f"  waits: {reason}"


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
