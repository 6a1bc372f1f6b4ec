"""Whether this worker should get calls: the answer for load balancers, Kubernetes and health checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gateway.process.notifier import Changes


class Readiness:
    """A worker is ready once it has started, until it drains, and while some endpoint can be reached."""

    def __init__(self, problems: Callable[[], Sequence[str]], changes: Changes) -> None:
        """
        problems:  why no call could be served now, in words; empty if calls could be.
        changes:   notified when readiness changes.
        """
        self._problems = problems
        self._changes = changes
        self._has_started = False
        self.is_draining = False

    def started(self) -> None:
        self._has_started = True
        self._changes.notify()

    def draining(self) -> None:
        self.is_draining = True
        self._changes.notify()

    def is_ready(self) -> bool:
        return not self.reasons()

    def reasons(self) -> Sequence[str]:
        """Why the worker is not ready; empty if it is."""
        if self.is_draining:
            return ["draining"]
        return self._problems() if self._has_started else ["starting"]
