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
from gateway.hooks import VerdictNow
from gateway.store import StoreSettings

_LAST_SECONDS: Final = 2.0  # for the last look at the end


class Verdicts:
    """Until `aclose`."""

    def __init__(self, settings: StoreSettings, is_scarce: Callable[[], bool]) -> None:
        """is_scarce: is there no memory for one more process now? From any thread."""
        self._watch = VerdictWatch(settings, secrets.token_hex(8), is_scarce)

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
