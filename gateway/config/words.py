"""Config: describes the JSON Schema of the file in words, for findings and for the reference page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Node = Mapping[str, Any]
"""One node of a JSON Schema."""

_KINDS = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "empty"}


def resolve(node: Node, root: Node) -> Node:
    """Follow `$ref`; what stands beside it (a description, a default) is kept."""
    while "$ref" in node:
        beside = {key: value for key, value in node.items() if key != "$ref"}
        node = {**root["$defs"][node["$ref"].rpartition("/")[2]], **beside}
    return node


def alternatives(node: Node, root: Node) -> Iterator[Node]:
    """The node itself, or each thing that it may be, without null."""
    node = resolve(node, root)
    choices = node.get("anyOf") or node.get("oneOf")
    if not choices or "x-kind" in node:
        yield node
        return
    for choice in choices:
        if choice.get("type") != "null":
            yield from alternatives(choice, root)


def at(path: Iterable[str | int], root: Node) -> list[Node]:
    """All nodes that describe the value at `path`; none if there can be no such value."""
    nodes = list(alternatives(root, root))
    for part in path:
        nodes = [deeper for node in nodes for child in _children(node, part) for deeper in alternatives(child, root)]
    return nodes


def _children(node: Node, part: str | int) -> Iterator[Node]:
    if isinstance(part, int):
        if isinstance(node.get("items"), Mapping):
            yield node["items"]
        return
    if part in node.get("properties", {}):
        yield node["properties"][part]
    elif isinstance(node.get("additionalProperties"), Mapping):
        yield node["additionalProperties"]
    else:
        yield from node.get("patternProperties", {}).values()


def keys_at(path: Iterable[str | int], root: Node) -> list[str]:
    """The keys that a mapping at `path` may have; empty if they are free."""
    return list(dict.fromkeys(key for node in at(path, root) for key in node.get("properties", ())))


def kind(node: Node, root: Node) -> str:
    """ "duration", "list of HOST:PORT", "mapping of name to …": the type without its range."""
    return " or ".join(dict.fromkeys(_kind(choice, root) for choice in alternatives(node, root)))


def _kind(node: Node, root: Node) -> str:
    if "x-kind" in node:
        return str(node["x-kind"])
    if "const" in node or "enum" in node:
        return " | ".join(str(value) for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        return f"list of {kind(node['items'], root)}" if isinstance(node.get("items"), Mapping) else "list"
    if node.get("type") == "object":
        return _mapping_kind(node, root)
    return _KINDS.get(str(node.get("type")), "value")


def _mapping_kind(node: Node, root: Node) -> str:
    if "properties" in node:
        return "section"
    values = node.get("additionalProperties")
    values = values if isinstance(values, Mapping) else next(iter(node.get("patternProperties", {}).values()), None)
    if values is None:
        return "mapping"
    key = resolve(node.get("propertyNames", {}), root).get("x-kind", "name")
    return f"mapping of {key} to {kind(values, root)}"


def bounds(node: Node, root: Node) -> str:
    """ "1 to 64", "10ms to 1h": the range in words, "" if there is none."""
    found = [text for choice in alternatives(node, root) if (text := _bounds(choice))]
    return "; ".join(dict.fromkeys(found))


def _bounds(node: Node) -> str:
    if "x-range" in node:
        return str(node["x-range"])
    if "exclusiveMinimum" in node:
        return f"above {node['exclusiveMinimum']:g}"
    for limits, unit in (
        ("minimum maximum", ""),
        ("minItems maxItems", " entries"),
        ("minProperties maxProperties", " entries"),
        ("minLength maxLength", " characters"),
    ):
        low, high = map(node.get, limits.split())
        if low is not None or high is not None:
            return _span(low, high) + unit
    return ""


def _span(low: float | None, high: float | None) -> str:
    if high is None:
        return f"{low} or more"
    if low is None:
        return f"at most {high}"
    return f"{low}" if low == high else f"{low} to {high}"


def expected(path: Iterable[str | int], root: Node) -> str:
    """What would be right at `path`: "needs a whole number (1 to 64)"; "" if nothing is known."""
    nodes = [node for node in at(path, root) if node]
    kinds = dict.fromkeys(kind(node, root) for node in nodes)
    ranges = dict.fromkeys(text for node in nodes if (text := bounds(node, root)))
    if not kinds:
        return ""
    return "needs: " + _with_range(" or ".join(kinds), "; ".join(ranges))


def expected_key(path: Iterable[str | int], root: Node) -> str:
    """What would be right as a key of the mapping at `path`."""
    for node in at(path, root):
        key = resolve(node.get("propertyNames", {}), root)
        if key:
            return "needs: " + _with_range(kind(key, root), bounds(key, root))
    return "needs: text"


def _with_range(text: str, limits: str) -> str:
    return f"{text} ({limits})" if limits else text
