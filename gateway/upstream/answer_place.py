"""An answer's tensors in a slot of the memory that an endpoint shares, where their sizes are known before it comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from gateway.bounded import make_room
from gateway.errors import MalformedMessage
from gateway.upstream.kept import Kept
from gateway.upstream.lent import lend
from gateway.upstream.region import Region
from gateway.upstream.slots import Slot
from gateway.v2.answer_places import is_larger, maybe_places, pieces, places, requested, sizes_of, wanted
from gateway.v2.peek import RAW_INPUT, is_raw
from gateway.v2.placing import Front, read_front

if TYPE_CHECKING:
    from gateway.upstream.shared_memory import SharedMemory

_MODELS_KEPT: Final = 64  # whose answers' sizes are remembered
_ANSWERS_KEPT: Final = 64  # of each, by what their requests look like: callers choose that
_LONGEST_KEPT: Final = 1024  # bytes of that


class KnownAnswer:
    """How large the outputs were of the last answer to a request of the same shapes."""

    def __init__(self, names: Sequence[bytes], sizes: Sequence[int]) -> None:
        self.names = names
        self.sizes = sizes
        self.varies = False  # has one been larger than those before it?


class KnownAnswers:
    """Those of one endpoint that were large, by model and by what the request looked like."""

    def __init__(self) -> None:
        self._models: dict[str, dict[tuple[bytes, ...], KnownAnswer]] = {}

    def __bool__(self) -> bool:
        return bool(self._models)

    def knows(self, model: str) -> bool:
        """Has it seen any of this model?"""
        return model in self._models

    def maybe(self, model: str, version: str, parts: Front) -> KnownAnswer | None:
        """What is known of the answer to a request; None too if its size varies."""
        known = self._models.get(model)
        found = None if known is None else known.get((version.encode(), *parts.key))
        return None if found is None or found.varies else found

    def learn(self, model: str, version: str, front: bytes, answer: bytes) -> None:
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
        if model not in self._models:
            make_room(self._models, _MODELS_KEPT)
        known = self._models.setdefault(model, {})
        key = (version.encode(), *parts.key)
        last = known.get(key)
        if last is None or (sizes != last.sizes and not last.varies):
            make_room(known, _ANSWERS_KEPT)
            known[key] = KnownAnswer(names, sizes)


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
        return Kept(self._memory.unheard, [self.slot], names)

    def is_in_vain(self, text: str) -> bool:
        """Does an error say that the outputs can't be there, so that the request is to be sent again without?"""
        if is_larger(text):
            self._known.varies = True
            self._memory.count("larger_answer")
            return True
        return self._memory.registration.is_unknown(self._region, text)

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

    def pieces(self, answer: bytes) -> Sequence[bytes | memoryview]:
        """The answer with its outputs, which are views of the slot: it is in use until nobody has one of them any more.

        Where half of the region is in use the answer is one copy, so that callers who are slow to take theirs hold no
        more than that. To be called in place of `drop`, unless it raises.

        :raises MalformedMessage: if it is none that may be.
        """
        found = places(answer, self._known.names, self._known.sizes)
        if not self._region.slots.is_half_taken:
            return pieces(answer, found, lend(self._view, self.drop))
        copy = b"".join(pieces(answer, found, self._view))
        self.drop()
        return [copy]

    def drop(self) -> None:
        """The call needs what is there no more. To be called once."""
        self.slot.drop()  # first: another thread that lets go of the last view has it for a moment yet
        self._view.release()
