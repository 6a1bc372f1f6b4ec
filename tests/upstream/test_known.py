"""What is remembered of a model ends when Triton's own words show that it was loaded anew."""

from __future__ import annotations

from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb

from gateway.status import Code, Origin, classify
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.known import MOST_KNOWN, KnownModel

UNUSED: Any = None


def statistics(**counts: int) -> pb.ModelStatisticsResponse:
    """By version, `v1=3`."""
    answer = pb.ModelStatisticsResponse()
    for version, count in counts.items():
        answer.model_stats.add(name="m", version=version[1:], inference_count=count, execution_count=count)
    return answer


@pytest.mark.parametrize(
    ("first", "then", "same"),
    [
        ({"v1": 3}, {"v1": 3}, True),
        ({"v1": 3}, {"v1": 9}, True),
        ({"v1": 3}, {"v1": 2}, False),
        ({"v1": 3}, {"v1": 3, "v2": 0}, False),
        ({"v1": 3, "v2": 1}, {"v1": 4}, False),
        ({"v1": 3, "v2": 1}, {"v1": 4, "v2": 0}, False),
    ],
)
def test_counts_only_grow_while_a_model_stays_loaded(first: dict[str, int], then: dict[str, int], same: bool) -> None:
    known = KnownModel("m", "")
    assert known.is_same_count(statistics(**first), known.counts)
    assert known.is_same_count(statistics(**then), known.counts) is same


def test_answers_that_overtake_each_other_show_no_change() -> None:
    known = KnownModel("m", "")
    known.is_same_count(statistics(v1=10), known.counts)
    before = known.counts  # two questions go out now
    assert known.is_same_count(statistics(v1=20), before)
    assert known.is_same_count(statistics(v1=15), before)
    assert not known.is_same_count(statistics(v1=15), known.counts)


def test_a_config_with_its_maps_in_another_order_is_the_same_and_one_with_other_values_is_not() -> None:
    one, other = (model_config_pb2.ModelConfig(name="m", max_batch_size=8) for _ in range(2))
    for key in "abc":
        one.parameters[key].string_value = key
    for key in "cba":
        other.parameters[key].string_value = key
    known = KnownModel("m", "")
    assert known.is_same_config(one)
    assert known.is_same_config(other)
    other.max_batch_size = 0
    assert not known.is_same_config(other)


def test_what_users_keep_ends_with_the_model_and_whoever_must_act_is_told_once() -> None:
    endpoint = Endpoint("u", "t:1", UNUSED)
    told: list[str] = []
    known, other = endpoint.known("m", "1"), endpoint.known("n", "")
    known.kept["mine"] = 1
    known.on_forgotten["mine"] = lambda: told.append("m")
    endpoint.forget("m")
    endpoint.forget("m")
    assert told == ["m"]
    assert not known.is_current
    assert endpoint.known("m", "1").kept == {}
    assert endpoint.known("n", "") is other


def test_all_models_of_an_endpoint_that_can_not_be_reached_are_forgotten() -> None:
    endpoint = Endpoint("u", "t:1", UNUSED)
    known = endpoint.known("m", "")
    endpoint.failed(("m", ""), classify(Code.UNAVAILABLE, "no connection", Origin.CONNECTION), "no connection")
    assert not known.is_current


def test_only_so_many_models_are_remembered() -> None:
    endpoint = Endpoint("u", "t:1", UNUSED)
    first = endpoint.known("m", "0")
    for number in range(1, MOST_KNOWN + 10):
        endpoint.known("m", str(number))
    assert len(endpoint.remembered) == MOST_KNOWN
    assert not first.is_current


def test_a_reload_shows_after_a_single_answer_too() -> None:
    known = KnownModel("m", "")
    known.is_same_count(_statistics(0), {})
    known.answered("1")
    assert not known.is_same_count(_statistics(0), known.counts)  # one was counted, and is no longer


def _statistics(inferences: int) -> pb.ModelStatisticsResponse:
    answer = pb.ModelStatisticsResponse()
    answer.model_stats.add(name="m", version="1", inference_count=inferences, execution_count=inferences)
    return answer
