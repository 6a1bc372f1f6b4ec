"""What experiments say so far, in a running worker: between its event loop and `VerdictWatch`, which follows them.

Nothing is opened until the config has an experiment.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from gateway.config import Config
from gateway.config.experiment_file import plans_of
from gateway.experimentation.verdict_watch import VerdictWatch
from gateway.experiments.standing import Json
from gateway.hooks import MemoryNow, VerdictNow
from gateway.process.ladder import FROM, Step
from gateway.store import StoreSettings

_LAST_SECONDS: Final = 2.0  # for the last look at the end


class Verdicts:
    """Until `aclose`."""

    def __init__(self, settings: StoreSettings, memory: Callable[[], MemoryNow]) -> None:
        """memory: how it stands; from any thread."""
        self._watch = VerdictWatch(settings, secrets.token_hex(8), lambda: _room(memory()))

    def apply(self, config: Config) -> None:
        """Follow a config."""
        self._watch.follow(plans_of(config))

    async def aclose(self) -> None:
        await asyncio.to_thread(self._watch.stop, _LAST_SECONDS)

    def now(self) -> Mapping[str, VerdictNow]:
        """For metrics, by experiment; from any thread."""
        return self._watch.now()

    async def latest(self) -> Sequence[Json]:
        """For the page."""
        return self._watch.latest()


def _room(memory: MemoryNow) -> int:
    """Half of what is left until anything is done without: calls come first, and their load may rise meanwhile."""
    return max(0, int((FROM[Step.SPARING] * memory.limit - memory.used) / 2))
