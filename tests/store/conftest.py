"""Stores of both kinds, empty for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import BINARIES, Postgres


@pytest.fixture(autouse=True)
def _analysed_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process who analyses does not rest between two questions; `test_analysis_process` is about that."""
    if request.path.name != "test_analysis_process.py":
        monkeypatch.setattr("gateway.experimentation.analysis_process._SHARE", 1.0)
        monkeypatch.setattr("gateway.experimentation.analysis_process._LEAST_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def _leases_that_last(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test makes the looks, who leads keeps the lease however busy the machine is between two of them."""
    for what in ("rollout", "bandit"):
        if request.path.name == f"test_{what}_watch.py":
            monkeypatch.setattr(f"gateway.experimentation.{what}_watch.LEASE", 50.0)


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
