"""Pure: which endpoint holds the state of which sequence. Instants are arguments.

A hash of a new sequence's id chooses its place (`routing`), so that processes and replicas agree; the table here makes
the place certain within one process. If they disagree, Triton itself refuses the sequence ("must specify the START
flag"), so a disagreement is an error and never a silent restart.

Triton knows a sequence by its id alone, whoever sends it. Where it is known who calls, ids are each caller's own: at
Triton a sequence has a hash of its caller's name and its id, which every worker and replica gives it, so none needs to
know what callers have begun elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from gateway.types import Parameter, Variant
from gateway.upstream.endpoint import Endpoint

SequenceKey = tuple[str, Parameter]
"""Public model and sequence id at Triton, where 5 and "5" are different sequences.

Tables have `text_of` it as their key, since 1 and True are one and the same key of a dict.
"""

ID: Final = "sequence_id"


@dataclass(frozen=True, slots=True)
class Pin:
    """Where a sequence lives."""

    variant: Variant
    endpoint: Endpoint
    lives: int = 0  # `Endpoint.lives` when the sequence began: if it has changed, the state may be lost


class Sequences:
    """A bounded table of running sequences, which forgets those that have been idle too long."""

    def __init__(self, *, idle: float, most: int) -> None:
        """idle: seconds without a request after which a sequence is forgotten. most: sequences that are kept."""
        self._idle = idle
        self._most = most
        self._pins: OrderedDict[str, tuple[float, Pin]] = OrderedDict()  # by `text_of`, least recently used first

    def __len__(self) -> int:
        return len(self._pins)

    def maybe_find(self, key: SequenceKey, now: float) -> Pin | None:
        self._forget_idle(now)
        found = self._pins.get(text_of(key))
        return found[1] if found else None

    def pin(self, key: SequenceKey, pin: Pin, now: float) -> None:
        """Note where a sequence lives, and that it was used now."""
        text = text_of(key)
        self._pins[text] = (now, pin)
        pin.endpoint.needed_at = now
        self._pins.move_to_end(text)
        if len(self._pins) > self._most:
            self._pins.popitem(last=False)

    def end(self, key: SequenceKey) -> None:
        self._pins.pop(text_of(key), None)

    def _forget_idle(self, now: float) -> None:
        while self._pins:
            key, (used, _) = next(iter(self._pins.items()))
            if now - used < self._idle:
                return
            del self._pins[key]


def id_of(caller: str, id: Parameter) -> Parameter:
    """The id at Triton of a caller's sequence: no two callers have the same one.

    A number of 63 bits for a number, and 32 characters for a text, of which Triton takes 128. Triton gives models whose
    control input has 32 bits the lower half.
    """
    if isinstance(id, bool) or not isinstance(id, int | str):
        return id  # Triton says what is wrong with it
    kind = "text" if isinstance(id, str) else "number"
    digest = blake2b(f"{caller}\0{kind}\0{id}".encode("utf-8", "surrogatepass"), digest_size=16)
    if isinstance(id, str):
        return digest.hexdigest()
    return (int.from_bytes(digest.digest()[:8], "big") >> 1) or 1


def text_of(key: SequenceKey) -> str:
    """A text for each sequence, different for 5 and "5"."""
    return f"{key[0]}\0{key[1]!r}"


def draw_for(key: SequenceKey) -> float:
    """A number in [0, 1) that every worker and replica gives the same sequence."""
    digest = blake2b(text_of(key).encode("utf-8", "surrogatepass"), digest_size=7).digest()
    return (int.from_bytes(digest, "big") >> 3) * 2.0**-53
