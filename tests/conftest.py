"""Fixtures for every test."""

import signal

from hypothesis import HealthCheck, settings
from triton_fixture import triton, triton_factory, triton_repository

__all__ = ["triton", "triton_factory", "triton_repository"]


# How long an example takes, and how fast they are drawn, is no property of what is tested: a machine may be busy.
# Examples are the same at each run, so that what makes a run fail is what was changed; `make soak` draws new ones.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeated", _PATIENT, derandomize=True)
settings.register_profile("drawn", _PATIENT)
settings.load_profile("repeated")


def pytest_configure() -> None:
    """A shell that runs tests in the background makes them ignore SIGINT, and with them all that they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
