"""What a caller may not use does not exist in the topology that he sees."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.access.api_keys import ApiKeys
from gateway.access.door import Access, Door, DoorSettings
from gateway.access.policy import Grant, Names, Policy, Scope
from gateway.access.principal import Principal
from gateway.forwarding.topology import CurrentTopology, Topology
from gateway.routing import Direct, Route, Routes, Split
from gateway.types import Variant

DOOR = Door(DoorSettings(Policy((), {}), ApiKeys(())), lambda: 0.0)


def route(name: str, model: str) -> Route:
    return Route(name, (Variant("only", "main", model),), Split.all_to("only"))


def current(direct: Direct = Direct.ALL) -> CurrentTopology:
    pipeline: Any = object()
    routes = Routes([route("a", "ta"), route("b", "tb"), route("c", "pipe")], direct=direct, default_upstream="main")
    return CurrentTopology(Topology(routes, {}, {"pipe": pipeline, "other": pipeline}))


def access(public: list[str], direct: list[str]) -> Access:
    grant = Grant(everybody=True, public=Names.of(public), direct=Names.of(direct))
    return Access(Principal("user"), Scope((grant,)), None, DOOR, b"", (), None)


@pytest.mark.parametrize(
    ("public", "direct", "routes", "pipelines"),
    [
        ([], [], "", ""),
        (["a"], [], "a", ""),
        (["a", "other"], ["tb"], "a tb", "other"),
        (["*"], [], "a b c", "pipe other"),
        ([], ["*"], "ta tb elsewhere", ""),
        (["a*"], ["t*"], "a ta tb", ""),
    ],
)
def test_names_are_there_if_they_are_granted_as_what_they_are(
    public: list[str], direct: list[str], routes: str, pipelines: str
) -> None:
    seen = current().seen_by(access(public, direct))
    names = ("a", "b", "c", "ta", "tb", "pipe", "other", "elsewhere", "../x", "x/y", "/etc", "..", "")
    assert [name for name in names if seen.routes.lookup(name)] == routes.split()
    assert list(seen.pipelines) == pipelines.split()
    assert set(seen.routes.names) <= set(names)


def test_a_view_is_made_once_for_each_scope_and_topology() -> None:
    topology, caller = current(), access(["a"], [])
    seen = topology.seen_by(caller)
    assert topology.seen_by(caller) is seen
    assert topology.seen_by(None) is topology.now
    topology.now = current().now
    assert topology.seen_by(caller) is not seen
    for number in range(600):
        topology.seen_by(access([str(number)], []))
    assert len(topology._seen) <= 256
