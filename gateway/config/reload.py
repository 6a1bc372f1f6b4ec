"""Config: notices that the file has changed and hands on what it says now, or why it stays as it was.

`Tracker` decides and knows no clock and no file; `Watcher` is the thin asyncio edge around it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path as FilePath

from gateway.config.findings import ConfigError, Finding, Severity, show
from gateway.config.load import Loaded, fingerprint
from gateway.config.schema import Config
from gateway.config.section import Section
from gateway.process.garbage import no_collections

log = logging.getLogger(__name__)

Mark = tuple[object, ...]
"""A fingerprint of files, which changes if one of them changes."""

_LIVE = (
    ("upstreams",),
    ("models",),
    ("direct",),
    ("access",),
    ("admin", "tokens"),
    ("admin", "open"),
    ("telemetry", "capture"),
    ("pipelines", "memory"),
    ("experiments",),
    *(("quotas", key) for key in ("caller", "default", "callers", "models")),
)
"""The settings that a running gateway takes over. All others concern sockets and parts that are made at the start."""


def restart_notices(running: Config, new: Config, source: str) -> tuple[Finding, ...]:
    """The settings in `new` that a running gateway cannot take over. The rest of `new` can be used at once.

    running:  the config that the process was started with, which is what its sockets still follow.
    """
    old_values, new_values = dict(_settings(running)), dict(_settings(new))
    notices = []
    for path in {**old_values, **new_values}:
        old_value, new_value = old_values.get(path), new_values.get(path)
        is_live = any(path[: len(live)] == live for live in _LIVE)
        if not is_live and old_value != new_value:
            wrong = f"changes from {show(old_value)} to {show(new_value)} only with a restart"
            notices.append(Finding(source, 0, ".".join(path), wrong, "", Severity.NOTICE))
    return tuple(notices)


def _settings(section: Section, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every setting by its path, in the order of the schema."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _settings(value, (*above, name))
        else:
            yield (*above, name), value


class Tracker:
    """Decides when to read the files, and whether a config that was read must be handed on."""

    def __init__(self, mark: Mark, digest: str) -> None:
        """mark: what the files are now. They may have changed since `digest` was made, so they are read once more."""
        self._read: Mark | None = None  # the fingerprint when the files were last read
        self._seen = mark  # the fingerprint at the last check
        self._digest = digest
        self._refused = False

    def is_due(self, mark: Mark, poked: bool) -> bool:
        """Should the files be read now?

        A change counts when two looks in a row find it the same: a file that is still being written in place could
        be valid, and lack its second half. Whoever pokes says that it is complete.
        """
        settled, self._seen = mark == self._seen, mark
        if not poked and (mark == self._read or not settled):
            return False
        self._read = mark
        return True

    def is_news(self, digest: str, poked: bool) -> bool:
        """Must a valid config be handed on? Also after a refusal, so that the refusal is known to be over."""
        news = poked or self._refused or digest != self._digest
        self._digest, self._refused = digest, False
        return news

    def refused(self) -> None:
        self._refused = True


class Watcher:
    """Follows a config file until its `run` is cancelled.

    load:        reads everything again; raises ConfigError.
    first:       what the gateway runs with now.
    on_change:   takes over a new config. It gets the notices about what needs a restart. If it raises ConfigError, the
                 config counts as refused.
    on_refused:  hears why the old config stays.
    period:      seconds between two looks. One look is one `stat` per file.
    slow:        seconds after which `on_refused` hears that a config is still being read: a constructor of a step may
                 hang.
    """

    def __init__(
        self,
        load: Callable[[], Loaded],
        first: Loaded,
        on_change: Callable[[Loaded, tuple[Finding, ...]], Awaitable[None]],
        on_refused: Callable[[tuple[Finding, ...]], None],
        period: float = 1.0,
        *,
        slow: float = 60.0,
    ) -> None:
        self._load = load
        self._running = first.config
        self._source = first.source
        self._files: tuple[FilePath, ...] = first.files
        self._on_change = on_change
        self._on_refused = on_refused
        self._period = period
        self._slow = slow
        self._poked = asyncio.Event()
        self._tracker = Tracker(fingerprint(first.files), first.digest)

    def poke(self) -> None:
        """Read the files at the next turn of the loop, changed or not. For SIGHUP."""
        self._poked.set()

    async def run(self) -> None:
        """Check the files at every period, until it is cancelled."""
        while True:
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):  # two classes until Python 3.11
                await asyncio.wait_for(self._poked.wait(), self._period)
            poked = self._poked.is_set()
            self._poked.clear()
            await self.look(poked)

    async def look(self, poked: bool = False) -> None:
        """Check the files once and act on changes. Never raises."""
        try:
            # In a thread: a network file system may hang, and a large file takes long to check.
            mark = await asyncio.to_thread(fingerprint, self._files)
            if self._tracker.is_due(mark, poked):
                with contextlib.ExitStack() as while_quick:
                    while_quick.enter_context(
                        no_collections()
                    )  # thousands of models would cause some, of a second each
                    timer = asyncio.get_running_loop().call_later(self._slow, self._is_slow, while_quick)
                    while_quick.callback(timer.cancel)
                    await self._take(await asyncio.to_thread(self._load), poked)
                    gc.freeze()  # collections skip the config; reference counts free a replaced one
        except ConfigError as error:
            self._files = error.files or self._files
            self._refuse(error.findings)
        except Exception as error:  # whatever a new config breaks, the old one stays in force
            log.exception("a new config could not be taken over")
            wrong = f"could not be taken over: {type(error).__name__}"
            self._refuse((Finding(self._source, 0, "", wrong, "see the log of this process"),))

    def _is_slow(self, while_quick: contextlib.ExitStack) -> None:
        """Report a slow read and allow garbage collections again. The config is taken over once it has been read."""
        while_quick.close()
        wrong = f"is still being read after {self._slow:g} s; later changes are not seen until that ends"
        needs = "check the file system and the constructors of steps; only a restart ends a constructor that hangs"
        self._refuse((Finding(self._source, 0, "", wrong, needs),))

    async def _take(self, loaded: Loaded, poked: bool) -> None:
        self._files = loaded.files
        if self._tracker.is_news(loaded.digest, poked):
            await self._on_change(loaded, restart_notices(self._running, loaded.config, loaded.source))

    def _refuse(self, findings: tuple[Finding, ...]) -> None:
        self._tracker.refused()
        try:
            self._on_refused(findings)
        except Exception:  # a fault in reporting must not end the watching
            log.exception("the refusal of a new config could not be reported")
