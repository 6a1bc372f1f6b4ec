"""Plays an abuse against a gateway, by frames, as fast as flow control lets it; and the gateway with its neighbours."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abuses import PUBLIC_MODELS, Abuse
from frames import DATA, INITIAL_WINDOW, WINDOW_UPDATE, Frame, Peer, connect, window
from processes import ROOT, Served, gateway

MOST_SECONDS = 3.0  # for one abuse, beside its `hold`
STUCK_SECONDS = 0.3  # without window for a stream, until the abuser goes on to the next
MiB = 1 << 20


class Abuser(Peer):
    """One connection. It sends no DATA for which there is no window, so that it is not cut for that."""

    def __init__(self, port: int, abuse: Abuse) -> None:
        super().__init__(connect(port).sock)
        self._abuse = abuse
        self._windows: dict[int, int] = defaultdict(int, {0: 65_535})  # of streams: beside what all have at first
        self._until = time.monotonic() + MOST_SECONDS

    def play(self) -> None:
        self.greet([(INITIAL_WINDOW, self._abuse.window)])
        self._send_all(self._abuse.opening)
        for number in range(self._abuse.count):
            frames = self._abuse.unit(2 * number + 1)
            if number == self._abuse.count - 1:
                frames = frames[: len(frames) - self._abuse.cut]
            if not self._send_all(frames) or time.monotonic() > self._until:
                break
            if self._abuse.pause or number % 20 == 0:
                self._read_for(self._abuse.pause)
        self._read_for(self._abuse.hold or 0.05)

    def _send_all(self, frames: bytes) -> bool:
        """Is it worth going on?"""
        at = sent = 0
        while at + 9 <= len(frames):
            size = int.from_bytes(frames[at : at + 3], "big")
            stream = int.from_bytes(frames[at + 5 : at + 9], "big")
            if frames[at + 3] == DATA:
                if not self._may_send(stream, size):
                    self.send(frames[sent:at])
                    sent = at
                    if not self._wait_for_window(stream, size):
                        return not self.closed
                self._windows[0] -= size
                self._windows[stream] -= size
            at += 9 + size
        return self.send(frames[sent:]) and not self.closed

    def _may_send(self, stream: int, size: int) -> bool:
        return size <= min(self._windows[0], self.settings.get(INITIAL_WINDOW, 65_535) + self._windows[stream])

    def _wait_for_window(self, stream: int, size: int) -> bool:
        give_up = min(time.monotonic() + STUCK_SECONDS, self._until)
        while not self._may_send(stream, size):
            answer = self.answers.get(stream)
            if self.closed or time.monotonic() > give_up or (answer and (answer.heads or answer.over)):
                return False
            self._read_for(0.002)
        return True

    def _read_for(self, seconds: float) -> None:
        """Read what is there, and what comes meanwhile."""
        until = time.monotonic() + seconds
        while not self.closed and time.monotonic() < self._until + self._abuse.hold:
            try:
                self.read(max(0.0005, until - time.monotonic()))
            except TimeoutError:
                return

    def _note(self, got: Frame) -> Frame:
        got = super()._note(got)
        if got.kind == WINDOW_UPDATE:
            self._windows[got.stream] += int.from_bytes(got.payload, "big")
        elif got.kind == DATA:
            self.answers[got.stream].body.clear()
            if self._abuse.reads and got.payload:
                self.send(window(0, len(got.payload)) + window(got.stream, len(got.payload)))
        return got


def play(port: int, *script: Abuse) -> None:
    """All at the same time, and to their ends."""

    def run(abuse: Abuse) -> None:
        with suppress(OSError), Abuser(port, abuse) as abuser:  # it is cut, mostly
            abuser.play()

    threads = [threading.Thread(target=run, args=(abuse,)) for abuse in script for _ in range(abuse.connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# Those beside it

CONFIG = """
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
telemetry: {{access_log: {{destination: none}}}}
server: {{control: none, reflection: true, max_collected_bytes: 128MiB}}
upstreams: {{main: {{endpoints: ["127.0.0.1:{port}"], probe_interval: 500ms}}}}
direct: {{models: all}}
models:
"""
for _name in PUBLIC_MODELS:
    CONFIG += f"  p-{_name}: {{{{variants: {{{{only: {{{{upstream: main, model: {_name}}}}}}}}}}}}}\n"
    CONFIG += f"  m-{_name}: {{{{variants: {{{{only: {{{{upstream: main, model: {_name}}}}}}}}}, merge: {{{{}}}}}}}}\n"

MOST_MEMORY = 384 * MiB  # that a script may add for a while
MOST_WORK = 3.0  # seconds of the event loop's CPU while a neighbour's call waits
AFTER_DEATH = 5.0  # seconds until a gateway has seen that a Triton is there again


@dataclass
class Neighbourhood:
    """A gateway, and callers of it that must not notice what others do."""

    served: Served
    callers: subprocess.Popen[str]
    outages: Callable[[], list[tuple[float, float]]] = list
    """When Triton was dead: 2.51 dies of cancelled calls now and then, however they reach it."""

    def play(self, *script: Abuse) -> None:
        """:raises AssertionError: if anybody noticed."""
        self._calm_down()
        before = self._forget_peak()
        play(self.served.port, *script)
        told = self._all_answered()
        assert self.served.alive
        assert not told["faults"], self._told(told["faults"])
        assert told["longest"] < MOST_WORK, f"a call waited for {told['longest']:.1f} s of work"
        grown = self._peak() - before
        assert grown < MOST_MEMORY, f"{grown / MiB:.0f} MiB more"

    def _ask(self) -> dict[str, Any]:
        assert self.callers.stdin is not None
        assert self.callers.stdout is not None
        self.callers.stdin.write("\n")
        self.callers.stdin.flush()
        told: dict[str, Any] = json.loads(self.callers.stdout.readline())
        if told["faults"]:
            time.sleep(1.0)  # until a death of Triton's has been seen
        outages = self.outages()
        told["faults"] = [
            fault
            for fault in told["faults"]
            if fault["wrong"] or not any(start - 1 <= fault["at"] <= end + AFTER_DEATH for start, end in outages)
        ]
        return told

    def _calm_down(self) -> None:
        """What went before has its own test."""
        for _ in range(60):
            calls = self._ask()["calls"]
            time.sleep(0.5)
            told = self._ask()
            if not told["faults"] and told["calls"] != calls:
                return
        raise AssertionError(f"no calm for 30 s: {self._told(told['faults'])}")

    def _all_answered(self) -> dict[str, Any]:
        """Ask until each caller has made a call that began after this; give what was wrong meanwhile."""
        told = self._ask()
        calls = told["calls"]
        until = time.monotonic() + 90
        while not told["faults"]:
            time.sleep(0.1)
            more = self._ask()
            told["faults"] += more["faults"]
            told["longest"] = max(told["longest"], more["longest"])
            late = [name for name, number in calls.items() if more["calls"][name] < number + 2]
            if not late:
                break
            assert time.monotonic() < until, f"no answer to: {late}"
        return told

    def _told(self, faults: list[dict[str, Any]]) -> str:
        whose = sorted({fault["who"] for fault in faults})
        what = "; ".join(str(fault["what"]) for fault in faults[:4])
        return f"{len(faults)} calls, of {whose}: {what}\n{self.served.last_said}"

    def _forget_peak(self) -> int:
        """Bytes that the gateway has; from here its peak is counted anew."""
        Path(f"/proc/{self.served.process.pid}/clear_refs").write_text("5")
        return self.served.memory

    def _peak(self) -> int:
        status = Path(f"/proc/{self.served.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@contextmanager
def neighbourhood(triton: int, outages: Callable[[], list[tuple[float, float]]]) -> Iterator[Neighbourhood]:
    """In front of a Triton's port."""
    with ExitStack() as exits:
        served = exits.enter_context(gateway(triton, given=CONFIG))
        program = [sys.executable, str(Path(__file__).with_name("neighbours.py"))]
        arguments = [str(served.port), str(served.process.pid)]
        callers = exits.enter_context(
            subprocess.Popen([*program, *arguments], stdin=-1, stdout=-1, text=True, cwd=ROOT)
        )
        exits.callback(callers.kill)
        yield Neighbourhood(served, callers, outages)
