"""I/O: what one endpoint on this host shares with this worker, so that large tensors need not be sent.

Of the region that both see (`registration`) requests get parts for their tensors (`placed`), and for those of their
answers (`answer_place`). A part is used again only after Triton's own answer (`slots`, `kept`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from gateway.hooks import SharedMemoryNow
from gateway.types import Buffer
from gateway.upstream.answer_place import AnswerPlace, KnownAnswers
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.kept import Unheard
from gateway.upstream.placed import Held, Placed
from gateway.upstream.registration import Registration
from gateway.upstream.room import Room, SharedMemorySettings
from gateway.v2.answer_places import room_for
from gateway.v2.peek import RAW_INPUT
from gateway.v2.placing import read_front

_FIRST_RAW: Final = bytes((RAW_INPUT,))  # with which raw tensors begin
_MOST_GATHERED: Final = 8 << 20  # bytes of a merged request: what they take is copied on the event loop


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
        self.registration = Registration(endpoint, settings, room, clock)
        self.unheard = Unheard()
        self.answers = KnownAnswers()
        self._endpoint = endpoint
        self._counts: dict[str, int] = {}  # requests by what became of them: `placed`, or why not

    @property
    def state(self) -> str:
        return self.registration.state

    def count(self, what: str) -> None:
        self._counts[what] = self._counts.get(what, 0) + 1

    def suits(self, model: str) -> bool:
        """May tensors of this model's requests be there? Not if Triton may read on after its answer."""
        if self.unheard.has_steps(model):
            self.count("unsuited")
            return False
        return True

    # Requests

    def maybe_place(self, front: bytes, size: int) -> Placed | None:
        """Room for the tensors of a request; None: it goes as bytes.

        front: the beginning of the message. size: of the whole message.
        """
        region = self.registration.maybe_usable()
        if region is None:
            self.count("no_region")
            return None
        if self.unheard.is_too_much():
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

    def maybe_place_raw(self, front: bytes, raw: Sequence[Sequence[Buffer]], size: int) -> Placed | None:
        """A request whose raw tensors are laid into memory now, each from its pieces; None: it goes as bytes.

        front: all that is before them. size: of them in a message.
        """
        placed = self.maybe_place(front + _FIRST_RAW, len(front) + size)
        if placed is not None:
            placed.put(raw)
        return placed

    def maybe_hold(self, size: int) -> Held | None:
        """Memory in which tensors can be made; None if there is none now, or they are not worth it."""
        region = None if size < self.least else self.registration.maybe_usable()
        if region is None or self.unheard.is_too_much():
            return None
        slot = region.slots.maybe_take(size)
        return None if slot is None else Held(self, region, slot)

    def maybe_place_held(self, front: bytes, held: Held, places: Sequence[tuple[int, int]]) -> Placed | None:
        """A request whose tensors were made in memory; None: it goes as bytes.

        front: all that is before the raw tensors. places: where these lie, as of `Placing`.
        """
        if not self.registration.is_usable(held.region):
            self.count("no_region")
            return None
        parts = read_front(front + _FIRST_RAW)
        if parts is None:
            self.count("unsuited")
            return None
        placed = Placed(self, held.region, held.slot.again(), parts)
        placed.lie_at(places)
        return placed

    @property
    def gathers(self) -> int:
        """Bytes of several requests' tensors that may be laid there together now."""
        return 0 if self.registration.maybe_usable() is None else _MOST_GATHERED

    # Answers

    def maybe_answer_place(self, model: str, version: str, front: bytes) -> AnswerPlace | None:
        """Room for a large answer, if the size of the one to this request is known.

        front: the beginning of the request, at least to its first raw tensor.
        """
        region = self.registration.maybe_usable() if self.answers.knows(model) else None
        if region is None or self.unheard.is_too_much():
            return None
        parts = read_front(front)
        known = None if parts is None else self.answers.maybe(model, version, parts)
        if parts is None or known is None:
            return None
        slot = region.slots.maybe_take(room_for(known.sizes))
        return None if slot is None else AnswerPlace(self, region, slot, parts, known)

    # Beside the calls

    def now(self) -> SharedMemoryNow:
        regions = self.registration.regions()
        return SharedMemoryNow(
            self._endpoint.upstream,
            self._endpoint.address,
            self.state,
            sum(region.slots.size for region in regions),
            sum(region.slots.taken for region in regions),
            sum(region.slots.open for region in regions),
            self.unheard.count,
            dict(self._counts),
            dict(self.registration.counts),
        )

    async def close(self) -> None:
        """Let go of all of it. What Triton is still reading stays registered, for the next gateway to clear up."""
        await self.registration.close()
