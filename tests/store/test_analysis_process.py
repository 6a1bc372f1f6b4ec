"""The process that analyses rests between two questions, so that the machine is there for calls."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from questions import Sleeps

from gateway.experimentation.analysis_process import AnalysisProcess


@pytest.fixture
def process() -> Iterator[AnalysisProcess[float]]:
    made: AnalysisProcess[float] = AnalysisProcess()
    yield made
    made.close()


def asked(process: AnalysisProcess[float], seconds: float) -> float:
    """When the next question could be asked; seconds since this one was asked."""
    process.ask(Sleeps(seconds))
    began, end = time.monotonic(), time.monotonic() + 60
    assert not process.is_free
    while process.maybe_answer() is None:
        assert time.monotonic() < end
        time.sleep(0.005)
    while not process.is_free:
        assert time.monotonic() < end
        time.sleep(0.005)
    return time.monotonic() - began


def test_it_works_a_quarter_of_the_time_at_most(process: AnalysisProcess[float]) -> None:
    asked(process, 0.001)  # starts the process
    assert asked(process, 0.4) > 4 * 0.4 - 0.02


def test_it_is_asked_once_a_second_at_most(process: AnalysisProcess[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.experimentation.analysis_process._SHARE", 1.0)
    asked(process, 0.001)  # starts the process
    assert asked(process, 0.001) > 0.98
