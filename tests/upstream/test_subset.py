"""Subsets of a large fleet: each gateway chooses alone, all together use all endpoints alike, and little ever moves."""

from __future__ import annotations

from collections import Counter

import pytest

from gateway.upstream.subset import place_of, subset_of, van_der_corput

ENDPOINTS = [f"10.0.{number // 256}.{number % 256}:8001" for number in range(1000)]


def places(kind: str, gateways: int) -> list[float]:
    names = {"ordinals": "gateway-{}", "names by chance": "gateway-{}-x"}
    return [place_of(names[kind].format(number), 0, 1) for number in range(gateways)]


def shares(endpoints: list[str], gateways: list[float], size: int) -> list[int]:
    """By how many gateways each endpoint is used."""
    used = Counter(endpoint for place in gateways for endpoint in subset_of(endpoints, size, place))
    return [used[endpoint] for endpoint in endpoints]


@pytest.mark.parametrize("gateways", [3, 20, 64, 100])
@pytest.mark.parametrize("size", [10, 50])
def test_gateways_with_ordinals_use_all_endpoints_alike(gateways: int, size: int) -> None:
    used = shares(ENDPOINTS, places("ordinals", gateways), size)
    mean = gateways * size / len(ENDPOINTS)
    assert sum(used) == gateways * size
    assert max(used) <= mean + 2
    assert min(used) >= mean - 2


def test_gateways_with_other_names_are_as_even_as_chance_is() -> None:
    used = shares(ENDPOINTS, places("names by chance", 100), 100)
    assert min(used) >= 1
    assert max(used) <= 25  # 10 on average, with a deviation of 3.2


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999999])
def test_one_endpoint_more_or_less_changes_one_of_a_subset(place: float) -> None:
    before = set(subset_of(ENDPOINTS, 20, place))
    for index in range(0, len(ENDPOINTS), 7):
        after = set(subset_of(ENDPOINTS[:index] + ENDPOINTS[index + 1 :], 20, place))
        assert len(before - after) <= 1
    assert len(before - set(subset_of([*ENDPOINTS, "new:1"], 20, place))) <= 1


def test_a_subset_does_not_depend_on_the_order_of_endpoints() -> None:
    assert set(subset_of(ENDPOINTS[::-1], 20, 0.5)) == set(subset_of(ENDPOINTS, 20, 0.5))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_subset_of_few_endpoints_is_all_of_them_in_their_order(count: int) -> None:
    assert subset_of(("c", "a", "b")[:count], 3, 0.7) == ("c", "a", "b")[:count]


def test_workers_of_one_pod_and_pods_of_any_name_have_places_of_their_own() -> None:
    hosts = ("gateway-0", "gateway-1", "gateway-7d9f8b5c-x2x4z", "laptop", "")
    found = [place_of(host, worker, 2) for host in hosts for worker in (0, 1)]
    assert len(set(found)) == len(found)
    assert all(0 <= place < 1 for place in found)


def test_each_number_falls_into_the_widest_gap() -> None:
    assert [van_der_corput(number) for number in range(8)] == [0, 0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]
