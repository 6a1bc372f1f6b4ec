"""Scripted Tritons as processes, each with its book; they are stopped, killed and started again."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from command_line import free_address
from traffic import until

from gateway.app import Gateway

Write = Callable[..., Path]
"""Writes a config with the model `m` on the endpoints that it is given, and further sections."""

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Sent:
    """How calls' tensors get to the servers."""

    shared_memory: str  # as the config says it
    size: int  # bytes

    async def check(self, running: Gateway) -> None:
        """Have they been sent so? While calls go on."""

        def placed() -> int:
            return sum(shared.requests.get("placed", 0) for shared in running._fleet.shared_memory())

        if self.shared_memory == "auto":
            await until(lambda: placed() > 20, 30, "tensors in shared memory", placed)
        else:
            assert placed() == 0


@dataclass
class Scripted:
    """A scripted Triton as a process, which can be stopped, killed and started again."""

    address: str
    book: Path
    milliseconds: int
    inside: Sequence[str] = ()
    process: subprocess.Popen[str] = field(init=False)

    def start(self) -> None:
        command = [
            sys.executable,
            str(HERE / "scripted_triton.py"),
            self.address,
            str(self.book),
            str(self.milliseconds),
        ]
        self.process = subprocess.Popen([*self.inside, *command], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "serving\n"

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass
class Servers:
    folder: Path
    made: list[Scripted] = field(default_factory=list)

    def start(self, milliseconds: int = 0, host: str = "", inside: Sequence[str] = ()) -> Scripted:
        address = f"{host}:8001" if host else free_address()
        server = Scripted(address, self.folder / f"book-{len(self.made)}", milliseconds, inside)
        server.start()
        self.made.append(server)
        return server

    @property
    def books(self) -> list[Path]:
        return [server.book for server in self.made]
