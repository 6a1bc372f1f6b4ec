"""Models that the config does not name and Triton has, where all of an upstream's may be called.

Callers invent names there (`direct: {models: all}`, `serve --triton`). What Triton has answered for or lists in its
index (`model_index`) is a model; only such a name may label metrics and be shown. One that was found stays when it is
gone, since what was counted of it does too, until another one needs its place.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

MOST: Final = 1_000
"""Found models: half of the labels that metrics have for models, so that those of the config always have theirs."""

KEPT_SECONDS: Final = 3600.0
"""For how long at least a model that is gone is remembered, so that the last of its numbers are read and seen."""

READY: Final = "READY"
"""The state of a model, in Triton's words, that can be called."""


class FoundModels:
    """By name, what Triton's index says of it: its state, and the reason for that. "" if it says nothing."""

    def __init__(self, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self.states: dict[str, tuple[str, str]] = {}
        self.forgotten: deque[str] = deque()
        """Names whose place was needed; who takes them ends what was counted of them."""
        self._gone: dict[str, float] = {}  # since when, the longest first
        self._most = most
        self._clock = clock

    def answered(self, model: str) -> None:
        """Triton has answered a call of it."""
        if model not in self.states and self._has_place():
            self.states[model] = (READY, "")

    def listed(self, states: Mapping[str, tuple[str, str]]) -> None:
        """Triton's index lists these; what it does not list any more is not there."""
        now = self._clock()
        for gone in self.states.keys() - states.keys():
            self.states[gone] = ("", "is not in Triton's index")
            self._gone.setdefault(gone, now)
        for model, state in states.items():
            self._gone.pop(model, None)
            if model in self.states or self._has_place():
                self.states[model] = state

    def _has_place(self) -> bool:
        """Is there one for another name? The name that has been gone longest gives up its own, after an hour."""
        if len(self.states) < self._most:
            return True
        for name, since in self._gone.items():
            if self._clock() - since < KEPT_SECONDS:
                return False
            del self.states[name], self._gone[name]
            self.forgotten.append(name)
            return True
        return False
