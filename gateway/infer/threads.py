"""I/O: threads for the pipelines' own steps. A step that never ends holds its thread, and nothing else.

- Each pipeline has a queue of its own. Who has no thread gets one even when all are taken, so that the steps of one
  pipeline never hold up another's.
- Nobody waits for a thread longer than the caller's deadline, nor for one at all when the process stops: they are
  daemons, which the interpreter leaves behind. (`concurrent.futures` joins its threads at exit.)
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gateway.deadline import Deadline
from gateway.errors import DeadlineExceeded, GatewayError, Overloaded
from gateway.hooks import StepNow
from gateway.infer.room import Room
from gateway.stages import Array, StepFailed, Work

_log = logging.getLogger(__name__)

_AHEAD_SECONDS = 0.002
"""How much before its deadline a call ends that waits for a step: whoever ends it otherwise does not know the step."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose step it is. Both names are the config's."""

    pipeline: str = ""
    step: str = ""


NOBODY = Owner()


@dataclass(slots=True, eq=False)
class _Task:
    """What one thread does at a time."""

    act: Callable[[], None]
    batch: _Batch
    since: float = 0.0  # when it began to run


@dataclass(slots=True, eq=False)
class _Batch:
    """The tasks of one step of one request. `over` gets the first error, or None when all are done."""

    owner: Owner
    left: int
    over: asyncio.Future[GatewayError | Exception | None]

    def end(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(error)


class Threads:
    """Runs local steps off the event loop, on a few threads with a bounded queue for each pipeline."""

    def __init__(self, threads: int, queue_size: int) -> None:
        """threads: how many tasks run at once, but for those of pipelines that would have none.
        queue_size: how many steps of one pipeline may be under way beyond as many as threads.
        """
        self.threads = threads
        self._queue_size = queue_size
        self._under_way: dict[str, int] = {}  # steps by pipeline
        # Tasks wait here and not with the threads, so that one whose caller leaves goes at once, with its tensors.
        # The pipeline that was served last comes last.
        self._waiting: dict[str, dict[_Task, None]] = {}
        self._running: dict[_Task, None] = {}
        self._handed: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._idle = 0  # threads
        self._is_closed = False
        self.room = Room()  # for what pipelines' requests hold while their steps run and wait
        self.left_behind = False  # is there a step that still ran when this was left?

    async def __aenter__(self) -> Threads:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Leave threads that are at work behind."""
        self._is_closed = True
        for task in [task for tasks in self._waiting.values() for task in tasks]:
            task.batch.over.cancel()
        self._waiting.clear()
        for _ in range(self._idle):
            self._handed.put(None)
        self.left_behind = bool(self._running)
        for usage in self.usage():
            _log.warning(  # the process ends all the same
                "pipeline '%s': step '%s' still runs, for %.1f s, and is left behind",
                usage.pipeline,
                usage.step,
                usage.oldest,
            )

    async def run(self, work: Work, owner: Owner = NOBODY, deadline: Deadline | None = None) -> dict[str, Array]:
        """Run all tasks of a step; the first error ends it.

        :raises Overloaded: if the pipeline's queue is full.
        :raises DeadlineExceeded: naming the step, shortly before the deadline. A thread that has begun can't be
            stopped: it stays taken, also when nobody waits for it any more.
        """
        under_way = self._under_way.get(owner.pipeline, 0)
        if under_way >= self.threads + self._queue_size:
            raise Overloaded(
                f"{under_way} requests are being prepared or wait for that: pipelines.threads is {self.threads} "
                f"and pipelines.queue {self._queue_size}"
            )
        batch = _Batch(owner, len(work.tasks), self._loop.create_future())
        tasks = [_Task(act, batch) for act in work.tasks]
        timer = self._loop.call_later(_left(deadline), self._expire, batch, tasks) if deadline is not None else None
        self._under_way[owner.pipeline] = under_way + 1
        try:
            self._waiting.setdefault(owner.pipeline, {}).update(dict.fromkeys(tasks))
            self._hand_out()
            error = await batch.over
        finally:
            if timer is not None:
                timer.cancel()
            self._withdraw(owner.pipeline, tasks)
            self._under_way[owner.pipeline] -= 1
            if not self._under_way[owner.pipeline]:
                del self._under_way[owner.pipeline]
        if error is not None:
            raise error
        return work.result()

    def usage(self) -> list[StepNow]:
        """By step. May be asked from any thread."""
        now = time.monotonic()
        found: dict[Owner, tuple[int, int, float]] = {}
        for task in list(self._running):
            running, waiting, oldest = found.get(task.batch.owner, (0, 0, 0.0))
            found[task.batch.owner] = running + 1, waiting, max(oldest, now - task.since)
        for tasks in list(self._waiting.values()):
            for task in list(tasks):
                running, waiting, oldest = found.get(task.batch.owner, (0, 0, 0.0))
                found[task.batch.owner] = running, waiting + 1, oldest
        return [StepNow(owner.pipeline, owner.step, *numbers) for owner, numbers in found.items()]

    def _expire(self, batch: _Batch, tasks: list[_Task]) -> None:
        owner = batch.owner
        if any(task in self._running for task in tasks):
            doing = "was running"
        else:
            doing = "waited for a thread (" + ", ".join(self._busy(owner.pipeline)) + ")"
        batch.end(DeadlineExceeded(f"The deadline passed while the step '{owner.step}' {doing}."))

    def _busy(self, pipeline: str) -> Iterator[str]:
        """What a pipeline's own threads are at."""
        for usage in self.usage():
            if usage.pipeline == pipeline and usage.running:
                yield f"'{usage.step}' has run for {usage.oldest:.1f} s"

    def _withdraw(self, pipeline: str, tasks: list[_Task]) -> None:
        """What has not begun need not be done any more."""
        waiting = self._waiting.get(pipeline, {})
        for task in tasks:
            waiting.pop(task, None)
        if not waiting:
            self._waiting.pop(pipeline, None)

    def _hand_out(self) -> None:
        """Let those run that may."""
        while (pipeline := self._maybe_next()) is not None:
            tasks = self._waiting.pop(pipeline)
            task = next(iter(tasks))
            del tasks[task]
            if tasks:
                self._waiting[pipeline] = tasks
            self._begin(task)

    def _maybe_next(self) -> str | None:
        """The pipeline whose turn it is."""
        if not self._waiting:
            return None
        served = {task.batch.owner.pipeline for task in self._running}
        has_room = len(self._running) < self.threads
        return next((name for name in self._waiting if has_room or name not in served), None)

    def _begin(self, task: _Task) -> None:
        task.since = time.monotonic()
        if self._idle:
            self._idle -= 1
        else:
            try:
                threading.Thread(target=self._work, name="step", daemon=True).start()
            except RuntimeError:  # the process may have no more threads
                task.batch.end(Overloaded("no thread can be started for a pipeline's step"))
                return
        self._running[task] = None
        self._handed.put(task)

    def _done(self, task: _Task, error: Exception | None) -> None:
        del self._running[task]
        batch = task.batch
        batch.left -= 1
        if error is not None or not batch.left:
            batch.end(error)
        self._idle += 1
        self._hand_out()
        if self._is_closed or self._idle > self.threads:
            self._idle -= 1
            self._handed.put(None)

    def _work(self) -> None:
        """One thread's life."""
        while (task := self._handed.get()) is not None:
            error = _error_of(task)
            try:
                self._loop.call_soon_threadsafe(self._done, task, error)
            except RuntimeError:  # the loop has gone, and left this behind
                return
            del task, error  # nothing is kept of them while this waits for the next


def _error_of(task: _Task) -> Exception | None:
    """Run it. Whatever it throws is told by an exception that a coroutine may raise."""
    try:
        task.act()
    except Exception as error:
        return error
    except BaseException as thrown:  # a step's are caught where they are thrown; this thread must live whatever comes
        failed = StepFailed(task.batch.owner.step, type(thrown).__name__)
        failed.__cause__ = thrown
        return failed
    return None


def _left(deadline: Deadline) -> float:
    left = deadline.remaining(time.monotonic())
    return max(0.0, left - min(_AHEAD_SECONDS, left / 10))
