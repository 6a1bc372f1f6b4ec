"""A thread that looks at the store each second or so, and decides what is to be decided here. What of, subclasses say.

While the store is away what was known last holds, and nothing is decided. One that can only be read is followed.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from gateway.store import StoreAway, StoreFailed, StoreSettings

if TYPE_CHECKING:
    from gateway.store.leases import LeaseStore

_log = logging.getLogger(__name__)

LEASE: Final = 4.0  # seconds; a leader that stopped is replaced after that
_QUIET_SECONDS: Final = 60.0  # between two log lines on the same trouble


class Followed(Protocol):
    """What a worker knows of one thing that it follows."""

    decides: bool  # does this worker have its lease?

    def lead_no_more(self) -> None:
        """Nothing is decided about it here until the store is there again."""


Plan = TypeVar("Plan")
Known = TypeVar("Known", bound=Followed)


class StoreWatch(ABC, Generic[Plan, Known]):
    """From `follow` to `stop`. What others read of it is replaced as a whole."""

    period = 1.0  # seconds between two looks

    def __init__(self, what: str, settings: StoreSettings, worker: str) -> None:
        """
        what:    is followed, for the log.
        worker:  names this process among all that use the store.
        """
        self._what = what
        self._settings = settings
        self._worker = worker
        self._plans: Mapping[str, Plan] = {}
        self._followed: dict[str, Known] = {}
        self._wake = threading.Event()
        self._ends = False
        self._thread: threading.Thread | None = None
        self._quiet_until = 0.0
        self._looked_at = (0.0, time.monotonic())  # the store's time, and this process's then, or at its start
        self.first_look = threading.Event()
        self._why_away = ""
        self._why_read_only = ""

    def follow(self, plans: Mapping[str, Plan]) -> None:
        """Have these followed; the next look comes at once. From any thread."""
        self._plans = plans
        if plans and self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._what, daemon=True)
            self._thread.start()
        self._wake.set()

    def stop(self, seconds: float) -> None:
        self._ends = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(seconds)

    @abstractmethod
    def look(self) -> None:
        """Read the store, follow what it says, and decide what is to be decided here.

        :raises StoreAway: if it can't be used; then nothing has changed.
        """

    @abstractmethod
    def _close(self) -> LeaseStore | None:
        """The end has come. Returns the store, if it was opened."""

    # On the thread

    def _run(self) -> None:
        while not self._ends:
            began = time.monotonic()
            self._wake.clear()
            try:
                self.look()
                self._found_there()
            except (StoreAway, StoreFailed) as error:
                self._found_away(str(error))
            except Exception as error:
                _log.exception("unforeseen failure while following %s", self._what)
                self._found_away(type(error).__name__)
            self.first_look.set()
            self._wake.wait(max(0.05, self.period - (time.monotonic() - began)))
        store = self._close()
        if store is not None:
            with suppress(StoreAway, StoreFailed):
                if any(known.decides for known in self._followed.values()):
                    store.release(self._worker)
            store.close()

    def _found_there(self) -> None:
        if self._why_away:
            _log.info("the store of %s is there again", self._what)
            self._quiet_until = 0.0
        self._why_away = ""

    def _found_away(self, why: str) -> None:
        self._why_away = why
        for known in self._followed.values():
            known.lead_no_more()
        self._say(f"the store of {self._what} is away, and all stay as they are: {why}")

    def _note_read_only(self, why: str) -> None:
        """why: "" if the store can be written to."""
        self._why_read_only = why
        if why:
            self._say(f"the store of {self._what} is followed, and nothing is decided here: {why}")

    def _why_not(self) -> str:
        """Why nothing is decided here, if the store is the reason."""
        if self._why_away:
            return f"the store is away: {self._why_away}"
        why = self._why_read_only
        return f"the store is followed, and nothing is decided here: {why}" if why else ""

    def _say(self, text: str) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET_SECONDS
            _log.warning("%s", text)

    def _age(self) -> tuple[float, float]:
        """The store's time now, and how many seconds ago it was read."""
        looked, then = self._looked_at
        age = time.monotonic() - then
        return looked + age, age
