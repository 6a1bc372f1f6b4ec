"""A network namespace with one link to this host, which can be taken down: packets vanish, and nobody is told."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

HERE, THERE = "10.199.77.1", "10.199.77.2"


def why_not() -> str:
    """Why there can be none on this machine; "" if there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and iproute2"
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return ""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@dataclass
class Namespace:
    name: str

    @property
    def inside(self) -> tuple[str, ...]:
        """What a command begins with to run inside."""
        return ("ip", "netns", "exec", self.name)

    def swallow(self) -> None:
        """From now on packets from there are lost: the far end of the link is down, this end says nothing of it."""
        _ip("-n", self.name, "route", "add", "blackhole", f"{HERE}/32")

    def heal(self) -> None:
        _ip("-n", self.name, "route", "del", "blackhole", f"{HERE}/32")


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    made = Namespace(f"faults{os.getpid()}")
    link = f"flt{os.getpid() % 100_000}"
    _ip("netns", "add", made.name)
    try:
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", made.name)
        _ip("addr", "add", f"{HERE}/30", "dev", link)
        _ip("link", "set", link, "up")
        _ip("-n", made.name, "addr", "add", f"{THERE}/30", "dev", "eth0")
        _ip("-n", made.name, "link", "set", "eth0", "up")
        _ip("-n", made.name, "link", "set", "lo", "up")
        yield made
    finally:
        _ip("netns", "del", made.name)  # the link goes with it
