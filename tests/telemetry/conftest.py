"""A call as the core reports it, for every listener's tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from gateway.hooks import AttemptEnded, AttemptStarted, CallEnded, CallStarted, Hooks, Listener, StepEnded
from gateway.status import Code, Meaning
from gateway.telemetry.compose import compose
from gateway.types import Facts, Metadata, Served


@dataclass(frozen=True)
class Attempt:
    """One attempt of a call: how it went and how long it took."""

    variant: str = "onnx"
    endpoint: str = "cpu-0:8001"
    why: str = "split"
    code: Code = Code.OK
    text: str = ""
    meaning: Meaning | None = None
    seconds: float = 0.004
    instead_of: str = ""
    reason: str = ""
    planned: str = "split"
    called: str = ""  # the model, if it is not the call's own: then a pipeline called it


@dataclass(frozen=True)
class Call:
    """One call; it arrives at second 1000 and its parts follow one another without a pause."""

    method: str = "ModelInfer"
    model: str = "photos"
    known: bool = True
    request_id: str = "r-1"
    metadata: Mapping[str, str] = field(default_factory=dict)
    steps: Sequence[tuple[str, float, str]] = ()  # name, seconds, error
    attempts: Sequence[Attempt] = (Attempt(),)
    code: Code = Code.OK
    text: str = ""
    overhead: float = 0.001
    waited: float = 0.0
    request_bytes: int = 1000
    response_bytes: int = 40
    callers_fault: bool = False

    def report_to(self, listener: Listener | Hooks) -> list[Metadata]:
        """Tell the whole call. Returns what each attempt was to send upstream."""
        at = 1000.0
        hooks = compose([listener]) if hasattr(listener, "call_ended") else listener
        observer = hooks.call_started(
            CallStarted(self.method, self.model, self.known, self.request_id, "10.0.0.9:5", at, self.facts())
        )
        for step, seconds, error in self.steps:
            observer.step_ended(StepEnded(step, rows=1, started=at, at=at + seconds, error=error))
            at += seconds
        at += self.waited
        sent = []
        for number, attempt in enumerate(self.attempts, start=1):
            started = AttemptStarted(
                attempt.called or self.model,
                attempt.variant,
                "cpu",
                attempt.endpoint,
                number,
                attempt.why,
                at,
                attempt.instead_of,
                attempt.reason,
                attempt.planned,
            )
            sent.append(observer.attempt_started(started))
            at += attempt.seconds
            observer.attempt_ended(AttemptEnded(attempt.code, attempt.text, attempt.meaning, at))
        sizes = self.request_bytes, self.response_bytes
        observer.ended(
            CallEnded(
                self.code,
                self.text,
                self._served(),
                *sizes,
                at + self.overhead,
                callers_fault=self.callers_fault,
                waited=self.waited,
            )
        )
        return sent

    def facts(self) -> Facts:
        return Facts(metadata=self.metadata)

    def _served(self) -> Served | None:
        if self.code is not Code.OK:
            return None
        last = self.attempts[-1]
        return Served(self.model, last.variant, "1", last.endpoint, len(self.attempts), last.instead_of, last.reason)


FALLEN_BACK = (
    Attempt("tensorrt", "gpu-0:8001", "split", Code.UNAVAILABLE, "connection refused", Meaning.UNREACHABLE, 0.001),
    Attempt("onnx", "cpu-0:8001", "fallback", instead_of="tensorrt", reason="unreachable"),
)


@pytest.fixture
def call() -> Callable[..., Call]:
    return Call


@pytest.fixture
def attempt() -> Callable[..., Attempt]:
    return Attempt


@pytest.fixture
def fallen_back() -> Sequence[Attempt]:
    """The GPU can't be reached, the CPU answers."""
    return FALLEN_BACK
