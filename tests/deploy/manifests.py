"""Looking around in built Kubernetes objects: pods, what selects them, what is mounted in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from deployment_files import Object

POD_OWNERS = ("Deployment", "StatefulSet", "DaemonSet", "Job")


def name_of(thing: Object) -> str:
    return f"{thing['kind']}/{thing['metadata']['name']}"


def of_kind(objects: Iterable[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def only(objects: Iterable[Object], kind: str, name: str) -> Object:
    (found,) = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def pods(objects: Iterable[Object]) -> list[tuple[Object, Mapping[str, Any]]]:
    """Each object that makes pods, with its pod template."""
    return [(each, each["spec"]["template"]) for each in of_kind(objects, *POD_OWNERS)]


def containers(template: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Does a selector (`matchLabels` and `matchExpressions`, or a Service's plain labels) match?"""
    if not selector.keys() <= {"matchLabels", "matchExpressions"}:
        selector = {"matchLabels": selector}
    operators = {
        "In": lambda value, values: value in values,
        "NotIn": lambda value, values: value not in values,
        "Exists": lambda value, values: value is not None,
    }
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        operators[e["operator"]](labels.get(e["key"]), e.get("values", ()))
        for e in selector.get("matchExpressions", ())
    )


def selected(selector: Mapping[str, Any], objects: Iterable[Object]) -> list[Mapping[str, Any]]:
    """The pod templates that a selector matches."""
    return [template for _, template in pods(objects) if selects(selector, template["metadata"]["labels"])]


def port_names(template: Mapping[str, Any]) -> dict[str, int]:
    return {p["name"]: p["containerPort"] for each in containers(template) for p in each.get("ports", ())}


def resolved(port: str | int, template: Mapping[str, Any]) -> int | None:
    """The number of a port by name or number; None if the pod has no such name."""
    return port if isinstance(port, int) else port_names(template).get(port)


def walk(value: Any) -> Iterator[Any]:
    """Every value in a document."""
    yield value
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for child in children:
        yield from walk(child)
