"""Whole gateways for what needs no Triton: their only upstream is not there."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from gateway.app import Gateway, Place
from gateway.config import load


@contextlib.asynccontextmanager
async def running(folder: Path, settings: str) -> AsyncIterator[Gateway]:
    """settings: lines of YAML beside the upstream and its one public model, `adder`."""
    file = folder / "gateway.yaml"
    file.write_text(
        f"""{settings}
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
upstreams: {{main: {{endpoints: ["127.0.0.1:1"]}}}}
models: {{adder: {{variants: {{only: {{upstream: main, model: add_one}}}}}}}}
telemetry: {{access_log: {{destination: none}}}}
"""
    )
    loaded = load(file, {})
    async with Gateway(loaded, lambda: loaded, {}, Place(loaded.config.admin.listen)) as gateway:
        yield gateway
