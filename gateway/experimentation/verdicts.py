"""What experiments say so far, for the page: made by a process of its own, while somebody asks, and kept meanwhile.

A report reads all that was seen of an experiment and counts in Python: seconds for a hundred thousand units. In a
worker calls would wait for that. So it is `inference-gateway experiment report` that runs: with the lowest priority,
one at a time, and for at most a tenth of the time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

_log = logging.getLogger(__name__)

Json = Mapping[str, Any]
"""A report, or what the page gets of it. Any: it is JSON."""

_LEAST_SECONDS: Final = 30.0  # between two reports
_SHARE: Final = 10.0  # times as long as the last took, at least
_MOST_SECONDS: Final = 120.0  # that one may take
_LOWEST: Final = 19  # priority
_LONGEST: Final = 300  # characters of what went wrong


class Verdicts:
    """The latest report of each experiment."""

    def __init__(
        self,
        source: str,
        environ: Mapping[str, str],
        *,
        is_scarce: Callable[[], bool] = lambda: False,
        command: Sequence[str] = (sys.executable, "-m", "gateway"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        source:     the config file.
        environ:    what the file takes from the environment.
        is_scarce:  is there no memory for one more process now?
        """
        self._source = source
        self._environ = dict(environ)
        self._is_scarce = is_scarce
        self._command = command
        self._clock = clock
        self._latest: dict[str, Json] = {}
        self._task: asyncio.Task[None] | None = None
        self._next_at = 0.0

    def latest(self, names: Sequence[str]) -> list[Json]:
        """What is known of these; others follow in a while. Returns at once."""
        self._latest = {name: self._latest[name] for name in names if name in self._latest}
        if names and self._task is None and self._clock() >= self._next_at and not self._is_scarce():
            self._task = asyncio.get_running_loop().create_task(self._ask(tuple(names)))
            self._task.add_done_callback(self._asked)
        return list(self._latest.values())

    async def aclose(self) -> None:
        """End a process that still runs."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _asked(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("unforeseen failure of a report", exc_info=error)

    async def _ask(self, names: Sequence[str]) -> None:
        began = self._clock()
        try:
            for name in names:
                self._latest[name] = await self._report(name)
        finally:
            ended = self._clock()
            self._next_at = ended + max(_LEAST_SECONDS, _SHARE * (ended - began))

    async def _report(self, name: str) -> Json:
        arguments = ("experiment", "report", name, "--config", self._source, "--json")
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self._command, *arguments, stdout=pipe, stderr=pipe, env=self._environ
        )
        try:
            with suppress(OSError):  # it has ended already
                os.setpriority(os.PRIO_PROCESS, process.pid, _LOWEST)
            told, wrong = await asyncio.wait_for(process.communicate(), _MOST_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):  # two classes until Python 3.11
            return {"name": name, "trouble": f"a report takes longer than {_MOST_SECONDS:.0f} s"}
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            lines = wrong.decode(errors="replace").strip().splitlines()
            return {"name": name, "trouble": (lines[-1] if lines else "the report failed")[:_LONGEST]}
        return shown(json.loads(told))


def shown(report: Json) -> Json:
    """What the page shows of a report."""
    guardrails = [
        {**_effect(each["effect"]), "state": each["state"], "worse_by": each["worse_by"]}
        for each in report["guardrails"]
    ]
    looks = [*report["looks"], report]
    return {
        "name": report["experiment"],
        "trouble": None,
        "at": report["at"],
        "units": report["units"],
        "answer": report["answer"],
        "arm": report["arm"],
        "advice": report["advice"],
        "primary": [
            {
                **_effect(effect),
                "path": [
                    [look["at"], *(look["primary"][place][key] for key in ("difference", "low", "high"))]
                    for look in looks
                ],
            }
            for place, effect in enumerate(report["primary"])
        ],
        "guardrails": guardrails,
        "arms": report["sample_ratio"]["units"],
        "expected": report["sample_ratio"]["expected"],
        "doubts": report["doubts"],
        "stopped": report["stopped"],
        "seconds_left": report["seconds_left"],
    }


def _effect(effect: Json) -> Json:
    keys = ("outcome", "arm", "baseline", "better", "value", "baseline_value", "difference", "low", "high", "judgement")
    return {key: effect[key] for key in (*keys, "relative", "relative_low", "relative_high", "alpha")}
