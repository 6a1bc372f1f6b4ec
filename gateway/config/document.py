"""Config: the reference page and the JSON Schema file, both made from the schema. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gateway.config import words
from gateway.config.findings import dotted
from gateway.config.load import OVERRIDES
from gateway.config.schema import json_schema
from gateway.config.text import MAX_BYTES, MAX_DEPTH, MAX_VALUES, plain
from gateway.config.units import MIB, duration_text, size_text
from gateway.steps.catalogue import SHIPPED, StepType

_INTRO = f"""\
# Configuration

<!-- Made from the schema by `inference-gateway schema --markdown`; change gateway/config/, not this page. -->

One YAML file. `inference-gateway check FILE` validates it: every finding at once, with its line, its key, what is wrong
and what would be right. `inference-gateway schema` prints a JSON Schema, with which editors complete and check while
you type (a first line `# yaml-language-server: $schema=gateway.schema.json`). Examples are in `deploy/examples/`.

## How values are written

- **Durations** are a number of seconds or `250ms`, `5s`, `2m`, `1h`. **Sizes** are a number of bytes or `64KiB`,
  `256MiB`, `1GiB` (also `kB`, `MB`, `GB`).
- **Addresses** are `HOST:PORT`, the host a name, an IPv4 address or an IPv6 address in brackets. What
  listens on `[::]:PORT` takes IPv4 as well. An upstream's endpoint may also be `dns:///NAME:PORT`: every address of the
  name, looked up again and again.
- **Files** are found relative to the folder of the config file, and must exist.
- **YAML** is read as in its version 1.2: `true` and `false` are the only booleans, `no` and `on` are text. Keys are
  always text. A key written twice is a finding. Anchors and aliases work; tags and merge keys (`<<`) do not. A file has
  at most {MAX_BYTES // MIB} MiB, {MAX_DEPTH} levels and {MAX_VALUES} values, aliases written out.

## What the environment and flags may set

A flag wins over the environment, which wins over the file, which wins over the default. An empty variable counts as
unset.

| key | variable | flag of `serve` |
| --- | --- | --- |
"""

_VARIABLES = """
Inside an endpoint, and only there, `${NAME}` is replaced by that variable of the environment, and `${NAME:-default}` by
the default if the variable is unset or empty. Everything else is in the file, so that a reviewed file is what runs.
Traces are set up by OpenTelemetry's standard `OTEL_*` variables.

## What changes while it runs

The file is looked at once a second, as are the files that it names, and read on SIGHUP at once. A change counts when
it has stayed the same for two looks, so a file that is being written is not read half. A symbolic link that turns, as
Kubernetes does it for a mounted ConfigMap, is a change. The new file is validated whole. If it is good, it is taken
over at once for new calls, and calls in flight end as they began. If it is not, the old one stays, and the findings are
in the log, in the metrics and at `/config`.

`upstreams`, `models`, `direct`, `access`, `admin.tokens`, `admin.open`, `experiments`, `quotas` (not its `shared` and
`usage`), `telemetry.capture` and what is in TLS files change in this way. Everything else takes effect with a restart
only, and a notice says so.

## Keys

A name in `<angle brackets>` is yours to choose.
"""


_STEPS = """\
## Steps

What a pipeline's `steps` may name, with the parameters below `with`.
"""


def json_schema_text() -> str:
    """The JSON Schema as a file, for editors."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def reference() -> str:
    """docs/configuration.md."""
    root = json_schema()
    overrides = [f"| `{dotted(path)}` | `{names[0]}` | `{names[1]}` |" for path, names in OVERRIDES.items()]
    keys = [line for section in _sections(root) for line in _page(section, root)]
    steps = [line for name, step in SHIPPED.items() for line in _step(name, step)]
    return "\n".join([_INTRO + "\n".join(overrides), _VARIABLES, *keys, _STEPS, *steps]).rstrip() + "\n"


@dataclass(frozen=True)
class _Section:
    """One kind of mapping, and everywhere that it stands."""

    node: words.Node
    paths: list[str] = field(default_factory=list)


def _sections(root: words.Node) -> list[_Section]:
    """All mappings with keys of their own, in the order of the file, outer ones first."""
    found: dict[str, _Section] = {}

    def visit(path: str, node: words.Node, above: tuple[str, ...]) -> None:
        if node["title"] in above:  # parts of a pipeline may have parts
            return
        section = found.setdefault(node["title"], _Section(node))
        section.paths.append(path)
        for key, child in node["properties"].items():
            for deeper_path, deeper in _deeper(f"{path}.{key}" if path else key, child, root):
                visit(deeper_path, deeper, (*above, node["title"]))

    visit("", root, ())
    return list(found.values())


def _page(section: _Section, root: words.Node) -> Iterator[str]:
    """The heading, the words and the table of one section."""
    node = section.node
    own = root["$defs"].get(node["title"], node)  # beside a `$ref` stands what one field says of it
    yield f"### {' and '.join(f'`{path}`' if path else 'The file' for path in section.paths)}"
    yield f"\n{_prose(own['description'])}\n"
    yield from _table(node, root)


def _table(node: words.Node, root: words.Node) -> Iterator[str]:
    yield "| key | type | range | default | what for |"
    yield "| --- | --- | --- | --- | --- |"
    for key, child in node["properties"].items():
        yield _row(key, child, key in node.get("required", ()), root)
    yield ""


def _step(name: str, step: StepType) -> Iterator[str]:
    """What a shipped step does, and its parameters."""
    yield f"### `{name}`"
    yield f"\n{_prose((step.__doc__ or '').partition(chr(10) * 2)[0])}\n"
    parameters = step.params_type.model_json_schema()
    if parameters.get("properties"):
        yield from _table(parameters, parameters)


def _row(key: str, node: words.Node, required: bool, root: words.Node) -> str:
    resolved = words.resolve(node, root)
    text = _prose(resolved.get("description", ""))
    if examples := resolved.get("examples"):
        text += f" Example: `{key}: {_yaml(examples[0])}`"
    default = "**required**" if required else _default(node, resolved, root)
    cells = (f"`{key}`", words.kind(node, root), words.bounds(_own(node, root), root), default, text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _own(node: words.Node, root: words.Node) -> words.Node:
    """The node, but for a list of scalars that has no range itself, its items."""
    choices = list(words.alternatives(node, root))
    if len(choices) == 1 and choices[0].get("type") == "array" and isinstance(choices[0].get("items"), dict):
        items = words.resolve(choices[0]["items"], root)
        return choices[0] if words.bounds(choices[0], root) or "properties" in items else items
    return node


def _default(node: words.Node, resolved: words.Node, root: words.Node) -> str:
    if node.get("default") in (None, "", []) or isinstance(node["default"], dict):  # a section has its own table
        return "–"
    value, kind = node["default"], words.kind(resolved, root)
    if kind == "duration":
        return f"`{duration_text(value)}`"
    return f"`{size_text(value)}`" if kind == "size" else f"`{_yaml(value)}`"


def _deeper(path: str, node: words.Node, root: words.Node) -> Iterator[tuple[str, words.Node]]:
    """The sections below a key: the value itself, a mapping's values, a list's items."""
    for choice in words.alternatives(node, root):
        if "properties" in choice:
            yield path, choice
        elif isinstance(choice.get("items"), dict):
            yield from _deeper(f"{path}[]", choice["items"], root)
        elif choice.get("type") == "object" and "x-kind" not in choice:
            values = [choice.get("additionalProperties"), *choice.get("patternProperties", {}).values()]
            for value in values:
                if isinstance(value, dict):
                    yield from _deeper(f"{path}.<{_name(path)}>", value, root)


def _name(path: str) -> str:
    """What one entry of a mapping is called: "models" → "model"."""
    return {"metadata": "key", "parameters": "key"}.get(last := path.rpartition(".")[2], last.removesuffix("s"))


def _prose(text: str) -> str:
    return " ".join(text.split())


def _yaml(value: Any) -> str:  # Any: an example or default of any key
    """A value on one line, with quotes only where YAML needs them."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, str):
        return value if plain(value) == value and not set(value) & set(":{}[],&*#?|<>=!%@'\"") else json.dumps(value)
    return json.dumps(value)
