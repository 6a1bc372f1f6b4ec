"""Bandits in a running worker: between its event loop and `BanditWatch`, which follows them in the store.

Nothing is opened until the config has a bandit.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Final

from gateway.bandit_watch import BanditWatch
from gateway.config import Config
from gateway.config.experiment_file import bandits_of
from gateway.experiments.epochs import Epochs
from gateway.experiments.plan import Plan
from gateway.hooks import BanditNow
from gateway.store import StoreSettings

_log = logging.getLogger(__name__)

_LAST_SECONDS: Final = 2.0


class Bandits:
    """Until `aclose`."""

    def __init__(self, settings: StoreSettings, on_moved: Callable[[Mapping[str, Epochs]], None]) -> None:
        """on_moved: called on the event loop when any has another epoch, with those of all that have any."""
        self._on_moved = on_moved
        self._plans: Mapping[str, Plan] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch = BanditWatch(settings, secrets.token_hex(8), self._moved)

    def apply(self, config: Config) -> None:
        """Follow a config."""
        self._plans = bandits_of(config)
        self._loop = asyncio.get_running_loop()
        self._watch.follow(self._plans)

    async def wait_first_look(self, seconds: float) -> None:
        """Until the store was asked once, so that a restart changes no unit's arm; for so long at most."""
        if self._plans:
            await asyncio.to_thread(self._watch.first_look.wait, seconds)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._watch.stop, _LAST_SECONDS)

    def now(self) -> Mapping[str, BanditNow]:
        """For people and metrics, by experiment; from any thread."""
        return self._watch.now()

    # From the watch's thread

    def _moved(self, epochs: Mapping[str, Epochs]) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            try:
                loop.call_soon_threadsafe(self._on_moved, epochs)
            except RuntimeError:  # it was closed since
                _log.debug("the loop has ended")
