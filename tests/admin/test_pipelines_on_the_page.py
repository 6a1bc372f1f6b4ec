"""What is wrong with a pipeline, in any worker, is among what needs attention."""

from __future__ import annotations

from typing import Any

from gateway.admin.aggregate import merged_state
from gateway.admin.alerts import notices

NOBODY: dict[str, Any] = {"models": {}, "upstreams": {}, "names": {}}


def worker(faults: list[str], running: int, oldest: float, waiting: int = 0) -> dict[str, Any]:
    step = {"running": running, "waiting": waiting, "oldest_seconds": oldest}
    pipeline = {"ready": True, "calls": ["m"], "faults": faults, "steps": {"s": step} if running else {}}
    return {**NOBODY, "version": "1", "listen": "", "ready": True, "draining": False, "pipelines": {"p": pipeline}}


def texts(*workers: dict[str, Any]) -> list[str]:
    return [notice["text"] for notice in notices(merged_state(workers), {})]


def test_a_fault_that_any_worker_knows_is_told_once() -> None:
    told = texts(worker(["no output 'logit'"], 0, 0), worker(["no output 'logit'"], 0, 0), worker([], 0, 0))
    assert told == ["does not fit the models that it calls: no output 'logit'"]


def test_a_step_that_runs_for_half_a_minute_is_told_with_all_threads_that_it_holds() -> None:
    assert texts(worker([], 2, 31.0, 4), worker([], 1, 2.0, 1)) == ["step s holds 3 threads, for up to 31 s; 5 wait"]
    assert texts(worker([], 2, 29.0)) == []
