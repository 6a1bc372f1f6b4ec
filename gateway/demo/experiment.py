"""I/O: `inference-gateway demo --experiment`: a quantised model goes live with evidence, and broken ones do not.

EfficientNet-Lite0 in FP32 serves. Its INT8 variant is compared by a shadow, tried by an experiment and moved to by a
rollout; variants with something wrong with them, made here of the same graph, are rolled out as well, and each is to be
taken back by the guardrail that is meant for it, while users go on calling.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.app import Gateway, Place
from gateway.config import load
from gateway.demo.users import CORRECTED, NEVER_CONTENT, UNIT, Floats, Users, is_shown, photos, scores_of
from gateway.errors import CommandFailed
from gateway.experimentation.reports import source_of, stored_report
from gateway.experiments.verdict import Answer, Report
from gateway.models import broken
from gateway.models.catalogue import build
from gateway.process.scratch import Scratch
from gateway.supervisor import reserve
from gateway.triton import LocalTriton, install
from gateway.triton.command import Signals

_WIDTH: Final = 100  # columns
_FP32, _INT8 = "efficientnet_lite0_onnx", "efficientnet_lite0_onnx_int8"
MODELS: Final = (_FP32, _INT8)
"""That must be built."""
_EXPERIMENT, _COMPARED = "int8-or-fp32", "compared"
_CALLERS: Final = 4
_MOST_SECONDS: Final = 240.0
SHORT_SECONDS: Final = 100.0  # at most, for the short version; its users need a quarter of that on two free cores
_LOOK_SECONDS: Final = 0.5
_QUIET_SECONDS: Final = 8.0  # after which it says for what it waits
_IN_FORCE_SECONDS: Final = 2.0  # in which a decision is in force everywhere (docs/rollouts.md)
_SETTLED: Final = {"promoted", "rolled back"}

_GUARDRAILS: Final = {
    CORRECTED: {"kind": "binary", "better": "lower", "worse_by": 0.15},
    "latency": {"kind": "quantile", "quantile": 0.8, "better": "lower", "measure": "latency", "worse_by": "100%"},
}
_OF_FEW: Final = {
    "doubtful": {"kind": "quantile", "quantile": 0.05, "better": "higher", "measure": "confidence", "worse_by": "30%"},
}
"""Sees what befalls a tenth of the users, which takes four times as many of them."""
_UNITS, _MORE_UNITS = 100, 400
_PARITY: Final = {
    "share": 1,
    "compare": {"classification": {"top": 5}},
    "parity": {"copies": 60, "agreement": 0.8},
}


class NotAsExpected(CommandFailed):
    """Something came out otherwise than it must; the text says what."""


@dataclass(frozen=True, slots=True)
class ScenarioSettings:
    """The settings from the command line. is_short: one variant that is good and one that is not."""

    repository: Path
    listen: str
    admin_listen: str
    is_short: bool


@dataclass(frozen=True, slots=True)
class Case:
    """A variant that is rolled out.

    fault:   what is wrong with it, for people.
    caught:  what must be found in the reason of its end; "" for one that is promoted.
    by:      who is to find that out, for people.
    phase:   where it must end.
    model:   of the repository.
    """

    name: str
    fault: str
    caught: str
    by: str
    phase: str = "rolled back"
    model: str = ""
    is_shadowed: bool = False

    @property
    def public(self) -> str:
        """The public model that moves to it."""
        return f"photos-{self.name}"

    @property
    def rollout(self) -> str:
        return f"to-{self.name}"


_GOOD: Final = Case("int8", "nothing", "", "", "promoted", _INT8, is_shadowed=True)
_NAN: Final = Case("nan", "a weight is NaN", "'nan' is broken", "the fast lane")
_PERTURBED: Final = Case("perturbed", "noise on weights", f"{CORRECTED} of 'perturbed'", "later reports")
_NIGHT: Final = Case("night", "unsure of dark photos, a tenth", "doubtful of 'night'", "p5 of the best score")
_SHORT: Final = (_GOOD, _NAN)
_CASES: Final = (
    _GOOD,
    _PERTURBED,
    Case("gated", "the same, shadowed", "", "the parity gate", "waiting", "perturbed", is_shadowed=True),
    Case("slow", "0.15 s slower", "latency of 'slow'", "p80 of latency"),
    _NAN,
    _NIGHT,
)


def prepare(settings: ScenarioSettings) -> None:
    """Do what takes long once. Blocks.

    :raises CannotServe: if a port is taken.
    :raises NotAsExpected: if the statistics' package is missing.
    :raises LocalTritonError, FetchFailed, BuildFailed, OSError: if this host is unsuitable, or something can't be had.
    """
    for flag, address in (("--listen", settings.listen), ("--admin-listen", settings.admin_listen)):
        with reserve(address, flag):
            pass
    check_installed()
    install()
    build(MODELS, settings.repository, report=lambda line: Console(highlight=False).print(escape(line)))


def check_installed() -> None:
    """:raises NotAsExpected: if the statistics' package is missing."""
    if importlib.util.find_spec("scipy") is None:
        raise NotAsExpected("The experiment needs SciPy for its statistics: pip install 'inference-gateway[local]'")


async def run(settings: ScenarioSettings) -> int:
    """Run it to its end; the exit code.

    :raises NotAsExpected: if anything came out otherwise than it must.
    :raises Stopped: if a signal ends it before.
    """
    signals = Signals()
    with signals.heard():
        await play(settings, Console(highlight=False, width=_WIDTH))
    return 0


# What is run


async def play(settings: ScenarioSettings, console: Console) -> None:
    """Run it to its end, or until it is cancelled.

    :raises NotAsExpected: if anything came out otherwise than it must.
    """
    scratch = Scratch("experiment")
    try:
        await _play(settings, scratch.path, console)
    finally:
        scratch.close()


async def _play(settings: ScenarioSettings, folder: Path, console: Console) -> None:
    cases = _SHORT if settings.is_short else _CASES
    models = [_FP32, *dict.fromkeys(case.model or case.name for case in cases)]
    await asyncio.to_thread(write_models, models, settings.repository, folder / "models")
    console.print(f"[dim]triton:[/] starting with {', '.join(models)}", soft_wrap=True)
    async with LocalTriton(folder / "models", models=models) as triton:
        truth = await asyncio.to_thread(Truth.of, settings.repository)
        file = folder / "gateway.yaml"
        file.write_text(yaml.safe_dump(config(settings, triton.grpc_address, folder, cases), sort_keys=False), "utf-8")
        loaded = load(file, os.environ)
        place = Place(loaded.config.admin.listen)
        async with (
            Gateway(loaded, lambda: load(file, os.environ), os.environ, place) as gateway,
            grpc.aio.insecure_channel(gateway.listen) as channel,
        ):
            console.print(f"[dim]gateway:[/] ready at {gateway.listen}, state at http://{gateway.admin_address}/\n")
            users = Users(channel, truth.photos, truth.labels)
            scenario = Scenario(gateway, users, cases, file, lambda text: console.print(text, soft_wrap=True))
            most = SHORT_SECONDS if settings.is_short else _MOST_SECONDS
            try:
                await scenario.play(most, with_experiment=not settings.is_short)
            finally:
                await users.aclose()
            show(console, scenario, truth)
            await gateway.drain()
    if wrong := list(scenario.wrong()):
        raise NotAsExpected("Not as expected: " + "; ".join(wrong))


_BROKEN: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "perturbed": broken.perturbed,
    "nan": broken.not_a_number,
    "night": broken.worse_at_night,
    "slow": bytes,
}


def write_models(models: Sequence[str], repository: Path, folder: Path) -> None:
    """A repository of these: those that are good as they are, and those that are broken, made of FP32's graph."""
    source = repository / _FP32
    graph = (source / "1" / "model.onnx").read_bytes()
    settings = (source / "config.pbtxt").read_text("utf-8")
    for name in models:
        if name not in _BROKEN:
            shutil.copytree(repository / name, folder / name)
            continue
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "model.onnx").write_bytes(_BROKEN[name](graph))
        shutil.copy(source / "labels.txt", folder / name / "labels.txt")
        own = settings.replace(f'name: "{_FP32}"', f'name: "{name}"')
        if name == "slow":
            own = own.replace('backend: "onnxruntime"', 'backend: "python"')
            (folder / name / "1" / "model.py").write_bytes(broken.slow_program())
        (folder / name / "config.pbtxt").write_text(own, "utf-8")


def config(settings: ScenarioSettings, triton: str, folder: Path, cases: Sequence[Case]) -> Mapping[str, Any]:
    """The gateway's: a public model for each case, so that they do not wait for each other, and one to compare."""
    guardrails = _GUARDRAILS if settings.is_short else _GUARDRAILS | _OF_FEW
    last = _UNITS if settings.is_short else _MORE_UNITS
    steps = [
        {"share": "40%", "soak": "2s", "units": _UNITS},
        {"share": "60%", "soak": "2s", "units": last, "must_hold": True},
    ]
    arms = {"fp32": {"upstream": "local", "model": _FP32}, "int8": {"upstream": "local", "model": _INT8}}
    shared = {"sticky": {"metadata": UNIT}, "answers": {"finite": "fallback"}}
    models: dict[str, Any] = {_COMPARED: {"variants": arms, "split": {"fp32": 50, "int8": 50}, **shared}}
    for case in cases:
        models[case.public] = {
            "variants": {
                "fp32": arms["fp32"],
                case.name: {"upstream": "local", "model": case.model or case.name},
            },
            "split": {"fp32": 1},
            **shared,
            **({"shadow": {case.name: _PARITY}} if case.is_shadowed else {}),
            "rollout": {
                "name": case.rollout,
                "from": "fp32",
                "to": case.name,
                "steps": steps,
                "guardrails": guardrails,
                "units": 400,
            },
        }
    return {
        "listen": settings.listen,
        "admin": {"listen": settings.admin_listen},
        "telemetry": {"access_log": {"destination": "none"}},
        "upstreams": {"local": {"endpoints": [triton]}},
        "models": models,
        "experiments": {
            _EXPERIMENT: {
                "model": _COMPARED,
                "arms": {"fp32": 50, "int8": 50},
                "outcomes": {
                    CORRECTED: {"kind": "binary", "better": "lower"},
                    "latency": {"kind": "duration", "better": "lower", "measure": "latency"},
                },
                "primary": CORRECTED,
                "secondary": ["latency"],
                "smallest_effect": 0.1,
                "alpha": 0.01,  # one in twenty runs of a demo should not call a chance a difference
                "units": 600,
                "window": "10s",  # in which what is measured comes to the store
            }
        },
        "store": {"url": f"sqlite:///{folder}/experiments.db"},
    }


@dataclass(frozen=True, slots=True)
class Truth:
    """What is known beforehand, without a gateway: what FP32 sees, and how far INT8 agrees."""

    photos: Floats
    labels: Sequence[int]
    agreement: float  # the share of photos of which INT8's best class is FP32's
    corrected: float  # the share of users who put INT8's labels right

    @classmethod
    def of(cls, repository: Path) -> Truth:
        """Blocks, for a second or two."""
        given = photos()
        fp32, int8 = (scores_of((repository / name / "1/model.onnx").read_bytes(), given) for name in (_FP32, _INT8))
        labels = [int(label) for label in fp32.argmax(axis=1)]
        shown = float(np.mean([is_shown(scores, label) for scores, label in zip(int8, labels, strict=True)]))
        agreement = float((fp32.argmax(axis=1) == int8.argmax(axis=1)).mean())
        return cls(given, labels, agreement, 1.0 - shown * (1.0 - NEVER_CONTENT))


@dataclass
class Scenario:
    """What happens, and what came of it."""

    gateway: Gateway
    users: Users
    cases: Sequence[Case]
    file: Path
    say: Callable[[str], None]
    began: float = field(default_factory=time.monotonic)
    rollouts: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # by public model
    ended: dict[str, float] = field(default_factory=dict)  # after how many seconds
    report: Report | None = None
    _said: dict[str, str] = field(default_factory=dict)
    _said_at: float = 0.0  # seconds after the beginning

    async def play(self, most: float, *, with_experiment: bool) -> None:
        """Have users call until all is decided, or the time is over. most: seconds."""
        if with_experiment:
            self.users.want(_COMPARED, _EXPERIMENT)
        for case in self.cases:
            self.users.want(case.public, case.rollout)
        self.users.start(_CALLERS)
        while self.users.wanted and self._seconds < most:
            await asyncio.sleep(_LOOK_SECONDS)
            self._look()
            if _COMPARED in self.users.wanted:
                await asyncio.to_thread(self._judge)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _look(self) -> None:
        state: Any = self.gateway.shown.state()  # Any: JSON
        self.rollouts = {each["model"]: each for each in state["rollouts"]}
        for case in self.cases:
            self._follow(case, self.rollouts[case.public])
        if self._seconds > self._said_at + _QUIET_SECONDS:
            self._say_what_it_waits_for()
        others = set(self.users.wanted) - {case.public for case in self.cases if case.phase == "waiting"}
        if not others:
            self.users.wanted.clear()

    def _follow(self, case: Case, now: Mapping[str, Any]) -> None:
        said = f"{now['state']}, {100 * now['share']:.0f} % of users"
        if said != self._said.get(case.name):
            self._said[case.name] = said
            self._say(f"{case.rollout}: {said}{_because(now)}")
        if now["state"] not in _SETTLED:
            return
        seen = self.users.seen[case.public]
        ended = self.ended.setdefault(case.name, self._seconds)
        if seen.after is None and self._seconds > ended + _IN_FORCE_SECONDS:
            seen.begin_check()
        if seen.is_checked:
            self.users.wanted.pop(case.public, None)

    def _say(self, text: str) -> None:
        self._said_at = self._seconds
        self.say(f"[dim]{self._said_at:6.1f} s[/]  {text}")

    def _say_what_it_waits_for(self) -> None:
        sent = sum(each.calls for each in self.users.seen.values())
        open_ = [case for case in self.cases if case.public in self.users.wanted]
        waits = (f"{case.rollout}: {wait}" for case in open_ for wait in self.rollouts[case.public]["waits"][:1])
        self._say(f"[dim]{sent} photos; {escape('; '.join(waits)) or 'the last calls'}[/]")

    def _judge(self) -> None:
        try:
            self.report = stored_report(source_of(str(self.file), None), _EXPERIMENT, history=False).report
        except CommandFailed:  # nobody has taken part yet
            return
        if self.report.answer is not Answer.UNDECIDED:
            self.ended[_EXPERIMENT] = self._seconds
            self.users.wanted.pop(_COMPARED, None)

    def is_as_expected(self, case: Case) -> bool:
        """Has it come to the end that it must, for the reason that is meant?"""
        now = self.rollouts[case.public]
        return bool(now["state"] == case.phase) and case.caught in now["reason"]

    def wrong(self) -> Iterator[str]:
        """What came out otherwise than it must."""
        for case in self.cases:
            now, seen = self.rollouts[case.public], self.users.seen[case.public]
            if not self.is_as_expected(case):
                yield f"{case.rollout} is {now['state']} after {self._seconds:.0f} s{_because(now)}"
            stays = {case.name if case.phase == "promoted" else "fp32"}
            if case.phase in _SETTLED and seen.after is not None and set(seen.after) != stays:
                yield f"after the end of {case.rollout} calls were answered by {', '.join(seen.after)}"
        for model, seen in self.users.seen.items():
            if seen.failures or seen.wrong_in_kind:
                yield f"users of {model} met {dict(seen.failures)} and {seen.wrong_in_kind} answers with NaN"
        if self.report is not None and self.report.answer is not Answer.EQUIVALENT:
            yield f"the experiment says '{self.report.answer.value}'"


# How it is shown


def _because(now: Mapping[str, Any]) -> str:
    """The reason of an end, up to the interval of its difference; `rollout show` has all of it."""
    reason, end, _ = str(now["reason"]).partition("], ")
    return f": {escape(reason + end.rstrip(', '))}" if now["state"] == "rolled back" else ""


def show(console: Console, scenario: Scenario, truth: Truth) -> None:
    """Print what was sent, what shadow and experiment found, and what became of each rollout."""
    seen = scenario.users.seen.values()
    console.print(
        f"\n[bold]sent[/]        {sum(each.calls for each in seen)} photos by as many users, who put "
        f"{sum(each.reports for each in seen)} answers right, later;\n            "
        f"failures that a user saw: {sum(each.failures.total() for each in seen)}, "
        f"answers with NaN: {sum(each.wrong_in_kind for each in seen)}"
    )
    _show_shadows(console, scenario, truth)
    if scenario.report is not None:
        _show_experiment(console, scenario.report, truth)
    night = scenario.users.seen.get(_NIGHT.public)
    if night is not None:
        means = f"{night.mean_score(_NIGHT.name):.2f} of '{_NIGHT.name}' against {night.mean_score('fp32'):.2f} of FP32"
        console.print(f"[bold]on average[/]  the best label's score is {means}: better, but not for all")
    table = Table(title="\nRolled out while users called", title_justify="left")
    for heading in ("variant", "wrong with it", "seen by", "it is", "its calls", "after"):
        table.add_column(heading)
    for case in scenario.cases:
        now, users = scenario.rollouts[case.public], scenario.users.seen[case.public]
        took = scenario.ended.get(case.name)
        table.add_row(
            *(case.name, case.fault, case.by if scenario.is_as_expected(case) else "?", str(now["state"])),
            *(f"{users.variants[case.name]} of {users.calls}", "" if took is None else f"{took:.0f} s"),
        )
    console.print(table)


def _show_shadows(console: Console, scenario: Scenario, truth: Truth) -> None:
    state: Any = scenario.gateway.shown.state()  # Any: JSON
    for each in state["shadows"]:
        results = each["results"]
        compared = results["agreed"] + results["differed"]
        known = f"; without a gateway: {100 * truth.agreement:.1f} %" if each["variant"] == _GOOD.name else ""
        console.print(
            f"[bold]shadow[/]      '{each['variant']}' has the best label of FP32 in "
            f"{100 * results['agreed'] / max(1, compared):.1f} % of {compared} copies{known}"
        )


def _show_experiment(console: Console, report: Report, truth: Truth) -> None:
    lines = [line for line in report.lines() if line]
    console.print(f"[bold]experiment[/]  {escape(lines[0])}", soft_wrap=True)
    for line in lines[1:]:
        console.print(f"            {escape(line.strip())}", soft_wrap=True)
    console.print(
        f"            the truth: {100 * NEVER_CONTENT:.1f} % of users put FP32 right, and "
        f"{100 * truth.corrected:.1f} % INT8"
    )
