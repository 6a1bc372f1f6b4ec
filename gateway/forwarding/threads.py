"""I/O: threads for the local steps of pipelines. A step that never ends holds its thread, and nothing else.

- Each pipeline has a queue of its own. A pipeline that has no thread gets one even when all are taken, so that the
  steps of one pipeline never hold up those of another.
- In a queue callers take turns. If it is full, the caller who has the most steps there makes room for another one, so
  that no caller holds up others.
- A call waits for a thread until its deadline at most. The end of the process waits for no thread: they are daemons,
  which the interpreter leaves behind. (`concurrent.futures` joins its threads at exit.)
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from gateway.deadline import Deadline
from gateway.errors import DeadlineExceeded, GatewayError, Overloaded
from gateway.forwarding.room import Room
from gateway.hooks import StepNow
from gateway.steps import StepFailed, Work

_log = logging.getLogger(__name__)

T = TypeVar("T")

_AHEAD_SECONDS = 0.002
"""How long before its deadline a call that waits for a step ends, so that its error can name the step."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The step that a task belongs to. Both names are from the config."""

    pipeline: str = ""
    step: str = ""


NOBODY = Owner()


@dataclass(slots=True, eq=False)
class _Task:
    """A piece of work for one thread."""

    act: Callable[[], None]
    batch: _Batch
    since: float = 0.0  # when it began to run


@dataclass(slots=True, eq=False)
class _Batch:
    """The tasks of one step of one request. `over` gets the first error, or None once all tasks are done."""

    owner: Owner
    turn: Hashable  # equal for requests that share their turns
    left: int
    over: asyncio.Future[GatewayError | Exception | None]
    has_begun: bool = False

    def end(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(error)


class Threads:
    """Runs local steps off the event loop, on a few threads with a bounded queue for each pipeline."""

    def __init__(self, threads: int, queue_size: int) -> None:
        """
        threads:     how many tasks run at once; a pipeline without a thread may exceed that by one.
        queue_size:  how many steps of one pipeline may wait, beyond as many as there are threads.
        """
        self.threads = threads
        self._queue_size = queue_size
        self._under_way: dict[str, int] = {}  # steps by pipeline
        # Tasks that wait, by pipeline and turn; of both, what was served last comes last. They are not in the queue of
        # the threads, so that a task whose caller has gone is dropped at once, with its tensors.
        self._waiting: dict[str, dict[Hashable, dict[_Task, None]]] = {}
        self._running: dict[_Task, None] = {}
        self._handed: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._idle = 0  # threads without a task
        self._is_closed = False
        self.room = Room()  # memory that the requests of pipelines hold
        self.left_behind = False  # did a step still run at the exit?

    async def __aenter__(self) -> Threads:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop, without waiting for threads that run a step."""
        self._is_closed = True
        for task in self._all_waiting():
            task.batch.over.cancel()
        self._waiting.clear()
        for _ in range(self._idle):
            self._handed.put(None)
        self.left_behind = bool(self._running)
        for usage in self.usage():
            _log.warning(
                "pipeline '%s': step '%s' has run for %.1f s and is abandoned, since the process ends",
                usage.pipeline,
                usage.step,
                usage.oldest,
            )

    async def run(
        self, work: Work[T], owner: Owner = NOBODY, deadline: Deadline | None = None, turn: Hashable = None
    ) -> T:
        """Run all tasks of a step and return its result; the first error ends the step.

        turn: whose turn the step waits for.
        :raises Overloaded: if the pipeline's queue is full, or was and others had fewer places in it.
        :raises DeadlineExceeded: shortly before the deadline, with the name of the step. A task that has begun can't be
            stopped, so its thread stays taken until the task ends.
        """
        under_way = self._under_way.get(owner.pipeline, 0)
        if under_way >= self.threads + self._queue_size:
            self._free_a_place(owner.pipeline, turn)
        batch = _Batch(owner, turn, len(work.tasks), self._loop.create_future())
        tasks = [_Task(act, batch) for act in work.tasks]
        timer = (
            self._loop.call_later(_time_left(deadline), self._expire, batch, tasks) if deadline is not None else None
        )
        self._under_way[owner.pipeline] = under_way + 1
        try:
            self._waiting.setdefault(owner.pipeline, {}).setdefault(turn, {}).update(dict.fromkeys(tasks))
            self._hand_out()
            error = await batch.over
        finally:
            if timer is not None:
                timer.cancel()
            self._withdraw(batch, tasks)
            self._under_way[owner.pipeline] -= 1
            if not self._under_way[owner.pipeline]:
                del self._under_way[owner.pipeline]
        if error is not None:
            try:
                raise error
            finally:
                del error, batch, tasks  # which would refer to themselves by the traceback, and keep what the step made
        return work.result()

    def usage(self) -> list[StepNow]:
        """The running and waiting tasks of each step. It may be called from any thread."""
        now = time.monotonic()
        found: dict[Owner, tuple[int, int, float]] = {}
        for task in list(self._running):
            running, waiting, oldest = found.get(task.batch.owner, (0, 0, 0.0))
            found[task.batch.owner] = running + 1, waiting, max(oldest, now - task.since)
        for task in self._all_waiting():
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
        """What the threads of a pipeline do, in words."""
        for usage in self.usage():
            if usage.pipeline == pipeline and usage.running:
                yield f"'{usage.step}' has run for {usage.oldest:.1f} s"

    def _all_waiting(self) -> list[_Task]:
        """The tasks that wait. Any thread may ask."""
        callers = [tasks for each in list(self._waiting.values()) for tasks in list(each.values())]
        return [task for tasks in callers for task in list(tasks)]

    def _free_a_place(self, pipeline: str, turn: Hashable) -> None:
        """Refuse the last waiting step of the caller who has the most of them, so that one of another caller may wait.

        :raises Overloaded: if none would then still have as many as the caller who asks.
        """
        error = Overloaded(
            f"the pipeline has {self._under_way[pipeline]} requests whose local steps run or wait, and may have no "
            f"more: pipelines.threads is {self.threads} and pipelines.queue {self._queue_size}"
        )
        waiting = {
            each: list(dict.fromkeys(task.batch for task in tasks if not task.batch.has_begun))
            for each, tasks in self._waiting.get(pipeline, {}).items()
        }
        most = max(waiting.values(), key=len, default=[])
        if len(most) <= len(waiting.get(turn, ())) + 1:
            raise error
        last = most[-1]
        self._withdraw(last, [task for task in self._waiting[pipeline][last.turn] if task.batch is last])
        last.end(error)

    def _withdraw(self, batch: _Batch, tasks: Iterable[_Task]) -> None:
        """Drop those of its tasks that have not begun."""
        callers = self._waiting.get(batch.owner.pipeline, {})
        waiting = callers.get(batch.turn, {})
        for task in tasks:
            waiting.pop(task, None)
        if not waiting:
            callers.pop(batch.turn, None)
        if not callers:
            self._waiting.pop(batch.owner.pipeline, None)

    def _hand_out(self) -> None:
        """Start all tasks that may run now."""
        while (pipeline := self._maybe_next()) is not None:
            callers = self._waiting.pop(pipeline)
            turn = next(iter(callers))
            tasks = callers.pop(turn)
            task = next(iter(tasks))
            del tasks[task]
            if tasks:
                callers[turn] = tasks
            if callers:
                self._waiting[pipeline] = callers
            self._begin(task)

    def _maybe_next(self) -> str | None:
        """The pipeline whose task may run next."""
        if not self._waiting:
            return None
        served = {task.batch.owner.pipeline for task in self._running}
        has_room = len(self._running) < self.threads
        return next((name for name in self._waiting if has_room or name not in served), None)

    def _begin(self, task: _Task) -> None:
        task.since = time.monotonic()
        task.batch.has_begun = True
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
        """The life of one thread."""
        while (task := self._handed.get()) is not None:
            error = _error_of(task.act, task.batch.owner.step)
            try:
                self._loop.call_soon_threadsafe(self._done, task, error)
            except RuntimeError:  # the event loop is closed
                return
            del task, error  # else this thread would keep their tensors while it waits


def _error_of(act: Callable[[], None], step: str) -> Exception | None:
    """Run a task; returns its error as an exception that a coroutine may raise, None if there is none.

    The error refers to this frame, which must not refer to what will have the error: else it stays with all it has.
    """
    try:
        act()
    except Exception as error:
        return error
    except BaseException as thrown:  # such as SystemExit, which must not end this thread
        failed = StepFailed(step, type(thrown).__name__)
        failed.__cause__ = thrown
        return failed
    return None


def _time_left(deadline: Deadline) -> float:
    """Seconds that a call may wait for a step."""
    left = deadline.remaining(time.monotonic())
    return max(0.0, left - min(_AHEAD_SECONDS, left / 10))
