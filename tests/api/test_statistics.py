"""Statistics of several variants and endpoints add up to those of one model."""

from __future__ import annotations

from typing import Any

from tritonclient.grpc import service_pb2 as pb

from gateway.api.catalogue import add_up


def duration(count: int, ns: int) -> Any:
    return pb.StatisticDuration(count=count, ns=ns)


def entry(version: str, last: int, count: int, batches: dict[int, int]) -> Any:
    """One endpoint's: `count` requests of 10 ns each, and so many executions per batch size."""
    return pb.ModelStatistics(
        name="add_one",
        version=version,
        last_inference=last,
        inference_count=count,
        execution_count=sum(batches.values()),
        inference_stats=pb.InferStatistics(success=duration(count, 10 * count), queue=duration(count, count)),
        batch_stats=[
            pb.InferBatchStatistics(batch_size=size, compute_infer=duration(times, 5 * times))
            for size, times in batches.items()
        ],
        response_stats={"0": pb.InferResponseStatistics(success=duration(count, count))},
        memory_usage=[pb.MemoryUsage(type="CPU", byte_size=7)],
    )


def test_counts_and_times_are_summed_and_the_last_inference_is_the_latest() -> None:
    (total,) = add_up("adder", [entry("1", 500, 3, {1: 3}), entry("1", 400, 4, {1: 1, 2: 2})])
    assert (total.name, total.version, total.last_inference) == ("adder", "1", 500)
    assert (total.inference_count, total.execution_count) == (7, 6)
    assert total.inference_stats.success == duration(7, 70)
    assert total.inference_stats.queue == duration(7, 7)
    assert not total.inference_stats.HasField("fail")
    assert {batch.batch_size: batch.compute_infer for batch in total.batch_stats} == {
        1: duration(4, 20),
        2: duration(2, 10),
    }
    assert total.response_stats["0"].success == duration(7, 7)
    assert [usage.byte_size for usage in total.memory_usage] == [7, 7]


def test_versions_stay_apart_and_are_in_order_of_their_numbers() -> None:
    totals = add_up("adder", [entry("10", 1, 1, {}), entry("9", 1, 2, {}), entry("9", 1, 5, {})])
    assert [(total.version, total.inference_count) for total in totals] == [("9", 7), ("10", 1)]


def test_the_entries_that_are_added_up_stay_as_they_are() -> None:
    first = entry("1", 1, 1, {1: 1})
    before = first.SerializeToString(deterministic=True)
    add_up("adder", [first, first])
    assert first.SerializeToString(deterministic=True) == before


def test_nobodys_entries_are_nothing() -> None:
    assert add_up("adder", []) == []
