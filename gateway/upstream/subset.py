"""Pure: which endpoints of a large upstream one gateway keeps in touch with, so that all together use all alike.

The endpoints are put on a ring in the order of their hashes, and a gateway has those that follow its own place on it:
as one endpoint comes or goes, so does at most one at each gateway. Gateways that have an ordinal (the pods of a
StatefulSet) get places that are spread evenly however many there are, by the binary van der Corput sequence; others get
one by chance. As in P. Ward et al., Reinventing Backend Subsetting at Google, ACM Queue 20(5), 2022 ("Ringsteady").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

_ORDINAL: Final = re.compile(r"-(\d{1,9})$")
_SPACE: Final = 2.0**-53


def subset_of(endpoints: Sequence[str], size: int, place: float) -> tuple[str, ...]:
    """So many of the endpoints, whatever order they came in; all of them if there are no more.

    place: of the gateway on the ring, in [0, 1).
    """
    return tuple(endpoints) if len(endpoints) <= size else part_of(ring_of(endpoints), size, place)


def ring_of(endpoints: Sequence[str]) -> Sequence[str]:
    """The endpoints in their order on the ring, which is the same for every gateway."""
    return sorted(endpoints, key=_hash)


def part_of(ring: Sequence[str], size: int, place: float) -> tuple[str, ...]:
    start = int(place * len(ring))
    part = tuple(ring[start : start + size])
    return part + tuple(ring[: size - len(part)])


def place_of(host: str, worker: int, workers: int) -> float:
    """A gateway's place on the ring. host: its name, which ends in its ordinal if it has one; worker: from 0 on."""
    found = _ORDINAL.search(host)
    if found is not None:
        return van_der_corput(int(found.group(1)) * workers + worker)
    digest = blake2b(f"{host}\0{worker}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * _SPACE


def van_der_corput(number: int) -> float:
    """The bits of a number in reverse, behind the point: each number falls into the widest gap between those before."""
    value, part = 0.0, 0.5
    while number:
        if number & 1:
            value += part
        number >>= 1
        part /= 2.0
    return value


def _hash(endpoint: str) -> bytes:
    return blake2b(endpoint.encode(), digest_size=8, person=b"subset").digest()
