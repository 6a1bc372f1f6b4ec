"""Pure: answers that are remembered, bounded in bytes and time.

Of a full cache the answer goes that was not asked for the longest (LRU). One ends sooner when the model that gave it
has changed, or may have (`KnownModel`). Instants are seconds on one clock, and arguments.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

from gateway.rpc.metadata import Fields
from gateway.types import Served
from gateway.upstream.known import KnownModel

OVERHEAD: Final = 1024  # bytes that an answer takes beside its body: key, entry and metadata


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as any caller may get it: without an id, and with nothing of the caller whose request it was."""

    body: bytes  # ModelInferResponse, with the public model's name
    initial: Fields
    trailing: Fields  # the upstream's own
    served: Served


class AnswerCache:
    """Of one public model in one worker."""

    def __init__(self, most: int, seconds: float) -> None:
        """most: bytes of all answers. seconds: for which one may be given."""
        self.most = most
        self.seconds = seconds
        self.bytes = 0
        self.evictions = 0  # answers that had to go for others
        self._entries: OrderedDict[Hashable, tuple[Answer, KnownModel, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def maybe_find(self, key: Hashable, now: float) -> Answer | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        answer, known, until = entry
        if now >= until or not known.is_current:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return answer

    def keep(self, key: Hashable, answer: Answer, known: KnownModel, now: float) -> None:
        """known: the model as it was when it was asked. One that has changed meanwhile is not remembered."""
        if key in self._entries:
            self._drop(key)
        size = len(answer.body) + OVERHEAD
        if size > self.most or not known.is_current:
            return
        self._entries[key] = answer, known, now + self.seconds
        self.bytes += size
        while self.bytes > self.most:
            self._drop(next(iter(self._entries)))
            self.evictions += 1

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = 0

    def _drop(self, key: Hashable) -> None:
        answer, _, _ = self._entries.pop(key)
        self.bytes -= len(answer.body) + OVERHEAD
