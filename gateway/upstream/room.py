"""Values: what the endpoints of an upstream may share with the gateway, and which of them are near enough to."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FOLDER: Final = Path("/dev/shm")  # noqa: S108  (where Linux keeps shared memory; shm_overview(7))


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


def is_this_host(address: str) -> bool:
    """Does an endpoint's address say that it is on this host?"""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
