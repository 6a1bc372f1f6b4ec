"""The demo's config over the real models on a real Triton, with what a test wants to have changed."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from v2_gateways import gateway_of

from gateway.app import Gateway
from gateway.config import load
from gateway.models import catalogue
from gateway.models.pictures import sample_photo
from gateway.triton import LocalTriton

CHECKOUT = Path(__file__).parents[2]
REPOSITORY = CHECKOUT / "model_repository"

TO_INT8 = ("x-tier", "cheap")
"""Metadata by which a rule sends a call to the quantized variant."""


def write_demo_config(folder: Path, triton: str, **changes: Any) -> Path:
    """The demo's config, a rule more, and `changes` of its sections."""
    text = (CHECKOUT / "deploy/examples/demo.yaml").read_text("utf-8")
    config = yaml.safe_load(text.replace("../../model_repository", str(REPOSITORY)))
    config["models"]["imagenet"]["rules"] = [
        {"name": "cheap", "match": {"metadata": {TO_INT8[0]: TO_INT8[1]}}, "variant": "int8"}
    ]
    config["upstreams"]["local"]["endpoints"] = [triton]
    config |= {"listen": "127.0.0.1:0", "admin": {"listen": "127.0.0.1:0"}, **changes}
    file = folder / "gateway.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    return file


@pytest.fixture(scope="session")
async def real_triton() -> AsyncIterator[LocalTriton]:
    """Serves every model of the repository that needs no GPU."""
    catalogue.build((), REPOSITORY)
    server = LocalTriton(REPOSITORY)
    await server.start()
    yield server
    await server.kill()  # nothing is in flight
    await server.aclose()


@pytest.fixture(scope="session")
async def real_models(real_triton: LocalTriton, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """A gateway with the demo's models and pipelines."""
    file = write_demo_config(tmp_path_factory.mktemp("real"), real_triton.grpc_address)
    async with gateway_of(load(file, {})) as running:
        yield running


@pytest.fixture
def changed_gateway(real_triton: LocalTriton, tmp_path: Path) -> Callable[..., Gateway]:
    """Makes one more, with other settings, to be entered by the test."""

    def make(**changes: Any) -> Gateway:
        return gateway_of(load(write_demo_config(tmp_path, real_triton.grpc_address, **changes), {}))

    return make


def encoded(width: int, height: int, form: str = "JPEG") -> bytes:
    """A picture with something on it."""
    out = io.BytesIO()
    Image.effect_mandelbrot((width, height), (-2, -1.2, 0.8, 1.2), 30).convert("RGB").save(out, form)
    return out.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A few bytes that say they are a picture of this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + bytes(12)


@pytest.fixture(scope="session")
def coffee() -> bytes:
    """A JPEG of a cup of espresso."""
    return sample_photo()
