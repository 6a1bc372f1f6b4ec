"""How many calls a Triton has room for, as its ModelConfig says, and how many of them are best.

A Triton that bounds a model's queue begins the next batch when a request is queued while an instance is free; failing
that, half a second later (2.51 and after it: `DynamicBatchScheduler::WaitForPayloadSlotAvailable` is woken by requests,
and not by an instance that becomes free). A request that it refuses wakes nobody. So with a full queue it answers two
batches a second, and each call in its queue needs another one that comes at the right moment. Best is a queue that
holds no more than the next batch. Pure.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class ServerRoom(NamedTuple):
    """Calls of one row at all endpoints of an upstream."""

    best: int  # in flight: as many as keep all instances busy
    most: int  # before it refuses one

    def plus(self, other: ServerRoom) -> ServerRoom:
        return ServerRoom(self.best + other.best, self.most + other.most)

    def shared(self, workers: int) -> ServerRoom:
        """One worker's part: its callers may be all that there are, so it may keep the servers busy alone."""
        most = max(1, self.most // workers)
        return ServerRoom(min(self.best, most), most)


def has_bound(config: Any) -> bool:
    """May a server of this model refuse a call because a queue is full? config: as for `maybe_room`.

    A model without a bound may still say so itself, in the words of a caller.
    """
    if config.WhichOneof("scheduling_choice") == "ensemble_scheduling":
        return True  # one of its models may
    policies = config.dynamic_batching.priority_queue_policy.values()
    return any(policy.max_queue_size for policy in (config.dynamic_batching.default_queue_policy, *policies))


def maybe_room(config: Any) -> ServerRoom | None:
    """Of one endpoint; None if its queue has no bound. config: a `ModelConfig`, as Triton completes it."""
    if config.WhichOneof("scheduling_choice") != "dynamic_batching" or config.model_transaction_policy.decoupled:
        return None
    queued = int(config.dynamic_batching.default_queue_policy.max_queue_size)
    if not queued:
        return None
    rows = max(1, int(config.max_batch_size))
    instances = sum(group.count * max(1, len(group.gpus)) for group in config.instance_group) or 1
    best = instances if rows == 1 else 2 * instances * rows  # one batch is answered while the next one is filled
    most = instances * rows + queued
    return ServerRoom(min(best, max(1, most - 1)), most)
