"""Fixtures for every test."""

import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from triton_fixture import triton, triton_factory, triton_repository
from triton_that_died import pytest_runtest_makereport, pytest_runtest_protocol, pytest_terminal_summary

__all__ = [
    "pytest_runtest_makereport",
    "pytest_runtest_protocol",
    "pytest_terminal_summary",
    "triton",
    "triton_factory",
    "triton_repository",
]


# How long an example takes, and how fast they are drawn, is no property of what is tested: a machine may be busy.
# Examples are the same at each run, so that what makes a run fail is what was changed; `make soak` draws new ones.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeated", _PATIENT, derandomize=True)
settings.register_profile("drawn", _PATIENT)
settings.load_profile("repeated")


# Workers get whole files, so those that take longest are dealt out first: else one of them keeps one worker at the end.
_LONGEST_FIRST = (
    "integration/test_cli.py",
    "store/test_rollouts_in_gateway.py",
    "faults/test_life_cycle.py",
    "integration/test_faults.py",
    "store/test_bandits_in_gateway.py",
    "faults/test_broken_upstreams.py",
    "store/test_in_gateway.py",
    "differences/test_differences.py",
    "integration/test_v2_sequences.py",
    "integration/test_typed_api.py",
    "deploy/test_kubernetes.py",
    "deploy/test_helm.py",
)
_PLACES = {Path(__file__).parent / file: place for place, file in enumerate(_LONGEST_FIRST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _PLACES.get(item.path, len(_PLACES)))


def pytest_configure() -> None:
    """A shell that runs tests in the background makes them ignore SIGINT, and with them all that they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
