"""I/O: what the store has of a rollout's step, judged in a process of its own.

The statistics of many units take seconds of Python, for which no call may wait. The process is started by the worker
that decides, when it first needs it, and ends with it, since the pipe between them does.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Final

from gateway.experiments.plan import Plan
from gateway.experiments.verdict import GuardrailState

if TYPE_CHECKING:
    from gateway.store.database import Store

_log = logging.getLogger(__name__)

_NICE: Final = 10  # calls come first
_SHARE: Final = 0.25  # of the time that it works, at most
_LEAST_SECONDS: Final = 1.0  # between two questions
_LAST_SECONDS: Final = 2.0
_MOST_SECONDS: Final = 600.0  # for an answer

# The same modules as here, whatever is in the working directory.
_START: Final = (
    "import sys; number = int(sys.argv[1]); sys.path[:] = sys.argv[2:]; "
    "from gateway.rollout_judge import serve; serve(number)"
)


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be judged of one step."""

    url: str
    unit_key: str | None
    name: str  # of the step's exposures
    rollout: str
    version: int  # of the state
    asked: float  # when, by the store's clock
    plan: Plan | None  # None: units are counted, and nothing is compared


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was found."""

    question: Question
    units: Mapping[str, int] = field(default_factory=dict)  # by variant
    guardrails: tuple[GuardrailState, ...] = ()
    is_mismatched: bool = False
    trouble: str = ""  # why nothing was found


def judged(question: Question) -> Judgement:
    """:raises StoreAway: if the store can't be used. ImportError: without SciPy."""
    from gateway.store.database import Store  # noqa: PLC0415  (SQLAlchemy, which takes 14 MB)

    store = Store(question.url, question.unit_key)
    try:
        if question.plan is None:
            return Judgement(question, store.arms(question.name))
        return _compared(store, question, question.plan)
    finally:
        store.close()


def _compared(store: Store, question: Question, plan: Plan) -> Judgement:
    import numpy as np  # noqa: PLC0415

    from gateway.experiments.analysis.experiment import analysed  # noqa: PLC0415
    from gateway.experiments.units import join  # noqa: PLC0415

    measured = {each.name: bool(each.measure) for each in plan.outcomes}
    measured.update({each.over: False for each in plan.outcomes if each.over and each.over not in measured})
    units = join(plan, store.exposures(question.name), store.outcomes(question.name, measured))
    if not units.at.size:
        return Judgement(question)
    # What a unit did before this step it may have done on the new variant already: it is no past to adjust by.
    units = replace(units, past={name: np.full_like(past, np.nan) for name, past in units.past.items()})
    report = analysed(plan, units, max(units.end, question.asked))
    counts = dict(zip(plan.order, map(int, np.bincount(units.arm, minlength=len(plan.order))), strict=True))
    return Judgement(question, counts, report.guardrails, report.sample_ratio.is_mismatched)


def serve(number: int) -> None:
    """Answer questions until the pipe ends. number: its descriptor."""
    os.nice(_NICE)
    with Connection(number) as pipe, suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            question = pipe.recv()
            try:
                answer = judged(question)
            except Exception as error:  # told, in place of a traceback that nobody reads
                answer = Judgement(question, trouble=f"{type(error).__name__}: {error}"[:300])
            pipe.send(answer)


class Judge:
    """The other end of that process. Of one thread; nothing here waits for an answer."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._asked = 0.0  # on the monotonic clock; 0: no question is open
        self._rests_until = 0.0

    @property
    def is_free(self) -> bool:
        """May another question be asked now?"""
        return not self._asked and time.monotonic() >= self._rests_until

    def ask(self, question: Question) -> None:
        if self._pipe is None:
            self._pipe = self._start()
        try:
            self._pipe.send(question)
            self._asked = time.monotonic()
        except OSError as error:
            self._lost(error)

    def maybe_answer(self) -> Judgement | None:
        if self._pipe is None or not self._asked:
            return None
        try:
            if not self._pipe.poll():
                if time.monotonic() - self._asked > _MOST_SECONDS:
                    raise OSError("no answer")
                return None
            answer: Judgement = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._lost(error)
            return None
        took = time.monotonic() - self._asked
        self._asked = 0.0
        self._rests_until = time.monotonic() + max(_LEAST_SECONDS - took, took * (1.0 / _SHARE - 1.0))
        return answer

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  (our own module)
                [sys.executable, "-c", _START, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the gateway
            )
        return Connection(ours.detach())

    def _lost(self, error: BaseException) -> None:
        _log.warning("the process that judges rollouts has ended: %s", type(error).__name__)
        self.close()
        self._rests_until = time.monotonic() + 10 * _LEAST_SECONDS

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_LAST_SECONDS)
        self._pipe = self._process = None
        self._asked = 0.0
