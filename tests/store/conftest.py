"""Stores of both kinds, empty for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import BINARIES, Postgres


@pytest.fixture(autouse=True)
def _judged_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process who judges does not rest between two questions; `test_judge` is about that."""
    if request.path.name != "test_judge.py":
        monkeypatch.setattr("gateway.judge._SHARE", 1.0)
        monkeypatch.setattr("gateway.judge._LEAST_SECONDS", 0.01)


KINDS = ["sqlite", "postgresql"]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    if not BINARIES:
        pytest.skip("PostgreSQL is not here (Debian: postgresql)")
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/experiments.db"
    server: Postgres = request.getfixturevalue("postgres")
    server.empty()
    return server.url
