"""Workers' counts of their pipelines add up, whoever is asked, and go on where a dead worker's ended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.telemetry.pipeline_totals import PipelineTotals
from gateway.telemetry.shared_values import SharedDirectory, prepare_directory

FIRST, SECOND, LATER = (1, 10, 0, 0, 2, 100), (5, 50, 1, 7, 9, 2**62), (2, 20, 0, 0, 4, 200)


@pytest.fixture
def workers(tmp_path: Path) -> list[PipelineTotals]:
    return [PipelineTotals(SharedDirectory(tmp_path, worker)) for worker in "01"]


def of_all(totals: PipelineTotals, pipeline: str) -> list[tuple[int, ...]]:
    return [tuple(numbers) for numbers in totals.of_all(pipeline)]


def test_every_worker_reads_what_each_has_kept_last(workers: list[PipelineTotals]) -> None:
    assert of_all(workers[0], "a") == []
    workers[0].keep("a", FIRST)
    workers[1].keep("b", LATER)
    workers[1].keep("a", SECOND)
    workers[0].keep("a", LATER)
    for totals in workers:
        assert of_all(totals, "a") == [LATER, SECOND]
        assert of_all(totals, "b") == [LATER]


def test_a_worker_that_replaces_a_dead_one_goes_on_in_its_place(workers: list[PipelineTotals], tmp_path: Path) -> None:
    workers[0].keep("b", FIRST)
    workers[0].keep("a", FIRST)
    successor = PipelineTotals(SharedDirectory(tmp_path, "0"))
    assert tuple(successor.own("a")) == FIRST
    assert tuple(successor.own("c")) == ()
    successor.keep("a", LATER)
    assert of_all(workers[1], "a") == [LATER]
    assert of_all(workers[1], "b") == [FIRST]


def test_a_new_supervisor_begins_with_nothing(workers: list[PipelineTotals], tmp_path: Path) -> None:
    workers[0].keep("a", FIRST)
    prepare_directory(tmp_path)
    assert of_all(workers[1], "a") == []


def test_what_was_half_written_is_nobodys(workers: list[PipelineTotals], tmp_path: Path) -> None:
    workers[0].keep("a", FIRST)
    (file,) = tmp_path.iterdir()
    os.truncate(file, file.stat().st_size - 1)
    assert of_all(workers[1], "a") == []
    workers[1].keep("a", SECOND)
    assert of_all(workers[1], "a") == [SECOND]


def test_counts_that_cannot_be_written_disturb_no_call(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    totals = PipelineTotals(SharedDirectory(tmp_path / "nowhere", "0"))
    totals.keep("a", FIRST)
    totals.keep("a", FIRST)
    assert len(caplog.records) == 1
