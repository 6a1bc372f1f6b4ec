"""Gateways in processes of their own that follow one config, and so one store."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import Command, command, free_address
from traffic import write


@dataclass
class Replica:
    process: Command
    listen: str
    admin: str


@contextlib.asynccontextmanager
async def replicas(folder: Path, told: dict[str, Any], workers: Sequence[int] = (1, 1)) -> AsyncIterator[list[Replica]]:
    """Gateways that serve, each with so many workers. told: their config, but for where they listen."""
    async with contextlib.AsyncExitStack() as exits:
        found = []
        for number, processes in enumerate(workers):
            home = folder / str(number)
            home.mkdir(exist_ok=True)
            own = {**told, "listen": free_address(), "admin": {"listen": free_address()}, "workers": processes}
            file = write(home / "gateway.yaml", own)
            process = await exits.enter_async_context(
                command("serve", "--config", str(file), folder=home, cwd=Path.cwd())
            )
            found.append(Replica(process, own["listen"], own["admin"]["listen"]))
        for each in found:
            await each.process.until_serving()
        yield found
