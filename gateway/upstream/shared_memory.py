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
import ipaddress
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Final

from tritonclient.grpc import service_pb2 as pb

from gateway.bounded import make_room
from gateway.errors import MalformedMessage
from gateway.hooks import SharedMemoryNow
from gateway.rpc.places import Place
from gateway.status import Code, is_of_step, is_tritons_own
from gateway.types import Buffer
from gateway.upstream.ask import Asker, ask
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.region import Region, is_abandoned, sweep
from gateway.upstream.slots import Slot
from gateway.v2.answer_places import is_larger, maybe_places, requested, room_for, sizes_of, wanted, whole
from gateway.v2.peek import RAW_INPUT, is_raw
from gateway.v2.placing import Front, Placing, read_front
from gateway.v2.shared_memory import is_reserved

_log = logging.getLogger(__name__)

FOLDER: Final = Path("/dev/shm")  # noqa: S108  (where Linux keeps shared memory; shm_overview(7))
_AGAIN_SECONDS: Final = 60.0  # until a region is tried again that could not be had, unless a connection has ended
MOST_GIVEN_UP: Final = 8
"""Calls that are given up and run on in an endpoint. Once there are so many, tensors go as bytes until all of them have
ended: what is sent so has a deadline, and Triton drops it when it is cancelled. Else a Triton with more to do than it
can would compute what nobody waits for any more."""
_GIVEN_UP_SECONDS: Final = 30.0  # for which a call that is given up keeps its places: its endpoint may hang
_STEPS_SECONDS: Final = 600.0  # for which a part stays taken that an ensemble's steps may read after it has failed
_ENSEMBLES_KEPT: Final = 1024  # models that have failed so
_PAUSE_SECONDS: Final = 1.0  # between two regions, which are work to make and whose end a model's error can bring
_REST_SECONDS: Final = 10.0  # until the next one, after Triton has lost one while its connections lived on
_PATIENCE: Final = Asker(timeout=1.5)
_CLOSING: Final = Asker(timeout=0.5)
_NOT_HERE: Final = "Unable to open shared memory region"  # Triton 2.51
_UNKNOWN: Final = "Unable to find shared memory region"  # likewise
_FIRST_RAW: Final = bytes((RAW_INPUT,))  # with which raw tensors begin
_MOST_GATHERED: Final = 8 << 20  # bytes of a merged request: what they take is copied on the event loop
_DOUBTED: Final = -1  # in the place of a count of lost connections, which it never equals
_MODELS_KEPT: Final = 64  # whose answers' sizes are remembered
_ANSWERS_KEPT: Final = 64  # of each, by what their requests look like: callers choose that
_LONGEST_KEPT: Final = 1024  # bytes of that
_OLDEST: Final = (2, 51)  # Triton's version that was seen to unregister no region that is in use


@dataclass(frozen=True, slots=True)
class SharedMemorySettings:
    """What an upstream's endpoints share with the gateway."""

    size: int  # bytes of a region
    least: int  # bytes of a request that is worth it
    folder: Path = FOLDER
    anywhere: bool = False  # is it tried with endpoints whose address does not say that they are on this host?
    most: int = 1 << 62  # bytes of all regions of the upstream, of which a name may stand for any number of endpoints


class Room:
    """How much memory the endpoints of one upstream have for regions, and how much of it is taken. Bytes."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0

    def take(self, size: int) -> bool:
        """False: there is not so much left."""
        if self.taken + size > self.most:
            return False
        self.taken += size
        return True

    def give(self, size: int) -> None:
        self.taken -= size


@dataclass(slots=True)
class Counts:
    """Since the start."""

    requests: dict[str, int] = field(default_factory=dict)  # by what became of them: `placed`, or why not
    registrations: dict[str, int] = field(default_factory=dict)  # by how they ended


class Placed(Place):
    """The tensors of one request in a slot."""

    def __init__(self, memory: SharedMemory, region: Region, slot: Slot, front: Front) -> None:
        self._memory = memory
        self._region = region
        self._slot = slot
        self._front = front
        self._is_dropped = False
        self._placing = Placing(region.memory[slot.begin : slot.begin + slot.size])

    @property
    def raw_at(self) -> int:
        """Where the raw tensors begin in the message."""
        return self._front.raw

    def feed(self, data: bytes) -> None:
        if not self._is_dropped:  # then the slot may be another's
            self._placing.feed(data)

    def feed_view(self, view: memoryview) -> None:
        if not self._is_dropped:
            self._placing.feed_view(view)

    def maybe_room(self, most: int) -> memoryview | None:
        return None if self._is_dropped else self._placing.maybe_room(most)

    def filled(self, size: int) -> None:
        self._placing.filled(size)

    def feed_first(self, data: bytes) -> None:
        """The first bytes of the message, at least to the tag of its first raw tensor."""
        self._placing.feed(data, self._front.raw)

    @property
    def layout(self) -> bytes:
        """As `Front.layout`."""
        return self._front.layout

    @property
    def memory(self) -> memoryview:
        """Its slot."""
        return self._placing.memory

    def maybe_spans(self) -> list[tuple[int, int]] | None:
        """Where its tensors begin and end in the memory; None if not all of them are there."""
        placing = self._placing
        return [(begin, begin + size) for begin, size in placing.places] if placing.is_whole else None

    def put(self, raw: Sequence[Sequence[Buffer]]) -> None:
        """All of the raw tensors, each in pieces, if they are not in a message."""
        for each in raw:
            if not self._placing.put(each):
                return  # which `request` tells by their number

    def lie_at(self, places: Sequence[tuple[int, int]]) -> None:
        """The raw tensors are in the slot already."""
        self._placing.places.extend(places)

    def request(self, names: tuple[str, str, str], outputs: AnswerPlace | None = None) -> bytes | None:
        """The request that names where the tensors lie; None if it must be sent as bytes after all.

        names: of model and version, and the id. outputs: where those of the answer are to be.
        """
        placing, memory = self._placing, self._memory
        if not memory.is_usable(self._region):
            memory.count("no_region")
            return None
        request: bytes | None = None
        if placing.is_whole:
            asked = None if outputs is None else outputs.asked
            request = self._front.placed(names, self._region.name, self._slot.begin, placing.places, asked)
        if request is None:
            memory.count("unsuited")
            return None
        return request

    def sent(self) -> None:
        """The request goes to Triton, which reads the tensors from now on."""
        self._memory.count("placed")
        self._slot.sent()

    def kept(self, names: tuple[str, str, str], outputs: AnswerPlace | None = None) -> Kept:
        """What the server keeps while it has the call. names, outputs: as of `request`."""
        return Kept(self._memory, [self._slot] if outputs is None else [self._slot, outputs.slot], names)

    def is_unknown(self, text: str) -> bool:
        """Does an error say that Triton does not know the region, or not as it is? Then it has not begun with the call.

        Only Triton's own check of a request can name the region: no model and no caller knows the name.
        """
        return self._memory.is_unknown(self._region, text)

    def raw(self) -> bytes:
        """What came of the message, from its first raw tensor on."""
        return self._placing.raw()

    def drop(self) -> None:
        """The call needs the tensors no more."""
        if not self._is_dropped:
            self._is_dropped = True
            self._placing.release()
            self._slot.drop()


class Held:
    """A part of a region that is held before there is a request: tensors are made in it, for calls to come."""

    __slots__ = ("_memory", "region", "slot", "view")

    def __init__(self, memory: SharedMemory, region: Region, slot: Slot) -> None:
        self._memory = memory
        self.region = region
        self.slot = slot
        self.view = region.memory[slot.begin : slot.begin + slot.size]  # writable

    def is_of(self, memory: SharedMemory) -> bool:
        return memory is self._memory

    def drop(self) -> None:
        """Nobody needs what is in it any more, apart from calls that it was placed for."""
        self.slot.drop()


class AnswerPlace:
    """Where the outputs of one answer are to be: a slot that the server writes."""

    def __init__(self, memory: SharedMemory, region: Region, slot: Slot, front: Front, known: KnownAnswer) -> None:
        self._memory = memory
        self._region = region
        self.slot = slot
        self._view = region.memory[slot.begin : slot.begin + slot.size]  # which keeps it mapped
        self._front = front
        self._known = known
        self.asked = requested(known.names, known.sizes, region.name, slot.begin)

    def request(self, names: tuple[str, str, str], body: bytes) -> bytes | None:
        """A request, whose own tensors are bytes, for an answer there; None if it has more behind them.

        names: of model and version, and the id.
        """
        if not is_raw(body, self._front.raw, RAW_INPUT):
            return None  # what is there would count in place of these names, or be asked for beside these outputs
        return self._front.asking(names, self.asked, body[self._front.raw :])

    def sent(self) -> None:
        """The request goes to Triton, which writes there from now on."""
        self._memory.count("answer")
        self.slot.sent()

    def kept(self, names: tuple[str, str, str]) -> Kept:
        """As of `Placed`, of a call whose own tensors are bytes."""
        return Kept(self._memory, [self.slot], names)

    def is_in_vain(self, text: str) -> bool:
        """Does an error say that the outputs can't be there, so that the request is to be sent again without?"""
        if is_larger(text):
            self._known.varies = True
            self._memory.count("larger_answer")
            return True
        return self._memory.is_unknown(self._region, text)

    def is_not_there(self, answer: bytes) -> bool:
        """Are the outputs others than were to be there, as of a model that was loaded anew? Then as `is_in_vain`."""
        try:
            if maybe_places(answer, self._known.names, self._known.sizes) is not None:
                return False
        except MalformedMessage:
            return False  # which whoever reads it finds, too
        self._known.varies = True
        self._memory.count("other_answer")
        return True

    def whole(self, answer: bytes) -> bytes:
        """The answer with its outputs. raises: MalformedMessage if it is none that may be."""
        return whole(answer, self._known.names, self._known.sizes, self._view)

    def drop(self) -> None:
        """The call needs what is there no more. To be called once."""
        self._view.release()
        self.slot.drop()


class Kept:
    """The parts of a region that a server may read and write for one call, until it has answered."""

    def __init__(self, memory: SharedMemory, slots: Sequence[Slot], names: tuple[str, str, str]) -> None:
        """names: of model and version, and the id, as the server gets them."""
        self._memory = memory
        self._slots = slots
        self._names = names
        self._has_steps = False  # may steps of an ensemble go on, though it has answered?
        self._is_over = False  # has Triton answered, or does nobody wait for that any more?
        self._ends: list[Callable[[], None]] = []  # if it is given up
        self._timer: asyncio.TimerHandle | None = None

    def released(self, is_answered: bool) -> None:
        """As `Slot.released`."""
        if self._has_steps:
            asyncio.get_running_loop().call_later(self._memory.steps_seconds, self._let_go, is_answered)
        else:
            self._let_go(is_answered)
        if self._timer is not None:
            self._memory.given_up -= 1
            self._timer.cancel()
        self._end()

    def _let_go(self, is_answered: bool) -> None:
        for slot in self._slots:
            slot.released(is_answered)

    def give_up(self, ended: Callable[[], None]) -> None:
        """Nobody waits for the answer any more, while Triton goes on. May be called again, by whoever is to be told.

        ended: called once Triton has answered, or after a while without an answer; at once if that was already.
        """
        if self._is_over:
            ended()
            return
        self._ends.append(ended)
        if self._timer is None:
            self._memory.given_up += 1
            self._timer = asyncio.get_running_loop().call_later(_GIVEN_UP_SECONDS, self._end)

    def _end(self) -> None:
        self._is_over = True
        ends, self._ends = self._ends, []
        for end in ends:
            end()

    def is_own(self, code: Code, text: str, is_core: bool) -> bool:
        """Is a status of the call provably Triton's own, so that it reads no more? See `is_tritons_own`.

        An ensemble answers once a step has failed, while others go on with the request's tensors, and Triton lets go of
        a region that they read (probed, 2.51). So that is a reason neither to free a place nor to retire the region.
        """
        model, version, id = self._names
        if code is not Code.OK and is_of_step(text):
            self._has_steps = True
            self._memory.failed_in_step(model)
            return True
        return is_tritons_own(code, text, is_core, model=model, version=version, id=id)


class KnownAnswer:
    """How large the outputs were of the last answer to a request of the same shapes."""

    def __init__(self, names: Sequence[bytes], sizes: Sequence[int]) -> None:
        self.names = names
        self.sizes = sizes
        self.varies = False  # has one been larger than those before it?


class SharedMemory:
    """What one endpoint shares with this worker."""

    def __init__(
        self,
        endpoint: Endpoint,
        settings: SharedMemorySettings,
        room: Room | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """room: of the endpoint's upstream; its own if that is all of it."""
        self.least = settings.least
        self.counts = Counts()
        self.steps_seconds = _STEPS_SECONDS
        self._ensembles: dict[str, None] = {}  # models that have failed in a step
        self.given_up = 0  # calls that nobody waits for any more, and Triton has not answered
        self._is_sparing = False  # have there been too many?
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
        self._answers: dict[str, dict[tuple[bytes, ...], KnownAnswer]] = {}  # large ones, by model
        self._said = ""  # the last reason in the log, which need not be there twice
        self._is_swept = False
        if not (settings.anywhere or is_this_host(endpoint.address)):
            self.state = "the endpoint is not on this host"
            self._again_at = inf

    # On the way of calls

    @property
    def knows_answers(self) -> bool:
        """Has it seen a large answer, for whose like there may be room?"""
        return bool(self._answers)

    def suits(self, model: str) -> bool:
        """May tensors of this model's requests be there? Not if Triton may read on after its answer."""
        if model in self._ensembles:
            self.count("unsuited")
            return False
        return True

    def failed_in_step(self, model: str) -> None:
        """A model is an ensemble whose step has failed."""
        make_room(self._ensembles, _ENSEMBLES_KEPT)
        self._ensembles[model] = None

    def maybe_place(self, front: bytes, size: int) -> Placed | None:
        """Room for the tensors of a request; None: it goes as bytes.

        front: the beginning of the message. size: of the whole message.
        """
        region = self._region
        if region is None or not self.is_usable(region):
            self.count("no_region")
            return None
        if self._has_too_many_given_up():
            self.count("given_up")
            return None
        parts = read_front(front)
        if parts is None:
            self.count("unsuited")
            return None
        slot = region.slots.maybe_take(parts.size_of(size))
        if slot is None:
            self.count("no_slot")
            return None
        return Placed(self, region, slot, parts)

    def _has_too_many_given_up(self) -> bool:
        """Too many are so until none is left."""
        self._is_sparing = self.given_up > 0 and (self._is_sparing or self.given_up >= MOST_GIVEN_UP)
        return self._is_sparing

    def maybe_hold(self, size: int) -> Held | None:
        """Memory in which tensors can be made; None if there is none now, or they are not worth it."""
        region = self._region
        if region is None or size < self.least or not self.is_usable(region) or self._has_too_many_given_up():
            return None
        slot = region.slots.maybe_take(size)
        return None if slot is None else Held(self, region, slot)

    def maybe_place_held(self, front: bytes, held: Held, places: Sequence[tuple[int, int]]) -> Placed | None:
        """A request whose tensors were made in memory; None: it goes as bytes.

        front: all that is before the raw tensors. places: where these lie, as of `Placing`.
        """
        parts = self._maybe_read(held.region, front)
        if parts is None:
            return None
        placed = Placed(self, held.region, held.slot.again(), parts)
        placed.lie_at(places)
        return placed

    @property
    def gathers(self) -> int:
        """Bytes of several requests' tensors that may be laid there together now."""
        region = self._region
        return _MOST_GATHERED if region is not None and self.is_usable(region) else 0

    def maybe_place_raw(self, front: bytes, raw: Sequence[Sequence[Buffer]], size: int) -> Placed | None:
        """A request whose raw tensors are laid into memory now, each from its pieces; None: it goes as bytes.

        front: all that is before them. size: of them in a message.
        """
        placed = self.maybe_place(front + _FIRST_RAW, len(front) + size)
        if placed is not None:
            placed.put(raw)
        return placed

    def _maybe_read(self, region: Region, front: bytes) -> Front | None:
        if not self.is_usable(region):
            self.count("no_region")
            return None
        parts = read_front(front + _FIRST_RAW)
        if parts is None:
            self.count("unsuited")
        return parts

    def is_usable(self, region: Region) -> bool:
        """Does Triton have it for all that is known?"""
        return region is self._region and region.losses == self._endpoint.connection.losses

    def count(self, what: str) -> None:
        self.counts.requests[what] = self.counts.requests.get(what, 0) + 1

    def maybe_answer_place(self, model: str, version: str, front: bytes) -> AnswerPlace | None:
        """Room for a large answer, if the size of the one to this request is known.

        front: the beginning of the request, at least to its first raw tensor.
        """
        known = self._answers.get(model)
        region = self._region
        if known is None or region is None or not self.is_usable(region) or self._has_too_many_given_up():
            return None
        parts = read_front(front)
        found = None if parts is None else known.get((version.encode(), *parts.key))
        if parts is None or found is None or found.varies:
            return None
        slot = region.slots.maybe_take(room_for(found.sizes))
        return None if slot is None else AnswerPlace(self, region, slot, parts, found)

    def learn_answer(self, model: str, version: str, front: bytes, answer: bytes) -> None:
        """Remember how large an answer was that came as bytes. front, answer: the beginnings of both messages."""
        parts = read_front(front)
        if parts is None or not parts.named or sum([len(piece) for piece in parts.key]) > _LONGEST_KEPT:
            return
        try:
            names = wanted(parts.named)
            sizes = sizes_of(answer, names) if names else None
        except (MalformedMessage, IndexError):
            return
        if sizes is None:
            return
        if model not in self._answers:
            make_room(self._answers, _MODELS_KEPT)
        known = self._answers.setdefault(model, {})
        key = (version.encode(), *parts.key)
        last = known.get(key)
        if last is None or (sizes != last.sizes and not last.varies):
            make_room(known, _ANSWERS_KEPT)
            known[key] = KnownAnswer(names, sizes)

    def is_unknown(self, region: Region, text: str) -> bool:
        """As `Placed.is_unknown`."""
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
        self.counts.registrations[how] = self.counts.registrations.get(how, 0) + 1

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

    def now(self) -> SharedMemoryNow:
        regions = [region for region in (self._region, self._retired, *self._leaving) if region is not None]
        return SharedMemoryNow(
            self._endpoint.upstream,
            self._endpoint.address,
            self.state,
            sum(region.slots.size for region in regions),
            sum(region.slots.taken for region in regions),
            sum(region.slots.open for region in regions),
            self.given_up,
            dict(self.counts.requests),
            dict(self.counts.registrations),
        )

    @property
    def _where(self) -> str:
        return f"endpoint {self._endpoint.upstream}/{self._endpoint.address}"

    async def _ask(self, method: str, request: Any, answer: type[Any]) -> Any:
        """:raises CallFailed: also if there is no answer in time. Any: protobuf messages, which carry no types."""
        return await ask(self._endpoint, method, request, answer, _PATIENCE)


def is_this_host(address: str) -> bool:
    """Does an endpoint's address say that it is on this host?"""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
