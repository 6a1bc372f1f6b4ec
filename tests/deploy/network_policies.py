"""Which connections the NetworkPolicies among some objects allow, by the rules of networking.k8s.io/v1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployment_files import Object
from manifests import of_kind, resolved, selects

OURS = "inference"
"""Stands for the namespace of the policies."""


@dataclass(frozen=True)
class Peer:
    """One end of a connection: a pod, or an address outside (`namespace` None). The node's own are not looked at."""

    namespace: str | None
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    template: Mapping[str, Any] | None = None
    """What says the names of its ports."""

    @classmethod
    def of(cls, template: Mapping[str, Any]) -> Peer:
        """A pod of ours."""
        return cls(OURS, template["metadata"]["labels"], template=template)

    @classmethod
    def elsewhere(cls, namespace: str, *, labels: Mapping[str, str] | None = None, **namespace_labels: str) -> Peer:
        """A pod of another namespace, which Kubernetes labels with its name."""
        more = {key.replace("_", "-"): value for key, value in namespace_labels.items()}
        return cls(namespace, labels or {}, {"kubernetes.io/metadata.name": namespace, **more})


OUTSIDE = Peer(None)


def allowed(objects: Sequence[Object], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """May `source` open a connection to `target`? Both ends have a say, and those that no policy selects say yes."""
    return _says_yes(objects, "Egress", source, target, target, port, protocol) and _says_yes(
        objects, "Ingress", target, source, target, port, protocol
    )


def _says_yes(
    objects: Sequence[Object], direction: str, mine: Peer, other: Peer, target: Peer, port: int, protocol: str
) -> bool:
    policies = [
        policy["spec"]
        for policy in of_kind(objects, "NetworkPolicy")
        if mine.namespace == OURS
        and direction in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], mine.labels)
    ]
    side = "to" if direction == "Egress" else "from"
    rules = [rule for policy in policies for rule in policy.get(direction.lower(), ())]
    return not policies or any(
        (side not in rule or any(_is(peer, other) for peer in rule[side]))
        and ("ports" not in rule or any(_covers(each, target, port, protocol) for each in rule["ports"]))
        for rule in rules
    )


def _is(peer: Mapping[str, Any], other: Peer) -> bool:
    """Is it one of those that a rule names? A podSelector alone is about the policy's own namespace."""
    assert peer.keys() <= {"podSelector", "namespaceSelector"}, "no policy here names addresses"
    if other.namespace is None:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": other.namespace, **other.namespace_labels}
        if not selects(peer["namespaceSelector"], labels):
            return False
    elif other.namespace != OURS:
        return False
    return selects(peer.get("podSelector", {}), other.labels)


def _covers(rule: Mapping[str, Any], target: Peer, port: int, protocol: str) -> bool:
    named = rule.get("port", port)
    if isinstance(named, str):
        named = resolved(named, target.template) if target.template else None
    return bool(rule.get("protocol", "TCP") == protocol and named == port)
