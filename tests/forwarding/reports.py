"""Hooks that note how calls began and ended."""

from __future__ import annotations

from gateway.hooks import CallEnded, CallObserver, CallStarted, NoHooks, NoObserver


class Reports(NoHooks):
    """Notes what is told of calls."""

    def __init__(self) -> None:
        self.started: list[CallStarted] = []
        self.ended: list[CallEnded] = []

    def call_started(self, event: CallStarted) -> CallObserver:
        self.started.append(event)
        reports = self

        class Observer(NoObserver):
            def ended(self, event: CallEnded) -> None:
                reports.ended.append(event)

        return Observer()
