"""A request's tensors in a slot of the memory that an endpoint shares, in place of in its message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gateway.rpc.places import Place
from gateway.types import Buffer
from gateway.upstream.answer_place import AnswerPlace
from gateway.upstream.kept import Kept
from gateway.upstream.region import Region
from gateway.upstream.slots import Slot
from gateway.v2.placing import Front, Placing

if TYPE_CHECKING:
    from gateway.upstream.shared_memory import SharedMemory


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
        if not memory.registration.is_usable(self._region):
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
        return Kept(self._memory.unheard, [self._slot] if outputs is None else [self._slot, outputs.slot], names)

    def is_unknown(self, text: str) -> bool:
        """Does an error say that Triton does not know the region, or not as it is? Then it has not begun with the call.

        Only Triton's own check of a request can name the region: no model and no caller knows the name.
        """
        return self._memory.registration.is_unknown(self._region, text)

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
