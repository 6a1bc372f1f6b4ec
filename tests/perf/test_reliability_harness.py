"""What the comparison under faults reckons with: Envoy's config, shares, quantiles, the table."""

from __future__ import annotations

import grpc
import pytest

from perf.reliability import GATEWAY, OK, PEER, Ended, Load, envoy_config, table

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def test_envoy_gets_its_ports_and_sheds_only_where_there_is_overload() -> None:
    for overload in (False, True):
        config = envoy_config(1, [2, 3], overload=overload)["static_resources"]
        (listener,), (cluster,) = config["listeners"], config["clusters"]
        assert listener["address"]["socket_address"]["port_value"] == 1
        endpoints = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        assert [each["endpoint"]["address"]["socket_address"]["port_value"] for each in endpoints] == [2, 3]
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        assert len(manager["http_filters"]) == (3 if overload else 1)
        retries = manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]["retry_policy"]
        assert ("per_try_timeout" in retries, "unavailable" in retries["retry_on"]) == (not overload, not overload)


def test_shares_and_quantiles_are_of_the_calls_that_are_meant() -> None:
    load = Load([], 1.0)
    load.calls = [Ended(n / 10, n / 1000, OK if n % 4 else UNAVAILABLE, "a") for n in range(100)]
    assert load.failed() == pytest.approx(25.0)
    assert load.failed(0.1, 0.4) == 0.0
    assert load.quantile(0.5) == pytest.approx(50, abs=2)
    assert load.quantile(1.0, ok=False, since=5.0) == 96.0
    assert load.quantile(0.5, since=99.0) == 0.0


def test_the_table_has_medians_with_their_extremes_and_both_systems() -> None:
    found = {("hangs", "failed, %", GATEWAY): [0.0, 2.0, 1.0], ("hangs", "failed, %", PEER): [3.0]}
    assert table(found)[2:] == ["| one of two hangs at inference, but is live | failed, % | 1 (0–2) | 3 |"]
