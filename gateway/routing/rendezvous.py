"""routing (pure): stable assignment by rendezvous hashing, the same on every replica, with nothing to remember.

Every candidate gets its own hash of the key and the best one wins (Thaler and Ravishankar 1998). A candidate's hash
depends on nothing else, so a key moves only if the winner left, or if another one overtook it. Weights enter as a race
of exponential clocks: the least of -ln(h)/weight, with h uniform in (0, 1), is each candidate with a probability in
proportion to its weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from math import log
from typing import Final

from gateway.bounded import make_room

_UNIT: Final = 2.0**-52
_KEPT, _LONGEST_KEPT = 256, 128  # keys that are remembered, and their longest in characters


def keyed(salt: str, candidate: str) -> blake2b:
    """The hash state of a candidate before the key. `salt` makes the assignments of two splits independent."""
    state = blake2b(key=blake2b(salt.encode(), digest_size=32).digest(), digest_size=8)
    name = candidate.encode()
    state.update(len(name).to_bytes(4, "big") + name)
    return state


class Rendezvous:
    """Assigns keys to weighted candidates.

    Between two sets of weights a key moves from a to b only if b's weight grew more than a's, in proportion. So if one
    weight changes, keys move only to it or from it, and exactly as many as its share changed.
    """

    __slots__ = ("_arms", "_chosen")

    def __init__(self, weights: Mapping[str, float], salt: str) -> None:
        """weights: above 0; only proportions count."""
        self._arms = [(name, keyed(salt, name), -1.0 / weight) for name, weight in weights.items()]
        self._chosen: dict[str, str] = {}  # choices for the last keys, since hashing costs time for each candidate

    def choose(self, key: str) -> str:
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._choose(key)
            if len(key) <= _LONGEST_KEPT:  # callers choose the keys, so their number and length are bounded
                make_room(self._chosen, _KEPT)
                self._chosen[key] = chosen
        return chosen

    def _choose(self, key: str) -> str:
        raw = key.encode("utf-8", "surrogatepass")
        winner, best = "", float("inf")
        for name, keyed_state, pace in self._arms:
            state = keyed_state.copy()
            state.update(raw)
            # 52 bits and a half, so that the fraction is never 0 and never rounds to 1.
            time = log(((int.from_bytes(state.digest(), "big") >> 12) + 0.5) * _UNIT) * pace
            if time < best:
                winner, best = name, time
        return winner

    def hashes(self, key: str) -> dict[str, int]:
        """The 64-bit hash of the key for each candidate, for explanations."""
        raw = key.encode("utf-8", "surrogatepass")
        found = {}
        for name, keyed_state, _ in self._arms:
            state = keyed_state.copy()
            state.update(raw)
            found[name] = int.from_bytes(state.digest(), "big")
        return found


def endpoint_order(key: str, endpoints: Sequence[str]) -> list[str]:
    """Endpoints for a sequence, the best first, whatever order they came in.

    When an endpoint leaves, only its own keys move, each to the next in its order; a new one takes an equal share from
    all the others.
    """
    raw = key.encode("utf-8", "surrogatepass")
    return sorted(endpoints, key=lambda endpoint: blake2b(endpoint.encode() + b"\0" + raw, digest_size=8).digest())
