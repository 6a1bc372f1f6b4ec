"""The servers under attack, each a process of its own, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from processes import Served, gateway, target
from upstreams import FakeTriton


@pytest.fixture(scope="session")
def echo() -> Iterator[Served]:
    """The transport with its default limits and a service that echoes."""
    with target() as served:
        yield served


@pytest.fixture(scope="session")
def triton() -> FakeTriton:
    """What is behind `product`."""
    return FakeTriton()


@pytest.fixture(scope="session")
def product(triton: FakeTriton) -> Iterator[Served]:
    """The whole gateway, in front of a grpcio server."""
    with triton.served() as upstream, gateway(upstream, "server: {reflection: true}\n") as served:
        yield served
