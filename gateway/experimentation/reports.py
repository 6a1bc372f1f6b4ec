"""`inference-gateway experiment list | report | stop | diffs`: what the store has, in words or as JSON."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import fsspec

from gateway.config.experiment_file import load_experiments
from gateway.config.findings import known
from gateway.config.load import load
from gateway.errors import CommandFailed, Misused
from gateway.experimentation.store_settings import store_settings_of
from gateway.experimentation.verdict_analysis import NO_SCIPY, seen_of
from gateway.experiments.epochs import Epochs
from gateway.experiments.plan import Plan
from gateway.experiments.verdict import Report, moment, shares_text
from gateway.store import Stop, StoreAway
from gateway.store.database import why_not_there
from gateway.store.epochs import EpochStore

if TYPE_CHECKING:
    from gateway.experiments.analysis.distributions import Distribution

_LOOKS = 60  # points of a plot


class Unknown(Misused):
    """A name that the config does not have."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where experiments are declared, and where what was seen of them is kept."""

    plans: Mapping[str, Plan]
    url: str
    unit_key: str | None

    def plan(self, name: str) -> Plan:
        """:raises Unknown: if there is none of this name."""
        if name not in self.plans:
            raise Unknown(f"no experiment '{name}'; {known(tuple(self.plans), name)}")
        return self.plans[name]

    @contextmanager
    def store(self) -> Iterator[EpochStore]:
        """:raises CommandFailed: if it can't be used, or is not there."""
        why_not = why_not_there(self.url)
        if why_not:
            raise CommandFailed(why_not)
        try:
            store = EpochStore(self.url, self.unit_key)
            try:
                store.open()
                yield store
            finally:
                store.close()
        except StoreAway as error:
            raise CommandFailed(f"the store can't be used: {error}") from error


def source_of(config: str, url: str | None) -> Source:
    """config: a gateway's config file, or, with the URL of a store, a file with experiments alone.

    :raises ConfigError: with the findings of the file.
    """
    plans = load_experiments(config, os.environ)
    if url is not None:
        return Source(plans, url, None)
    settings = store_settings_of(load(config, os.environ).config)
    return Source(plans, settings.url, settings.unit_key)


def listed(source: Source) -> Iterator[str]:
    """One line per experiment."""
    with source.store() as store:
        stops, epochs = store.stops(), store.epochs(list(source.plans))
        for name, plan in source.plans.items():
            units = store.arms(name)
            arms = ", ".join(f"{arm} {units.get(arm, 0)}" for arm in plan.order)
            stop = stops.get(name)
            state = f"stopped {moment(stop.at)}, everybody gets '{stop.arm}'" if stop else "running"
            yield f"{name:24} {plan.model:20} {state:12} units: {arms}{_bandit(plan, epochs.get(name))}"


def _bandit(plan: Plan, epochs: Epochs | None) -> str:
    if plan.bandit is None:
        return ""
    if epochs is None:
        return "; a bandit of which no epoch has begun"
    shares = shares_text(epochs.so_far[-1].shares)
    return f"; a bandit in epoch {len(epochs.so_far)} of {epochs.slices}: {shares}"


def stop(source: Source, name: str, winner: str | None) -> str:
    """Have everybody get the baseline or the winner. Returns what was done.

    :raises Unknown: if there is no such experiment or arm.
    """
    plan = source.plan(name)
    arm = winner or plan.baseline
    if arm not in plan.shares:
        raise Unknown(f"experiment '{name}' has no arm '{arm}'; {known(plan.order, arm)}")
    with source.store() as store:
        store.stop(Stop(name, arm, time.time()))
    return (
        f"{name}: stopped, everybody gets '{arm}'. Say so in the config, too, before the experiment is taken out there."
    )


@dataclass(frozen=True, slots=True)
class StoredReport:
    """A report now, and what it was on the way here."""

    plan: Plan
    report: Report
    looks: Sequence[Report]
    stop: Stop | None
    spread: Sequence[Distribution] = ()

    @property
    def ended(self) -> str:
        """How it was stopped, in a sentence; "" if it was not."""
        stop = self.stop
        return "" if stop is None else f"It was stopped on {moment(stop.at)}: everybody gets '{stop.arm}'."

    def lines(self) -> Iterator[str]:
        return self.report.lines(self.ended)

    def as_json(self) -> str:
        looks = [look.as_json() for look in self.looks]
        stopped = None if self.stop is None else {"arm": self.stop.arm, "at": self.stop.at}
        return json.dumps(self.report.as_json() | {"looks": looks, "stopped": stopped}, indent=2)


def stored_report(source: Source, name: str, *, history: bool) -> StoredReport:
    """history: also what the report was on the way here.

    :raises CommandFailed: if there are no units yet, or SciPy is missing.
    """
    plan = source.plan(name)
    if importlib.util.find_spec("scipy") is None:
        raise CommandFailed(NO_SCIPY)
    from gateway.experiments.analysis.distributions import distributions  # noqa: PLC0415
    from gateway.experiments.analysis.experiment import analysed, looks  # noqa: PLC0415

    with source.store() as store:
        seen = seen_of(store, plan, time.time())
    units, stop = seen.units, seen.stop
    each = max(1, units.at.size // _LOOKS)
    report = analysed(plan, units, seen.at)
    if not history:
        return StoredReport(plan, report, (), stop)
    return StoredReport(plan, report, tuple(looks(plan, units, each)), stop, tuple(distributions(plan, units)))


def disagreements(config: str, name: str, most: int) -> Iterator[str]:
    """The latest pairs of answers that were kept by shadows of an experiment's model, or of a public model.

    :raises Unknown: if neither has this name, or nothing is kept.
    """
    loaded = load(config, os.environ).config
    experiment = loaded.experiments.get(name)
    model = name if experiment is None else experiment.model or ""
    if model not in loaded.models:
        names = (*loaded.experiments, *loaded.models)
        raise Unknown(f"no experiment and no public model '{name}'; {known(names, name)}")
    keeps = {shadow: each.keep for shadow, each in loaded.models[model].shadow.items() if each.keep is not None}
    if not keeps:
        raise Unknown(f"model '{model}' keeps no disagreements; say 'models.{model}.shadow.VARIANT.keep'")
    kept: list[Mapping[str, Any]] = []
    for directory in {keep.directory for keep in keeps.values()}:
        kept += _kept(directory, model)
    kept.sort(key=lambda each: str(each.get("time")))
    yield f"{model}: {len(kept)} kept" + (f", the latest {most}" if len(kept) > most else "")
    for each in kept[-most:]:
        measures = ", ".join(f"{key} {value:.4g}" for key, value in (each.get("measures") or {}).items())
        request = "can be replayed" if "request" in each else f"digest {str(each.get('request_sha256'))[:12]}"
        yield (
            f"{each.get('time')}  {each.get('variant')} and {each.get('shadow')}: "
            f"{each.get('why') or 'differ'}  {measures}  (request {each.get('request_id') or '-'}, {request})"
        )


def _kept(directory: str, model: str) -> Iterator[Mapping[str, Any]]:
    """Lines of the files of one ring; what can't be read is left out, such as a line that is being written."""
    try:
        files, folder = fsspec.core.url_to_fs(directory)
        paths = sorted(files.ls(folder, detail=False)) if files.exists(folder) else []
    except Exception as error:  # each file system of fsspec raises errors of its own
        raise CommandFailed(f"{directory} can't be read: {error}") from error
    start = f"{quote(model, safe='')}-"
    for path in paths:
        name = path.rpartition("/")[2]
        if not (name.startswith(start) and name.endswith(".jsonl")):
            continue
        with files.open(path, "rb") as opened:
            for line in opened.read().splitlines():
                try:
                    found = json.loads(line)
                except ValueError:
                    continue
                if isinstance(found, dict) and found.get("model") == model:
                    yield found
