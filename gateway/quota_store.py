"""Shares quotas with other gateways by a Valkey or a Redis: reports in the background what this worker has used.

The store has one instant for each rate, as GCRA keeps it (`quotas.buckets`), and the workers that live. One script
charges what is reported and answers how far each bucket is ahead of its rate. It takes the store's own time, so that
gateways' clocks don't matter. All keys are in one slot of a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gateway.errors import CommandFailed
from gateway.quotas import Lease, SharedBuckets

_log = logging.getLogger(__name__)

_BEAT_SECONDS: Final = 1.0  # between two signs of life, when there is nothing to report
_GONE_SECONDS: Final = 5  # after which a worker that gave none counts no more
_PAUSE_SECONDS: Final = 0.02  # between two reports at least, however hungry leases are: one takes about a millisecond
_AGAIN_SECONDS: Final = 0.5  # between two attempts while the store is away
_MOST_KEYS: Final = 500  # in one call of the script, which has the store for itself meanwhile

SCRIPT: Final = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[2]))
redis.call('EXPIRE', KEYS[1], ARGV[2])
local answer = {tostring(redis.call('ZCARD', KEYS[1]))}
for i = 2, #KEYS do
  local cost = tonumber(ARGV[i + 1])
  local due = tonumber(redis.call('GET', KEYS[i]) or '0')
  if due < now then due = now end
  if cost > 0 then
    due = due + cost
    redis.call('SET', KEYS[i], string.format('%.6f', due), 'PX', math.ceil((due - now) * 1000) + 1)
  end
  answer[i] = string.format('%.6f', due - now)
end
return answer
"""
"""KEYS: the set of workers, then buckets. ARGV: this worker, seconds after which one counts as gone, then for each
bucket the seconds that its rate takes for what was used. Answers how many workers there are, then for each bucket the
seconds by which it is ahead."""

Run = Callable[[Sequence[str], Sequence[str]], Awaitable[Sequence[bytes]]]
"""Runs the script with these keys and arguments. Raises anything if it can't, and in time."""


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Where the store is."""

    url: str
    password_file: str | None
    timeout: float  # seconds
    prefix: str
    member: str  # unique among all workers of all gateways


class QuotaStore:
    """Reports until `run` is cancelled. `run` ends by nothing else."""

    def __init__(self, settings: StoreSettings, shared: SharedBuckets) -> None:
        """:raises CommandFailed: if the client is not installed."""
        self._settings = settings
        self._shared = shared
        self._client = client_of(settings)
        self._run_script = _runner(self._client)
        self._poked = asyncio.Event()
        self._told_away = False
        shared.on_hungry = self._poked.set

    async def run(self) -> None:
        try:
            while True:
                began = time.monotonic()
                is_well = await self.exchange()
                pause = _PAUSE_SECONDS if is_well else _AGAIN_SECONDS
                await asyncio.sleep(pause)
                if is_well:
                    await self._until_due(began)
        finally:
            self._shared.went_away()
            with contextlib.suppress(Exception):
                await self._client.aclose()

    async def _until_due(self, began: float) -> None:
        """Return when a lease is used up, a period after a report if there is another, or for a sign of life."""
        loop = asyncio.get_running_loop()
        while True:
            # Not `wait_for`, which until Python 3.12 forgets that it was cancelled if the event comes as well.
            timer = loop.call_later(self._shared.period, self._poked.set)
            await self._poked.wait()
            timer.cancel()
            self._poked.clear()
            if self._shared.leases or time.monotonic() - began >= _BEAT_SECONDS:
                return

    async def exchange(self) -> bool:
        """Report everything that was used. False: the store is away."""
        shared = self._shared
        leases = list(shared.leases.values())
        shared.leases.clear()
        try:
            for first in range(0, max(1, len(leases)), _MOST_KEYS):
                await self._report(leases[first : first + _MOST_KEYS])
        except Exception as error:  # the client's, the socket's, or an answer that is none
            if not self._told_away:
                _log.error(
                    "the store of quotas is away: %s; each worker has its share now", error or type(error).__name__
                )
            self._told_away = True
            shared.went_away()
            return False
        return True

    async def _report(self, leases: Sequence[Lease]) -> None:
        shared, settings = self._shared, self._settings
        tag = f"{{{settings.prefix}}}"
        keys = [f"{tag}:workers", *(f"{tag}:{lease.key}" for lease in leases)]
        costs = [f"{lease.reported() * lease.interval:.9f}" for lease in leases]
        arguments = [settings.member, str(_GONE_SECONDS), *costs]
        answer = await self._ask(keys, arguments)
        workers, *ahead = [float(each) for each in answer]
        shared.share = 1.0 / max(1.0, workers)
        now = time.monotonic()
        if shared.is_away:
            shared.came_back()
            if self._told_away:
                _log.info("the store of quotas is back; %d workers share it", workers)
            self._told_away = False
        for lease, seconds in zip(leases, ahead, strict=True):
            lease.heard(seconds, now)

    async def _ask(self, keys: Sequence[str], arguments: Sequence[str]) -> Sequence[bytes]:
        """In a task of its own: the client's timeouts may swallow a cancellation, which must end `run`.

        :raises TimeoutError: if no answer comes in time.
        """
        asking = asyncio.ensure_future(self._run_script(keys, arguments))
        asking.add_done_callback(_retrieved)
        try:
            await asyncio.wait({asking}, timeout=self._settings.timeout)
        finally:
            is_here = asking.done()
            asking.cancel()
        if not is_here:
            raise TimeoutError(f"no answer within {self._settings.timeout:g} s")
        return asking.result()


def _retrieved(asked: asyncio.Future[Sequence[bytes]]) -> None:
    """What became of a question that nobody waits for is no news."""
    if not asked.cancelled():
        asked.exception()


def client_of(settings: StoreSettings) -> Any:
    """A client that is not connected yet. Any: the package may not be here.

    :raises CommandFailed: if it is not.
    """
    try:
        import redis  # noqa: PLC0415  (an extra)
        from redis import asyncio as aio  # noqa: PLC0415
        from redis.asyncio.retry import Retry  # noqa: PLC0415
        from redis.backoff import NoBackoff  # noqa: PLC0415
    except ImportError:
        raise CommandFailed("quotas.shared needs the extra `quotas`: pip install 'inference-gateway[quotas]'") from None

    file = settings.password_file

    class _FromFile(redis.CredentialProvider):
        def get_credentials(self) -> tuple[str]:
            return (Path(file or "").read_text(encoding="utf-8").strip(),)

    url = settings.url.replace("valkeys://", "rediss://", 1).replace("valkey://", "redis://", 1)
    more: dict[str, Any] = {"credential_provider": _FromFile()} if file else {}
    return aio.Redis.from_url(
        url,
        socket_timeout=settings.timeout,
        socket_connect_timeout=settings.timeout,
        retry=Retry(NoBackoff(), 0),
        max_connections=2,
        **more,
    )


def _runner(client: Any) -> Run:
    script = client.register_script(SCRIPT)  # which loads it where the store does not know it

    async def run(keys: Sequence[str], arguments: Sequence[str]) -> Sequence[bytes]:
        answer: Sequence[bytes] = await script(keys=keys, args=arguments)
        return answer

    return run
