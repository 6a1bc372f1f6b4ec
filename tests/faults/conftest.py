"""Servers that keep books, for any test of this folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from books import Servers, Write
from traffic import config, write


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    made = Servers(tmp_path)
    yield made
    for server in made.made:
        with contextlib.suppress(ProcessLookupError):
            server.kill()


@pytest.fixture
def write_config(tmp_path: Path) -> Write:
    """Writes a config with the model `m` on these endpoints."""

    def write_one(*endpoints: str, **more: object) -> Path:
        upstreams = {"main": {"endpoints": list(endpoints), "probe_interval": "500ms"}}
        models = {"m": {"variants": {"only": {"upstream": "main", "model": "echo"}}}}
        return write(tmp_path / "gateway.yaml", config(upstreams, models, **more))

    return write_one
