"""What a worker follows in the store, with looks that a test makes in place of the thread's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from gateway.experimentation.store_watch import StoreWatch


class Looking:
    """One worker. Any: plans of the kind that its watch follows."""

    watch: StoreWatch[Any, Any]

    def look_at(self, *plans: Any) -> None:
        self.watch._plans = {plan.name: plan for plan in plans}  # as `follow` says, without a thread
        self.watch.look()

    def end(self) -> None:
        store = self.watch._close()
        if store is not None:
            store.close()


Worker = TypeVar("Worker", bound=Looking)


def workers(make: Callable[[str], Worker]) -> Iterator[Callable[[str], Worker]]:
    """For a fixture: makes workers by their names, and ends them after the test."""
    made: list[Worker] = []

    def one(name: str) -> Worker:
        made.append(make(name))
        return made[-1]

    yield one
    for each in made:
        each.end()
