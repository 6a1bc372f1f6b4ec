"""Servers that keep books, for any test of this folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from books import Sent, Servers, Write
from ledger import LARGE
from traffic import config, write


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    made = Servers(tmp_path)
    yield made
    for server in made.made:
        with contextlib.suppress(ProcessLookupError):
            server.kill()


@pytest.fixture(params=[Sent("off", 32), Sent("auto", LARGE)], ids=["as bytes", "in shared memory"])
def sent(request: pytest.FixtureRequest) -> Sent:
    return cast("Sent", request.param)


@pytest.fixture
def write_config(tmp_path: Path) -> Write:
    """Writes a config with the model `m` on these endpoints."""

    def write_one(*endpoints: str, shared_memory: str = "off", **more: object) -> Path:
        main = {"endpoints": list(endpoints), "probe_interval": "500ms", "shared_memory": shared_memory}
        upstreams = {"main": main}
        models = {"m": {"variants": {"only": {"upstream": "main", "model": "echo"}}}}
        return write(tmp_path / "gateway.yaml", config(upstreams, models, **more))

    return write_one
