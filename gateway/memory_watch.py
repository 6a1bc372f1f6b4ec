"""I/O: watches the memory that is in use, and has this worker do without what `ladder` says.

Several workers of one container see the same bytes, and each does its part.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import Final, Protocol

from gateway.forwarding.admission import Gates
from gateway.forwarding.shadowing import Shadows
from gateway.forwarding.sharing import Shares
from gateway.hooks import MemoryNow
from gateway.process.container import Memory, give_memory_back
from gateway.process.ladder import FROM, REFUSED, Step, step_of
from gateway.rpc.budget import Budget
from gateway.steps.budget import MEMORY

_EVERY_SECONDS: Final = 0.1
_EVERY_BYTES: Final = 4 << 20  # from callers; on the same host 500 MB come in a second
_GIVE_BACK_SECONDS: Final = 1.0  # between two times that freed memory is given back while it is scarce
_LOG_SECONDS: Final = 1.0  # between two lines about closed connections
_CALM_SECONDS: Final = 5.0  # until a lower step is told: in a fight for memory steps change ten times a second
_MIB: Final = 1 << 20

_log = logging.getLogger(__name__)


class Connections(Protocol):
    """What the listener tells of callers' connections, and can do about them."""

    def tell_bytes(self, heard: Callable[[int], None]) -> None: ...

    def close_to_new(self, is_closed: bool) -> None: ...

    def reset_heaviest(self) -> tuple[str, int] | None:
        """Its peer, and how many bytes it held; None if none holds much."""


class MemoryWatch:
    """One worker's."""

    def __init__(
        self,
        read: Callable[[], Memory],
        *,
        collected: Budget,
        shares: Shares,
        gates: Gates,
        shadows: Shadows,
        workers: int = 1,
    ) -> None:
        """read: what is in use now; raises OSError or ValueError if that can't be told. workers: that share it."""
        self._read = read
        self._collected = collected
        self._shares = shares
        self._gates = gates
        self._shadows = shadows
        self._workers = workers
        self._connections: Connections
        self._step = self._told = Step.NORMAL
        self._memory = Memory(0, 1)
        self._heard = 0  # bytes since the last look
        self._resets = 0
        self._giving_back: asyncio.Future[None] | None = None
        self._given_back_at = self._told_at = self._reset_told_at = -math.inf
        self._is_blind = False

    def now(self) -> MemoryNow:
        """May be asked from any thread."""
        step, memory = self._step, self._memory
        return MemoryNow(step, REFUSED[step], memory.used, memory.limit, self._resets)

    def watch(self, connections: Connections) -> None:
        """Before any of them is accepted."""
        self._connections = connections
        connections.tell_bytes(self._came)

    async def run(self) -> None:
        """Look for ever, also while no bytes come."""
        while True:
            self.look()
            await asyncio.sleep(_EVERY_SECONDS)

    def _came(self, size: int) -> None:
        self._heard += size
        if self._heard >= _EVERY_BYTES:
            self.look()

    def look(self) -> None:
        """Read, and act on it."""
        self._heard = 0
        try:
            self._memory = memory = self._read()
        except (OSError, ValueError) as error:
            if not self._is_blind:
                self._is_blind = True
                _log.warning("the memory in use can't be read, so nothing is done when it gets scarce: %s", error)
            return
        before, self._step = self._step, step_of(self._step, memory.used, memory.limit)
        step, now = self._step, time.monotonic()
        MEMORY.spare = (int(memory.limit * FROM[Step.RESETTING]) - memory.used) // self._workers
        if step is not before:
            self._change(step)
        if step is not self._told and (step > self._told or now - self._told_at >= _CALM_SECONDS):
            self._told, self._told_at = step, now
            self._tell(step)
        if step is not Step.NORMAL:
            self._save(step, now, is_higher=step > before)

    def _change(self, step: Step) -> None:
        self._collected.is_sparing = step >= Step.SPARING
        self._gates.is_shedding = step >= Step.SHEDDING
        self._shadows.is_saving = step >= Step.SPARING
        self._connections.close_to_new(step >= Step.SHEDDING)

    def _tell(self, step: Step) -> None:
        used, limit = self._memory.used, self._memory.limit
        share = f"{used / _MIB:.0f} of {limit / _MIB:.0f} MiB of memory ({used / limit:.0%}) are in use"
        _log.log(logging.WARNING if step else logging.INFO, "%s: %s", share, REFUSED[step])

    def _save(self, step: Step, now: float, is_higher: bool) -> None:
        self._shares.forget()
        if self._giving_back is not None:
            return  # what was freed still counts, so it is too early to reset another one
        has_reset = step is Step.RESETTING and self._reset(now)
        if is_higher or has_reset or now - self._given_back_at >= _GIVE_BACK_SECONDS:
            self._given_back_at = now
            self._giving_back = asyncio.get_running_loop().run_in_executor(None, give_memory_back)
            self._giving_back.add_done_callback(self._given_back)

    def _given_back(self, _: object) -> None:
        self._giving_back = None

    def _reset(self, now: float) -> bool:
        found = self._connections.reset_heaviest()
        if found is None:
            return False
        self._resets += 1
        if now - self._reset_told_at >= _LOG_SECONDS:
            self._reset_told_at = now
            peer, held = found
            _log.warning("memory is scarce: the connection of %s is closed, which held %.1f MiB", peer, held / _MIB)
        return True
