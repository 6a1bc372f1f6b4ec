"""I/O: memory that the gateway shares with one Triton on this host, so that large tensors need not be sent.

A region belongs to one worker and one endpoint. Triton opens it by its name, which can't be guessed: that it could is
the proof that both see the same memory. `look`, which the prober has begun while the endpoint is ready, registers it,
and sees to what has become doubtful:

    none ──register──▶ in use ──a call's end is unknown──▶ retired ──Triton lets go of it──▶ none
                        │  ▲                                                                  ▲
     a connection ended └──┘ Triton still knows it        Triton does not know it ────────────┘

A part of a region is used again only after Triton's own answer (`slots`). After a lost connection nobody knows whether
Triton still reads, so the region is retired as a whole, with what is stuck in it: Triton refuses to unregister one that
is in use (probed, 2.51), and a Triton that was started anew knows none. A region that Triton has let go of, or that it
never knew, is not used again by anybody. Its memory goes before there is another one, so that there is never more of it
than the config says.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, Final

from tritonclient.grpc import service_pb2 as pb

from gateway.status import Code
from gateway.upstream.ask import Asker, ask
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.region import Region, is_abandoned, sweep
from gateway.upstream.room import FOLDER, Room, SharedMemorySettings, is_this_host
from gateway.v2.shared_memory import is_reserved

_log = logging.getLogger(__name__)

_AGAIN_SECONDS: Final = 60.0  # until a region is tried again that could not be had, unless a connection has ended
_PAUSE_SECONDS: Final = 1.0  # between two regions, which are work to make and whose end a model's error can bring
_REST_SECONDS: Final = 10.0  # until the next one, after Triton has lost one while its connections lived on
_PATIENCE: Final = Asker(timeout=1.5)
_CLOSING: Final = Asker(timeout=0.5)
_NOT_HERE: Final = "Unable to open shared memory region"  # Triton 2.51
_UNKNOWN: Final = "Unable to find shared memory region"  # likewise
_DOUBTED: Final = -1  # in the place of a count of lost connections, which it never equals
_OLDEST: Final = (2, 51)  # Triton's version that was seen to unregister no region that is in use


class Registration:
    """The region that one endpoint and this worker share."""

    def __init__(
        self, endpoint: Endpoint, settings: SharedMemorySettings, room: Room | None, clock: Callable[[], float]
    ) -> None:
        """room: of the endpoint's upstream; its own if that is all of it."""
        self.counts: dict[str, int] = {}  # by how they ended, since the start
        self.state = "not tried yet"
        self._endpoint = endpoint
        self._settings = settings
        self._room = room or Room(settings.most)
        self._clock = clock
        self._offered: Region | None = None  # while Triton is asked to register it
        self._region: Region | None = None
        self._retired: Region | None = None
        self._leaving: list[Region] = []  # without a use, until their memory is gone
        self._making: asyncio.Future[Region] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._is_closed = False
        self._again_at = 0.0
        self._tried_after = -1  # lost connections, when a region could not be had
        self._said = ""  # the last reason in the log, which need not be there twice
        self._is_swept = False
        if not (settings.anywhere or is_this_host(endpoint.address)):
            self.state = "the endpoint is not on this host"
            self._again_at = inf

    # For calls

    def maybe_usable(self) -> Region | None:
        """The region, if Triton has it for all that is known."""
        region = self._region
        return region if region is not None and self.is_usable(region) else None

    def is_usable(self, region: Region) -> bool:
        """Does Triton have it for all that is known?"""
        return region is self._region and region.losses == self._endpoint.connection.losses

    def is_unknown(self, region: Region, text: str) -> bool:
        """As `Placed.is_unknown`. If so, it is not used again before that is seen to."""
        if region.name not in text:
            return False
        if text.startswith(_UNKNOWN):
            self.lost(region)
        else:
            self.doubt(region)
        return True

    def lost(self, region: Region) -> None:
        """Triton does not know a region. Who has unregistered it is not known, so another one is not made at once."""
        if region is self._region:
            _log.warning("%s has lost the memory that it shared with the gateway", self._where)
            self._again_at = self._clock() + _REST_SECONDS
            self._let_go(region, "lost")
            self._endpoint.on_suspicion()

    def doubt(self, region: Region) -> None:
        """Triton has refused a place in it. Whether it knows the region is asked before the region is used again."""
        if region is self._region:
            region.losses = _DOUBTED
            self._endpoint.on_suspicion()

    # Beside the calls

    def look_soon(self) -> None:
        """Have somebody `look`. To be called again and again while the endpoint is ready."""
        if self._again_at == inf and not self._leaving:
            return  # the endpoint is on another host
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self.look())

    async def look(self) -> None:
        """See to the region; mostly it asks nothing."""
        if self._retired is not None and not await self._unregister(self._retired, _PATIENCE):
            return
        await self._remove()
        region = self._region
        if region is not None and not self.is_usable(region):
            losses = self._endpoint.connection.losses
            if not await self._is_known(region):
                self._let_go(region, "forgotten")
            elif region is self._region:
                region.losses = losses
            await self._remove()
        if self._region is None and self._retired is None and not self._leaving and self._may_try():
            await self._register()
            await self._remove()  # if Triton has refused it

    def _may_try(self) -> bool:
        return self._clock() >= self._again_at or self._endpoint.connection.losses != self._tried_after >= 0

    async def _register(self) -> None:
        endpoint, settings = self._endpoint, self._settings
        losses = endpoint.connection.losses
        try:
            await self._check_version()
            if not self._room.take(settings.size):  # others have it: it may be free at the next look
                self.state = f"all memory of the upstream is in use ({self._room.most >> 20} MiB)"
                return
            region = await self._made()
            request = pb.SystemSharedMemoryRegisterRequest(
                name=region.name, key=f"/{region.name}", byte_size=settings.size
            )
            await self._ask("SystemSharedMemoryRegister", request, pb.SystemSharedMemoryRegisterResponse)
        except (CallFailed, OSError) as error:
            if self._offered is not None:
                self._let_go(self._offered, "refused")
            else:
                self._count_registration("refused")
            self._refused(error, losses)
            return
        self._offered, self._tried_after, self._again_at = None, -1, self._clock() + _PAUSE_SECONDS
        region.losses = losses
        region.slots.on_stuck = self._retire
        self._region = region
        self.state = "in use"
        self._count_registration("registered")
        _log.info("%s shares %d MiB of memory with the gateway", self._where, settings.size >> 20)
        await self._unregister_abandoned(region)

    async def _made(self) -> Region:
        """A region that nobody knows yet. A thread makes it: that takes long.

        :raises OSError: as `Region`.
        """
        making = self._making = asyncio.get_running_loop().run_in_executor(None, self._make)
        try:
            region = await asyncio.shield(making)  # or `close` would not get to know it
        except OSError:
            self._making = None
            self._room.give(self._settings.size)
            raise
        self._making, self._offered = None, region
        return region

    def _make(self) -> Region:
        """In a thread."""
        settings = self._settings
        if not self._is_swept:
            self._is_swept = True
            sweep(settings.folder)
        return Region(settings.folder, settings.size, lambda: not self._is_closed)

    async def _remove(self) -> None:
        """Let a thread remove the regions that are of no use any more, as far as no call has a part of theirs."""
        for region in list(self._leaving):
            if await asyncio.get_running_loop().run_in_executor(None, region.close):
                self._leaving.remove(region)
                self._room.give(self._settings.size)

    async def _check_version(self) -> None:
        """:raises CallFailed: if the server is none that was seen to keep a region that is in use."""
        request = pb.ServerMetadataRequest()
        said = (await self._ask("ServerMetadata", request, pb.ServerMetadataResponse)).version
        numbers = [int(part) if part.isdecimal() else 0 for part in said.split(".")[:2]]
        if tuple(numbers) < _OLDEST:
            text = f"version {said[:20]!r} may unmap memory that is in use; 2.51 is the oldest known not to"
            raise CallFailed(Code.UNIMPLEMENTED, text)

    def _refused(self, error: CallFailed | OSError, losses: int) -> None:
        self._again_at, self._tried_after = self._clock() + _AGAIN_SECONDS, losses
        why = self.state = _why(error, self._settings)
        if why != self._said:
            self._said = why
            _log.warning("%s gets tensors as bytes and not by shared memory: %s", self._where, why)

    async def _unregister_abandoned(self, mine: Region) -> None:
        """Have Triton let go of regions whose gateways have died: those with a file that nobody holds, or with none."""
        try:
            request = pb.SystemSharedMemoryStatusRequest()
            status = await self._ask("SystemSharedMemoryStatus", request, pb.SystemSharedMemoryStatusResponse)
            for name in status.regions:
                if name != mine.name and _is_ours(name) and is_abandoned(self._settings.folder, name):
                    await self._ask_to_unregister(name, _PATIENCE)
        except CallFailed as failure:
            _log.info("%s: what a dead gateway shared is not cleared up: %s", self._where, failure.text)

    async def _is_known(self, region: Region) -> bool:
        """Does Triton still know it? True if it does not say."""
        request = pb.SystemSharedMemoryStatusRequest(name=region.name)
        try:
            await self._ask("SystemSharedMemoryStatus", request, pb.SystemSharedMemoryStatusResponse)
        except CallFailed as failure:
            return failure.code != Code.NOT_FOUND
        return True

    def _retire(self) -> None:
        """A call has ended of which nobody knows whether Triton still reads its tensors."""
        region = self._region
        if region is None or not region.slots.stuck:
            return  # one that is retired already, or gone
        self._region, self._retired = None, region
        self.state = "waits until Triton has let go of memory that it may be reading"
        self._count_registration("retired")
        self._endpoint.on_suspicion()

    async def _unregister(self, region: Region, asker: Asker) -> bool:
        """Has Triton let go of it?"""
        try:
            await self._ask_to_unregister(region.name, asker)
        except CallFailed:
            return False
        self._let_go(region, "unregistered")
        return True

    async def _ask_to_unregister(self, name: str, asker: Asker) -> None:
        request = pb.SystemSharedMemoryUnregisterRequest(name=name)
        answer = pb.SystemSharedMemoryUnregisterResponse
        await ask(self._endpoint, "SystemSharedMemoryUnregister", request, answer, asker)

    def _let_go(self, region: Region, how: str) -> None:
        if region is self._region:
            self._region = None
        elif region is self._retired:
            self._retired = None
        elif region is self._offered:
            self._offered = None
        else:
            return
        self.state = "not registered"
        self._count_registration(how)
        region.slots.on_stuck = None
        self._leaving.append(region)

    def _count_registration(self, how: str) -> None:
        self.counts[how] = self.counts.get(how, 0) + 1

    async def close(self) -> None:
        """Let go of all of it. What Triton is still reading stays registered, for the next gateway to clear up."""
        self._is_closed = True
        self._again_at = inf
        self._tried_after = -1
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait((self._looking,))
        if self._making is not None:
            await asyncio.wait((self._making,))
            if self._making.exception() is None:
                self._leaving.append(self._making.result())
            else:
                self._room.give(self._settings.size)
        for region in (self._offered, self._region, self._retired):
            if region is not None and not await self._unregister(region, _CLOSING):
                self._let_go(region, "left")
        await self._remove()

    def regions(self) -> Sequence[Region]:
        """All whose memory is there."""
        return [region for region in (self._region, self._retired, *self._leaving) if region is not None]

    @property
    def _where(self) -> str:
        return f"endpoint {self._endpoint.upstream}/{self._endpoint.address}"

    async def _ask(self, method: str, request: Any, answer: type[Any]) -> Any:
        """:raises CallFailed: also if there is no answer in time. Any: protobuf messages, which carry no types."""
        return await ask(self._endpoint, method, request, answer, _PATIENCE)


def _is_ours(name: str) -> bool:
    return is_reserved(name) and "/" not in name


def _why(error: CallFailed | OSError, settings: SharedMemorySettings) -> str:
    """Why there is no region, and what would be right."""
    if isinstance(error, OSError):
        text = f"{settings.size >> 20} MiB in {settings.folder} can't be had ({error.strerror})"
        return f"{text}; make that file system larger, or `bytes` smaller" if error.errno == errno.ENOSPC else text
    if error.text.startswith(_NOT_HERE):
        return f"Triton can't open a file of {settings.folder}: both need the same {FOLDER} and the same user"
    if not error.from_server:
        return "Triton did not answer"
    return f"Triton refuses it ({error.text[:200]}); from 26.04 on it must be started with --allow-client-shm=true"
