"""Numbers that are counted cheaply reach Prometheus as if they had been counted there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from gateway.telemetry.tally import Count, Times

BUCKETS = (0.001, 0.01, 0.1, 1.0)


def shown(registry: CollectorRegistry) -> list[str]:
    """What a scrape has, without the instants at which series were made."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@given(st.lists(st.lists(st.sampled_from([0.0, 0.001, 0.0011, 0.01, 0.5, 1.0, 2.0, 1e9]))))
def test_times_are_those_that_the_library_would_have_after_each_flush(rounds: list[list[float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    times = Times(Histogram("t", "t", registry=ours, buckets=BUCKETS))
    judge = Histogram("t", "t", registry=theirs, buckets=BUCKETS)
    for observed in rounds:
        for seconds in observed:
            times.observe(seconds)
            judge.observe(seconds)
        times.flush()
        ours_now, theirs_now = shown(ours), shown(theirs)
        assert [line for line in ours_now if "_sum" not in line] == [line for line in theirs_now if "_sum" not in line]


def test_a_sum_of_times_is_theirs() -> None:
    registry = CollectorRegistry()
    times = Times(Histogram("t", "t", registry=registry, buckets=BUCKETS))
    for seconds in (0.25, 0.5, 0.25):
        times.observe(seconds)
    times.flush()
    times.flush()
    assert registry.get_sample_value("t_sum") == 1.0


def test_a_count_reaches_the_library_once_however_often_it_is_flushed() -> None:
    registry = CollectorRegistry()
    count = Count(Counter("c", "c", registry=registry))
    for total in (0, 3, 3, 10):
        count.total = total
        count.flush()
        assert registry.get_sample_value("c_total") == total
