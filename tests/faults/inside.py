"""What the event loop of a gateway in another process does: how many tasks it has, and how late its timers are.

`PYTHONPATH` begins with the folder that `looking_inside` has made, so that Python imports what is there as it starts.
The process then writes what it has seen since the last time, whenever it is asked by a file.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from traffic import until

_CODE = """
import asyncio, json, os, threading, time
import uvloop

run, folder = uvloop.run, os.environ["INSIDE"]
ask, told = os.path.join(folder, "ask"), os.path.join(folder, "told")
lags = []

def sample(loop, due):
    lags.append(max(0.0, loop.time() - due))
    due = loop.time() + 0.01
    loop.call_at(due, sample, loop, due)

def tell(loop):
    names = sorted(task.get_coro().__qualname__ for task in asyncio.all_tasks(loop))
    found, lags[:] = sorted(lags), []
    with open(told + ".new", "w") as file:
        json.dump({"tasks": names, "lags": found}, file)
    os.replace(told + ".new", told)

def listen(loop):
    while True:
        time.sleep(0.05)
        if os.path.exists(ask):
            os.unlink(ask)
            loop.call_soon_threadsafe(tell, loop)

async def watched(main):
    loop = asyncio.get_running_loop()
    sample(loop, loop.time())
    threading.Thread(target=listen, args=(loop,), daemon=True).start()
    return await main

uvloop.run = lambda main, **more: run(watched(main), **more)
"""


@dataclass
class Inside:
    tasks: list[str]  # names of their coroutines
    lags: list[float]  # seconds since the last time, in rising order

    @property
    def lasting(self) -> Counter[str]:
        """Without those that a wait with a timeout makes, until Python 3.12, for as long as it lasts."""
        return Counter(name for name in self.tasks if name != "Event.wait")

    @property
    def usual_lag(self) -> float:
        return self.lags[len(self.lags) // 2]

    @property
    def rare_lag(self) -> float:
        """One in a thousand is later. It tells of the machine as well: callers and Triton share its cores."""
        return self.lags[len(self.lags) * 999 // 1000]


def looking_inside(folder: Path) -> Mapping[str, str]:
    """The environment of a gateway that can be looked into."""
    code = folder / "inside"
    code.mkdir()
    (code / "sitecustomize.py").write_text(_CODE)
    return {"PYTHONPATH": os.pathsep.join((str(code), os.environ.get("PYTHONPATH", ""))), "INSIDE": str(code)}


async def look(folder: Path) -> Inside:
    told = folder / "inside" / "told"
    told.unlink(missing_ok=True)
    (folder / "inside" / "ask").touch()
    await until(told.exists, 20, "what the process tells of its loop")
    return Inside(**json.loads(told.read_text()))


async def settled(folder: Path) -> Inside:
    """Once it has the same tasks twice, half a second apart."""
    before = await look(folder)
    while True:
        await asyncio.sleep(0.5)
        now = await look(folder)
        if now.lasting == before.lasting:
            return now
        before = now
