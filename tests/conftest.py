"""Fixtures for every test."""

import signal

from triton_fixture import triton, triton_factory, triton_repository

__all__ = ["triton", "triton_factory", "triton_repository"]


def pytest_configure() -> None:
    """A shell that runs tests in the background makes them ignore SIGINT, and with them all that they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
