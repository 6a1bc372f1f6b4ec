"""Which names are models where callers may use any: what Triton has answered for, and what it lists."""

from __future__ import annotations

from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.found_models import KEPT_SECONDS, FoundModels
from gateway.forwarding.model_index import states_of
from gateway.forwarding.topology import Topology
from gateway.routing import Direct, Route, Routes, Split
from gateway.types import Variant


def test_found_models_are_so_many_and_stay_when_they_are_gone() -> None:
    found = FoundModels(most=3)
    found.answered("a")
    found.listed({"b": ("READY", ""), "c": ("UNAVAILABLE", "no weights"), "d": ("READY", "")})
    found.answered("e")
    assert found.states == {
        "a": ("", "is not in Triton's index"),
        "b": ("READY", ""),
        "c": ("UNAVAILABLE", "no weights"),
    }
    found.answered("c")
    assert found.states["c"] == ("UNAVAILABLE", "no weights")  # one version may answer, and the index knows of all


def test_one_that_is_long_gone_gives_its_place_to_another_that_needs_it() -> None:
    now = [0.0]
    found = FoundModels(most=2, clock=lambda: now[0])
    found.listed({"a": ("READY", ""), "b": ("READY", "")})
    now[0] = 100.0
    found.listed({"b": ("READY", "")})
    now[0] += KEPT_SECONDS - 1
    found.answered("c")
    assert found.states.keys() == {"a", "b"}  # what was counted of it was read a moment ago, perhaps
    now[0] += 1
    found.answered("c")
    assert (found.states.keys(), list(found.forgotten)) == ({"b", "c"}, ["a"])
    found.answered("d")
    assert found.states.keys() == {"b", "c"}  # which are there


def test_one_that_comes_back_keeps_its_place() -> None:
    now = [0.0]
    found = FoundModels(most=2, clock=lambda: now[0])
    found.listed({"a": ("READY", ""), "b": ("READY", "")})
    found.listed({"b": ("READY", "")})
    now[0] = 2 * KEPT_SECONDS
    found.listed({"b": ("READY", ""), "a": ("READY", "")})
    found.listed({})
    found.listed({"c": ("READY", "")})
    assert found.states.keys() == {"a", "b"}
    now[0] += KEPT_SECONDS
    found.listed({"c": ("READY", "")})
    assert "c" in found.states
    assert len(found.forgotten) == 1


def test_a_triton_whose_models_come_and_go_never_fills_the_places_for_good() -> None:
    now = [0.0]
    found = FoundModels(most=10, clock=lambda: now[0])
    for day in range(200):
        now[0] = day * 86400.0
        found.listed({f"m{day}-{number}": ("READY", "") for number in range(5)})
        assert found.states.keys() >= {f"m{day}-{number}" for number in range(5)}
    assert len(found.states) == 10
    assert len(found._gone) == 5


def test_a_model_is_ready_if_a_version_is_at_some_endpoint_and_names_of_the_config_are_left_out() -> None:
    def entry(name: str, state: str, version: str = "1", reason: str = "") -> pb.RepositoryIndexResponse.ModelIndex:
        return pb.RepositoryIndexResponse.ModelIndex(name=name, version=version, state=state, reason=reason)

    route = Route("public", (Variant("v", "u", "behind"),), Split.all_to("v"))
    topology = Topology(Routes([route], direct=Direct.ALL, default_upstream="u"), {})
    one = [entry("both", "UNAVAILABLE", reason="bad"), entry("both", "READY", "2"), entry("asleep", "")]
    other = [entry("both", "UNAVAILABLE", reason="bad"), entry("public", "READY"), entry("behind", "READY")]
    assert states_of([*one, *other], topology) == {"both": ("READY", ""), "asleep": ("", "")}
