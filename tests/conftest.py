"""Fixtures for every test."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from triton_fixture import triton, triton_factory, triton_repository

__all__ = ["triton", "triton_factory", "triton_repository"]


# How long an example takes, and how fast they are drawn, is no property of what is tested: a machine may be busy.
settings.register_profile("gateway", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gateway")


def pytest_configure() -> None:
    """A shell that runs tests in the background makes them ignore SIGINT, and with them all that they start."""
    _refuse_stale_modules()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _refuse_stale_modules() -> None:
    """A native module that is older than its source would be what is tested, in place of it."""
    package = Path(__file__).parents[1] / "gateway"
    natives = [] if os.environ.get("GATEWAY_NO_EXTENSIONS") else list(package.rglob("*.so"))
    for native in natives:
        source = native.with_name(native.name.partition(".")[0] + ".py")
        if source.exists() and source.stat().st_mtime > native.stat().st_mtime:
            pytest.exit(f"{source} is newer than its native module: `make setup`, or GATEWAY_NO_EXTENSIONS=1", 2)
