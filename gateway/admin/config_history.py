"""Admin: the history of the config files that were read, for `/config`. A listener; depends on values only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime, timezone

from gateway.hooks import ConfigChanged, NoListener

_KEPT = 20  # changes that are remembered; enough for an on-call person's day


class ConfigHistory(NoListener):
    """Remembers the config in force, the last refusal and the latest changes: digests and findings, and no contents."""

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(timezone.utc)) -> None:
        self._now = now
        self._current: Mapping[str, object] | None = None
        self._last_refused: Mapping[str, object] | None = None
        self._changes: deque[Mapping[str, object]] = deque(maxlen=_KEPT)

    def config_changed(self, event: ConfigChanged) -> None:
        change: dict[str, object] = {
            "time": self._now().isoformat(timespec="seconds"),
            "source": event.source,
            "digest": event.digest,
            "accepted": event.accepted,
            "findings": list(event.findings),
        }
        self._changes.append(change)
        if event.accepted:
            self._current = change
        else:
            self._last_refused = change

    def config(self) -> Mapping[str, object]:
        """The answer of `/config`; the latest change comes first."""
        return {
            "current": self._current,
            "last_refused": self._last_refused,
            "changes": list(reversed(self._changes)),
        }
