"""A region's file is its owner's, also while gateways start beside each other and sweep."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from gateway.upstream import region
from gateway.upstream.region import Region, is_abandoned, sweep


def test_one_whose_file_another_gateway_has_swept_before_it_was_locked_gets_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, swept = fcntl.flock, []

    def late(fd: int, how: int) -> None:
        if not swept:
            swept.append(0)
            monkeypatch.setattr(region.fcntl, "flock", lock)
            swept[0] = sweep(tmp_path)
        lock(fd, how)

    monkeypatch.setattr(region.fcntl, "flock", late)
    made = Region(tmp_path, 4096)
    assert swept == [1]
    assert {path.name for path in tmp_path.iterdir()} == {made.name}
    assert not is_abandoned(tmp_path, made.name)
    made.close()


def test_gateways_that_start_at_once_keep_what_they_have_made(tmp_path: Path) -> None:
    def start() -> None:
        for _ in range(100):
            sweep(tmp_path)
            made = Region(tmp_path, 4096)
            kept.append((tmp_path / made.name).exists())
            made.close()

    kept: list[bool] = []
    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept == [True] * 800
    assert not list(tmp_path.iterdir())


def test_the_memory_of_a_region_goes_with_the_last_part_that_is_in_use(tmp_path: Path) -> None:
    made = Region(tmp_path, 4096)
    part = made.memory[:10]
    assert not made.close()
    assert not list(tmp_path.iterdir())
    part[0] = 1  # which would end the process if the memory had gone
    part.release()
    assert made.close()
    assert made.close()


def test_one_that_is_not_wanted_any_more_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="canceled"):
        Region(tmp_path, 4096, lambda: False)
    assert not list(tmp_path.iterdir())
