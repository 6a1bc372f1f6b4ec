"""A test that fails because its Triton died is run once more, with everything started anew.

Triton 2.51 dies by itself now and then: it crashes, or takes the stub of a Python model for dead that did not get a CPU
for a second, which a busy machine is enough for. No test can know that beforehand, and none is about it. What happened
is said at the end of the run. A test that fails for another reason fails again, if it is run again at all.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from gateway.triton import LocalTriton

_WHY = pytest.StashKey[str]()
_TOLD = "ran again, since its Triton died"
_STUB_DIED = "is not healthy"  # Triton's log of a stub that it gives up


def why_died() -> str:
    """What is wrong with a Triton that this process has started and not ended; "" if nothing is."""
    for server in gc.get_objects():
        if isinstance(server, LocalTriton):
            if server.pid is not None and not Path(f"/proc/{server.pid}").exists():
                return f"{server.grpc_address} is gone"
            if any(_STUB_DIED in line for line in server.log_tail(1000)):
                return f"{server.grpc_address} has lost a stub"
    return ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.when != "teardown":  # while the test still has its servers
        item.stash[_WHY] = why_died()
    return report


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    item.stash[_WHY] = ""
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if why := item.stash[_WHY]:
        with contextlib.suppress(Exception):  # what needs the server that died may not end well either
            item.session._setupstate.teardown_exact(None)
        item._initrequest()  # type: ignore[attr-defined]
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        reports[0].user_properties.append((_TOLD, why))
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, why in getattr(report, "user_properties", ()):
                if name == _TOLD:
                    terminalreporter.write_line(f"{report.nodeid} {_TOLD}: {why}")
