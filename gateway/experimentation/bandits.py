"""Bandits in a running worker: between its event loop and `BanditWatch`, which follows them in the store.

Nothing is opened until the config has a bandit.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from typing import Final

from gateway.config import Config
from gateway.config.experiment_file import bandits_of
from gateway.experimentation.bandit_watch import BanditWatch
from gateway.experiments.epochs import Epochs
from gateway.experiments.plan import Plan
from gateway.hooks import BanditNow
from gateway.process.event_loop import call_from_thread
from gateway.store import StoreSettings

_LAST_SECONDS: Final = 2.0  # for the last look at the end


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
        call_from_thread(self._loop, lambda: self._on_moved(epochs))
