"""What is remembered of a model on an endpoint, which ends when the model changes.

A `KnownModel` is one model as it was loaded: whoever remembers something of it does so in its `kept`, and asks
`Endpoint.known` for the current one each time. After a change there is another one, with nothing in it. What ends it:
a load or unload through the gateway, an endpoint that failed or came back, a model that a probe finds ready again or
not, and what Triton itself tells at each probe. Pure: `health` and others ask.

Triton tells a reload by two signs (probed, 2.51): its config, and its counts, which begin again at nothing even if the
files are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

Counts = Mapping[str, tuple[int, int, int]]
"""By version: inferences, executions, nanoseconds of them all. None of these shrinks while a model stays loaded."""

_YOUNG_EXECUTIONS: Final = 100  # more than there can be between two looks of a model that has just been loaded anew
MOST_KNOWN: Final = 4096  # models and versions of one endpoint; the one known longest is forgotten for another


class KnownModel:
    """One model of one endpoint, under the version by which it is asked for, for as long as it stays as it is."""

    __slots__ = ("_config", "counts", "is_current", "kept", "name", "on_forgotten", "version")

    def __init__(self, name: str, version: str) -> None:
        self.name = name
        self.version = version
        self.is_current = True
        self.kept: dict[object, Any] = {}  # by its users, under keys of their own
        self.on_forgotten: dict[object, Callable[[], None]] = {}  # likewise: who must act when it ends
        self.counts: Counts = {}  # the latest that were told
        self._config = b""

    def __repr__(self) -> str:
        return f"<KnownModel {self.name}/{self.version or '-'} {'current' if self.is_current else 'over'}>"

    @property
    def is_young(self) -> bool:
        """Has it counted so little that a reload can't be told from its counts?"""
        return sum(each[1] for each in self.counts.values()) < _YOUNG_EXECUTIONS

    def is_same_config(self, config: Any) -> bool:
        """Take note of a ModelConfig. False: it is not what it was."""
        # Serialized anew: maps come in any order over the wire.
        sign = config.SerializeToString(deterministic=True)
        self._config = self._config or sign
        return bool(self._config == sign)

    def is_same_count(self, statistics: Any, before: Counts) -> bool:
        """Take note of a ModelStatisticsResponse. False: it serves other versions, or began to count anew.

        before: `counts` when it was asked for; several answers may come in another order than their questions went.
        """
        counts = {
            entry.version: (entry.inference_count, entry.execution_count, entry.inference_stats.success.ns)
            for entry in statistics.model_stats
        }
        same = not before or _is_later(counts, before)
        if not self.counts or _is_later(counts, self.counts):
            self.counts = counts
        return same

    @property
    def is_counted(self) -> bool:
        """Is there a count from which a reload could be told?"""
        return bool(self.counts)

    def answered(self, version: str) -> None:
        """This version has answered a call. So its count is not nothing, unless it began anew since."""
        count = self.counts.get(version)
        if count is not None and count[0] == 0:
            self.counts = {**self.counts, version: (1, count[1], count[2])}

    def forget(self) -> None:
        """It has changed, or may have."""
        if not self.is_current:
            return
        self.is_current = False
        self.kept.clear()
        told, self.on_forgotten = list(self.on_forgotten.values()), {}
        for tell in told:
            tell()


def _is_later(counts: Counts, before: Counts) -> bool:
    return counts.keys() == before.keys() and not any(
        now < then for version in counts for now, then in zip(counts[version], before[version], strict=True)
    )
