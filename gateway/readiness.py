"""May callers send calls to this worker? What load balancers, Kubernetes and health checks are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gateway.notifier import Changes


class Readiness:
    """Not ready until it has started, nor from when it drains, nor while no endpoint can be reached."""

    def __init__(self, problems: Callable[[], Sequence[str]], changes: Changes) -> None:
        """problems: why nothing could be served now, in words. changes: whoever waits for them hears of ours."""
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
        """Why it is not ready; empty if it is."""
        if self.is_draining:
            return ["draining"]
        return self._problems() if self._has_started else ["starting"]
