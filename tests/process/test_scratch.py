"""Folders in the temporary directory go with their owner, or with the next one's start."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from gateway.process.scratch import Scratch, clear

KILLED = """
import os, signal
from gateway.process.scratch import Scratch
print(Scratch("a").path, Scratch("b").path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_folder_goes_with_its_owner(temp: Path) -> None:
    scratch = Scratch("a")
    (scratch.path / "file").touch()
    scratch.close()
    scratch.close()
    assert not list(temp.iterdir())


def test_what_a_killed_owner_left_goes_also_where_no_folder_is_wanted(temp: Path) -> None:
    """A gateway of several workers that was killed is followed by one of one worker."""
    told = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, check=False).stdout.split()
    of_the_dead, of_another_kind = map(Path, told)
    clear("a")
    assert [of_the_dead.exists(), of_another_kind.exists()] == [False, True]


def test_what_a_killed_owner_left_goes_when_the_next_one_comes_and_nothing_else(temp: Path) -> None:
    told = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, check=False).stdout.split()
    of_the_dead, of_another_kind = map(Path, told)
    mine, foreign = Scratch("a"), temp / "somebody-elses-a"
    foreign.mkdir()
    (temp / "inference-gateway-link-a").symlink_to(foreign)
    new = Scratch("a")
    assert not of_the_dead.exists()
    assert all(path.exists() for path in (of_another_kind, mine.path, new.path, foreign))


def test_owners_that_come_at_once_take_no_folder_from_each_other(temp: Path) -> None:
    def come() -> None:
        for _ in range(50):
            mine = Scratch("a")
            kept.append(mine.lock is not None and mine.path.exists())
            mine.close()

    kept: list[bool] = []
    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept == [True] * 400
    assert not list(temp.iterdir())
