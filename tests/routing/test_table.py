"""Which names can be called, and which routes are refused."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest

from gateway.routing import Condition, Direct, Exact, Key, Route, Routes, Rule, Split, plan
from gateway.routing.table import MAX_NAME
from gateway.types import Facts, Variant

GPU = Variant("gpu", "gpus", "net_trt", "3")
CPU = Variant("cpu", "cpus", "net_onnx")
NET = Route("net", (GPU, CPU), Split((("gpu", 1), ("cpu", 1))), attempts=5)
TESTER = Rule("tester", (Condition(Key("parameter", "tier"), Exact("gold")),), "cpu")


def targets(routes: Routes, model: str, version: str = "") -> list[Variant] | None:
    route = routes.lookup(model)
    if route is None:
        return None
    made = plan(route, Facts(version=version), draw=0.0, available=lambda _: True)
    assert made.reason == "direct" or model in routes.public
    return list(made.targets)


@pytest.mark.parametrize(
    ("direct", "public", "own", "other"),
    [
        pytest.param(Direct.ALL, True, True, True, id="all"),
        pytest.param(Direct.VARIANTS, True, True, False, id="variants"),
        pytest.param(Direct.NONE, True, False, False, id="none"),
    ],
)
def test_direct_says_which_triton_models_can_be_called(direct: Direct, public: bool, own: bool, other: bool) -> None:
    routes = Routes([NET], direct=direct, default_upstream="cpus")

    found = [routes.lookup(model) is not None for model in ("net", "net_trt", "other")]

    assert found == [public, own, other]


def test_a_variants_own_name_means_its_model_on_its_upstream_in_any_version() -> None:
    routes = Routes([NET])

    assert targets(routes, "net_trt") == [Variant("net_trt", "gpus", "net_trt")]
    assert targets(routes, "net_trt", version="1") == [Variant("net_trt", "gpus", "net_trt")]
    assert (route := routes.lookup("net_trt")) is not None
    assert route.attempts == 5


def test_a_model_on_several_upstreams_is_tried_on_each() -> None:
    elsewhere = Route("net2", (Variant("spare", "spares", "net_onnx"), CPU), Split.all_to("spare"))
    routes = Routes([NET, elsewhere])

    assert targets(routes, "net_onnx") == [
        Variant("net_onnx@cpus", "cpus", "net_onnx"),
        Variant("net_onnx@spares", "spares", "net_onnx"),
    ]


@pytest.mark.parametrize("attempts", [(1, 4), (4, 1)])
def test_a_models_own_name_gets_the_most_attempts_of_the_public_models_that_call_it(attempts: tuple[int, int]) -> None:
    routes = [replace(NET, model=f"net{number}", attempts=each) for number, each in enumerate(attempts)]
    route = Routes(routes).lookup("net_onnx")

    assert route is not None
    assert route.attempts == 4


def test_other_names_go_to_the_default_upstream_if_all_may_be_called() -> None:
    routes = Routes(direct=Direct.ALL, default_upstream="triton")

    assert targets(routes, "anything") == [Variant("anything", "triton", "anything")]
    assert targets(routes, "anything", version="7") == [Variant("anything", "triton", "anything")]


@pytest.mark.parametrize(("length", "found"), [(0, False), (1, True), (MAX_NAME, True), (MAX_NAME + 1, False)])
def test_a_name_that_no_model_can_have_is_unknown(length: int, found: bool) -> None:
    routes = Routes(direct=Direct.ALL, default_upstream="triton")

    assert (routes.lookup("m" * length) is not None) is found


def test_a_public_name_hides_a_triton_model_of_that_name() -> None:
    routes = Routes([replace(NET, model="net_onnx")], direct=Direct.ALL, default_upstream="cpus")

    assert targets(routes, "net_onnx") == [GPU, CPU]


def test_only_names_from_the_config_are_known() -> None:
    routes = Routes([NET], direct=Direct.ALL, default_upstream="cpus")

    assert [routes.is_known(model) for model in ("net", "net_trt", "invented")] == [True, True, False]


def test_names_are_the_public_ones_first_and_then_the_variants_own() -> None:
    assert Routes([NET]).names == ["net", "net_trt", "net_onnx"]
    assert Routes([NET], direct=Direct.NONE).names == ["net"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param({"variants": ()}, "needs a variant", id="no_variants"),
        pytest.param({"variants": (GPU, replace(CPU, name="gpu"))}, "two variants of one name", id="same_name"),
        pytest.param({"split": Split((("gpu", 1), ("tpu", 1)))}, "no variant 'tpu'", id="split"),
        pytest.param({"rules": (replace(TESTER, variant="tpu"),)}, "no variant 'tpu'", id="rule"),
        pytest.param({"rules": (TESTER, TESTER)}, "two rules of one name", id="rules_of_one_name"),
        pytest.param({"fallback": ("cpu", "tpu")}, "no variant 'tpu'", id="fallback"),
        pytest.param({"attempts": 0}, "at least 1 attempt", id="no_attempts"),
    ],
)
def test_a_route_that_contradicts_itself_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(NET, **change)


def test_two_routes_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="one name"):
        Routes([NET, NET])


def test_calling_all_models_needs_a_default_upstream() -> None:
    with pytest.raises(ValueError, match="default upstream"):
        Routes([NET], direct=Direct.ALL)


def test_a_replaced_table_goes_without_a_collection_of_garbage() -> None:
    """One of thousands of models is a quarter of a million objects, which a collection stops all calls to look at."""

    def tables() -> int:
        return sum(isinstance(each, Routes) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = tables()
        table = Routes(direct=Direct.ALL, default_upstream="cpu")
        assert table.lookup("anything") is not None
        assert tables() == before + 1
        del table
        assert tables() == before
    finally:
        gc.enable()
