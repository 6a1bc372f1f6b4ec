"""Steps run on their own few threads; what does not fit is refused at once; nothing leaks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from gateway.errors import BadInput, Overloaded
from gateway.forwarding.threads import Threads
from gateway.steps import Work


class Gate:
    """Tasks that hold a thread until the gate opens."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._begun = threading.Semaphore(0)
        self._lock = threading.Lock()
        self.began = 0

    def task(self) -> None:
        with self._lock:
            self.began += 1
        self._begun.release()
        assert self._open.wait(10)

    def open(self) -> None:
        self._open.set()

    async def wait_begun(self, count: int) -> None:
        for _ in range(count):
            assert await asyncio.to_thread(self._begun.acquire, timeout=10)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@contextlib.asynccontextmanager
async def threads_of(gate: Gate, threads: int, queue: int) -> AsyncIterator[Threads]:
    async with Threads(threads, queue) as running:
        try:
            yield running
        finally:
            gate.open()


def work(*tasks: Callable[[], None], made: Any = None) -> Work:
    return Work(tasks, lambda: {"made": made})


def begin(threads: Threads, *tasks: Callable[[], None]) -> asyncio.Task[Any]:
    return asyncio.ensure_future(threads.run(work(*tasks)))


async def test_a_step_runs_on_another_thread_and_answers_what_it_made() -> None:
    ran: list[str] = []
    async with Threads(1, 0) as threads:
        made = await threads.run(work(lambda: ran.append(threading.current_thread().name), made=np.zeros(1)))
    assert ran[0].startswith("step")
    assert list(made) == ["made"]


async def test_the_event_loop_goes_on_while_steps_run(gate: Gate) -> None:
    async with threads_of(gate, 1, 1) as threads:
        running = begin(threads, gate.task)
        await gate.wait_begun(1)  # which needs the loop
        gate.open()
        await running


@pytest.mark.parametrize(("threads", "queue"), [(1, 0), (1, 2), (2, 0), (2, 3)])
async def test_as_many_steps_as_threads_and_queue_are_taken_and_one_more_is_refused(
    gate: Gate, threads: int, queue: int
) -> None:
    async with threads_of(gate, threads, queue) as pool:
        taken = [begin(pool, gate.task) for _ in range(threads + queue)]
        await gate.wait_begun(threads)
        with pytest.raises(Overloaded, match=rf"pipelines\.threads is {threads} and pipelines\.queue {queue}"):
            await pool.run(work(gate.task))
        gate.open()
        await asyncio.gather(*taken)
        await pool.run(work(gate.task))
    assert gate.began == threads + queue + 1


async def test_callers_take_turns_and_one_who_fills_the_queue_makes_room_for_others(gate: Gate) -> None:
    ran: list[str] = []
    async with threads_of(gate, 1, 3) as pool:

        def ask(turn: str, *tasks: Callable[[], None]) -> asyncio.Task[Any]:
            done = (lambda: ran.append(turn),)
            return asyncio.ensure_future(pool.run(work(*(tasks or done)), turn=turn))

        first = ask("hog", gate.task)
        await gate.wait_begun(1)
        many = [ask("hog") for _ in range(3)]
        await asyncio.sleep(0)
        one, too_many = ask("one"), ask("hog")
        with pytest.raises(Overloaded):
            await too_many
        with pytest.raises(Overloaded):
            await many[2]
        assert sum(step.waiting for step in pool.usage()) == 3
        gate.open()
        await asyncio.gather(first, *many[:2], one)
    assert ran == ["hog", "one", "hog"]


async def test_a_step_that_has_begun_makes_room_for_nobody(gate: Gate) -> None:
    async with threads_of(gate, 1, 1) as pool:
        both = [asyncio.ensure_future(pool.run(work(gate.task, gate.task), turn="hog")) for _ in range(2)]
        await gate.wait_begun(1)
        with pytest.raises(Overloaded):
            await pool.run(work(gate.task), turn="one")  # the hog has one step that waits, and no more
        gate.open()
        await asyncio.gather(*both)


async def test_a_batch_counts_as_one_step_however_many_tasks_it_has(gate: Gate) -> None:
    async with threads_of(gate, 2, 0) as threads:
        batches = [begin(threads, gate.task, gate.task) for _ in range(2)]
        await gate.wait_begun(2)
        assert gate.began == 2
        gate.open()
        await asyncio.gather(*batches)


async def test_the_first_error_ends_a_step_and_leaves_room_for_the_next() -> None:
    def fail() -> None:
        raise BadInput("input 'image', row 1: empty")

    async with Threads(2, 0) as threads:
        for _ in range(5):
            with pytest.raises(BadInput, match="row 1: empty"):
                await threads.run(work(fail, fail, fail))
        await threads.run(work(lambda: None))


async def test_a_cancelled_step_keeps_its_thread_until_that_is_done(gate: Gate) -> None:
    """Else callers who come and go would pile up work behind threads that are still busy."""
    async with threads_of(gate, 1, 1) as threads:
        cancelled = begin(threads, gate.task)
        await gate.wait_begun(1)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        ran: list[bool] = []
        waiting = begin(threads, lambda: ran.append(True))
        await asyncio.sleep(0.02)
        assert not ran
        gate.open()
        await waiting
        assert ran


async def test_a_step_that_is_cancelled_while_it_waits_never_runs_and_holds_nothing(gate: Gate) -> None:
    class Tensor:
        """Stands for a large picture."""

        def task(self) -> None:
            ran.append(True)

    ran: list[bool] = []
    async with threads_of(gate, 1, 1) as threads:
        running = begin(threads, gate.task)
        await gate.wait_begun(1)
        tensor = Tensor()
        gone = weakref.ref(tensor)
        waiting = begin(threads, tensor.task)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        del tensor, waiting
        await asyncio.sleep(0)  # what the loop has still to call for them
        gc.collect()
        assert gone() is None
        gate.open()
        await running
    assert not ran


async def test_an_error_after_its_caller_has_gone_is_nobodys(gate: Gate) -> None:
    """It must not be logged as an exception that was never retrieved, nor keep its thread taken."""

    def fail_late() -> None:
        gate.task()
        raise BadInput("too late")

    unhandled: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    try:
        async with threads_of(gate, 1, 0) as threads:
            cancelled = begin(threads, fail_late)
            await gate.wait_begun(1)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            gate.open()
            await threads.run(work(lambda: None))
            del cancelled
            gc.collect()
    finally:
        asyncio.get_running_loop().set_exception_handler(None)
    assert not unhandled
