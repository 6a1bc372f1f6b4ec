"""Writes to the store on a thread of its own, so that no call waits for it.

What waits is bounded. While the database is away it is kept up to the bound; what comes then is dropped and counted.
A batch whose end is not known is written again, which changes nothing twice.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from gateway.store.rows import (
    ExposureRow,
    MeasuredRow,
    Row,
    Stop,
    StoreAway,
    StoreFailed,
    StoreReadOnly,
    weight,
)

if TYPE_CHECKING:
    from gateway.store.database import Store

_log = logging.getLogger(__name__)

_BATCH: Final = 2000  # records of one transaction, or one row with more
_IDLE_SECONDS: Final = 1.0  # between two looks at what has stopped
_AGAIN_SECONDS: Final = 1.0  # after the database was found away
_RECENT_SECONDS: Final = 30.0  # within which other workers must have said how copies compare, clocks apart
_LOOK_SECONDS: Final = 30.0  # between two counts of units by arm
_PURGE_SECONDS: Final = 3600.0
_QUIET_SECONDS: Final = 60.0  # between two log lines on the same trouble


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """How the store is used."""

    url: str
    unit_key: str | None = None
    retention: float = 180 * 86_400.0  # seconds
    queue: int = 100_000  # records


@dataclass(slots=True)
class StoreState:
    """How the store is. Written by the recorder's thread, read by any."""

    name: str = ""
    is_away: bool = False
    why: str = ""  # it is away
    since: float = 0.0  # Unix time
    waiting: int = 0  # records, as all that follow
    written: int = 0
    dropped: int = 0  # for which there was no room
    refused: int = 0  # that the database can't hold
    duplicates: int = 0  # reports that were known already
    arms: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # units by experiment and arm
    by_epoch: Mapping[str, Mapping[int, Mapping[str, int]]] = field(default_factory=dict)  # by bandit, epoch and arm


class Recorder:
    """Between `start` and `stop`. `offer` may be called from the event loop only."""

    def __init__(
        self,
        settings: StoreSettings,
        *,
        on_stops: Callable[[Mapping[str, Stop]], None] = lambda _: None,
        on_loss: Callable[[], None] = lambda: None,
        on_progress: Callable[[], None] = lambda: None,
        parities: Callable[[], Mapping[str, tuple[int, int]]] = dict,
        on_parities: Callable[[Mapping[str, tuple[int, int]]], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """
        on_stops:  called on the thread when other experiments have been stopped than before.
        on_loss:   called on the thread if exposures were lost, once all that waited is written, since to tell them
                   earlier would lose them again.
        on_progress:  called on the thread when `done` has grown.
        parities:  how copies of requests have compared here, by gate; asked on the thread.
        on_parities:  called on the thread with what all other workers say of these gates.
        """
        self._settings = settings
        self._on_stops = on_stops
        self._on_loss = on_loss
        self._on_progress = on_progress
        self._parities = parities
        self._on_parities = on_parities
        self._worker = secrets.token_hex(8)
        self._clock = clock
        self._wall = wall
        self._waiting: deque[Row] = deque()
        self._batch: list[Row] = []  # that the thread is writing
        self._wake = threading.Event()
        self._ends = False
        self._thread: threading.Thread | None = None
        self._stops: Mapping[str, Stop] | None = None
        self._store: Store | None = None
        self._quiet_until = 0.0
        self._has_lost_exposure = False  # set on the event loop, and cleared on the thread before it is told
        self.experiments: tuple[str, ...] = ()  # whose units are counted
        self.bandits: tuple[str, ...] = ()  # those of which they are counted by epoch, too
        self.state = StoreState()
        self.offered = 0  # records that there was room for, since the start
        self.done = 0  # of these, the first so many are written or refused

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Write what waits, for so long at most."""
        self._ends = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(seconds)
        if self.waiting:
            _log.warning("%d records of experiments could not be written before the end", self.waiting)

    @property
    def waiting(self) -> int:
        """Records. Each of the two numbers is changed by one thread alone."""
        return self.offered - self.done

    def offer(self, rows: Iterable[Row]) -> int:
        """Have these written. Returns for how many records there was room, which are the first."""
        taken = lost = 0
        has_lost_exposure = False
        room = self._settings.queue - self.waiting
        for row in rows:
            records = weight(row)
            if taken + records > room:
                lost += records
                has_lost_exposure |= isinstance(row, ExposureRow)
                if not isinstance(row, MeasuredRow):
                    continue
                row = row.first(room - taken)  # noqa: PLW2901
                records = row.records
                lost -= records
            self.offered += records
            taken += records
            self._waiting.append(row)
        if lost:
            self.state.dropped += lost
            self._say(f"{lost} records of experiments dropped: {self._settings.queue} wait already")
        self._has_lost_exposure |= has_lost_exposure
        if taken:
            self._wake.set()
        return taken

    def has_room(self, rows: int) -> bool:
        return self.waiting + rows <= self._settings.queue

    # On the thread

    def _run(self) -> None:
        looked = purged = -1e9
        while True:
            try:
                self._write_and_follow()
                now = self._clock()
                self._exchange_parity()
                if now - looked >= _LOOK_SECONDS:
                    looked = now
                    self._count_arms()
                if now - purged >= _PURGE_SECONDS:
                    purged = now
                    self._purge()
                pause = _IDLE_SECONDS
            except StoreAway as error:
                self._found_away(str(error))
                pause = _AGAIN_SECONDS
            except Exception as error:
                _log.exception("unforeseen failure of the store")
                self._found_away(type(error).__name__)
                pause = _AGAIN_SECONDS
            if self._ends and (not self.waiting or self.state.is_away):
                break
            self._wait(pause)
        if self._store is not None:
            self._store.close()

    def _wait(self, seconds: float) -> None:
        """Until there is something to write, if the store is there, and a moment longer, for it to become a batch."""
        if self.state.is_away:
            if not self._ends:
                time.sleep(seconds)
            return
        if self._wake.wait(seconds) and not self._ends:
            time.sleep(0.05)
        self._wake.clear()

    def _opened(self) -> Store:
        if self._store is None:
            from gateway.store.database import Store  # noqa: PLC0415  (SQLAlchemy, which takes 14 MB)

            self._store = Store(self._settings.url, self._settings.unit_key)
            self.state.name = self._store.name
        self._store.open()
        return self._store

    def _write_all(self) -> None:
        store = self._opened()
        while self._batch or self._waiting:
            size = sum(map(weight, self._batch))
            while self._waiting and size < _BATCH:
                self._batch.append(self._waiting.popleft())
                size += weight(self._batch[-1])
            try:
                self.state.duplicates += store.write(self._batch)
                self.state.written += size
            except StoreFailed as error:
                self._write_singly(store, str(error))
            else:
                self._batch.clear()
                self.done += size
            self._on_progress()
        self._found_there()
        if self._has_lost_exposure:
            self._has_lost_exposure = False
            self._on_loss()

    def _write_and_follow(self) -> None:
        """What was stopped is followed also where nothing can be written."""
        try:
            self._write_all()
        except StoreReadOnly:
            self._follow_stops()
            raise
        self._follow_stops()

    def _write_singly(self, store: Store, why: str) -> None:
        """One row that can't be written must not take the others with it."""
        while self._batch:
            records = weight(self._batch[0])
            try:
                self.state.duplicates += store.write(self._batch[:1])
                self.state.written += records
            except StoreFailed as error:
                self.state.refused += records
                why = str(error)
            del self._batch[:1]
            self.done += records
        self._say(f"the store can't hold a record: {why}")

    def _follow_stops(self) -> None:
        stops = self._opened().stops()
        if stops != self._stops:
            self._stops = stops
            self._on_stops(stops)

    def _exchange_parity(self) -> None:
        counts = self._parities()
        if counts:
            now = self._wall()
            found = self._opened().exchange_parity(self._worker, counts, now, now - _RECENT_SECONDS)
            self._on_parities(found)

    def _count_arms(self) -> None:
        store = self._opened()
        self.state.arms = {name: store.arms(name) for name in self.experiments}
        self.state.by_epoch = {name: store.arms_by_epoch(name) for name in self.bandits}

    def _purge(self) -> None:
        store, before = self._opened(), self._wall() - self._settings.retention
        with suppress(StoreReadOnly):  # who writes it deletes what is old, too
            while not self._ends and store.purge(before):
                if self._waiting:
                    self._write_all()

    def _found_there(self) -> None:
        if self.state.is_away:
            _log.info("the store is there again (%s)", self.state.name)
            self._quiet_until = 0.0
        self.state.is_away, self.state.why = False, ""
        self.state.waiting = self.waiting

    def _found_away(self, why: str) -> None:
        if not self.state.is_away:
            self.state.since = self._wall()
        self.state.is_away, self.state.why = True, why
        self.state.waiting = self.waiting
        self._say(f"the store of experiments is away, {self.waiting} records wait: {why}")

    def _say(self, text: str) -> None:
        now = self._clock()
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET_SECONDS
            _log.warning("%s", text)
