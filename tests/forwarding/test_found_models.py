"""Which names are models where callers may use any: what Triton has answered for, and what it lists."""

from __future__ import annotations

from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.found_models import FoundModels
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


def test_a_model_is_ready_if_a_version_is_at_some_endpoint_and_names_of_the_config_are_left_out() -> None:
    def entry(name: str, state: str, version: str = "1", reason: str = "") -> pb.RepositoryIndexResponse.ModelIndex:
        return pb.RepositoryIndexResponse.ModelIndex(name=name, version=version, state=state, reason=reason)

    route = Route("public", (Variant("v", "u", "behind"),), Split.all_to("v"))
    topology = Topology(Routes([route], direct=Direct.ALL, default_upstream="u"), {})
    one = [entry("both", "UNAVAILABLE", reason="bad"), entry("both", "READY", "2"), entry("asleep", "")]
    other = [entry("both", "UNAVAILABLE", reason="bad"), entry("public", "READY"), entry("behind", "READY")]
    assert states_of([*one, *other], topology) == {"both": ("READY", ""), "asleep": ("", "")}
