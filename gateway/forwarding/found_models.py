"""Models that the config does not name and Triton has, where all of an upstream's may be called.

Callers invent names there (`direct: {models: all}`, `serve --triton`). What Triton has answered for or lists in its
index (`model_index`) is a model; only such a name may label metrics and be shown. One that was found stays, since what
was counted of it does too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

MOST: Final = 1_000
"""Found models: half of the labels that metrics have for models, so that those of the config always have theirs."""

READY: Final = "READY"
"""The state of a model, in Triton's words, that can be called."""


class FoundModels:
    """By name, what Triton's index says of it: its state, and the reason for that. "" if it says nothing."""

    def __init__(self, most: int = MOST) -> None:
        self.states: dict[str, tuple[str, str]] = {}
        self._most = most

    def answered(self, model: str) -> None:
        """Triton has answered a call of it."""
        if model not in self.states and len(self.states) < self._most:
            self.states[model] = (READY, "")

    def listed(self, states: Mapping[str, tuple[str, str]]) -> None:
        """Triton's index lists these; what it does not list any more is not there."""
        for gone in self.states.keys() - states.keys():
            self.states[gone] = ("", "is not in Triton's index")
        for model, state in states.items():
            if model in self.states or len(self.states) < self._most:
                self.states[model] = state
