"""Config: YAML text → plain data, with the line of every value. Pure; text in, data and findings out.

PyYAML finds the tokens; building is our own, because its builder silently takes the last of two equal keys, reads `no`
as false and `1:30` as 90, makes objects from tags, and forgets lines. Plain scalars are read as in the core schema of
YAML 1.2: null, true, false, numbers, and else text. Anchors and aliases work, within limits; merge keys and tags do
not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from gateway.config.findings import Finding, Path, dotted, show

MAX_BYTES = 2**20  # what a Kubernetes ConfigMap can hold
MAX_DEPTH = 32  # the schema needs 9
MAX_VALUES = 100_000  # after aliases are written out, keys apart; models of two variants fill a file of 1 MiB before

_NULL = ("", "~", "null", "Null", "NULL")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]{1,19}", re.ASCII)
_HEX = re.compile(r"0x[0-9a-fA-F]{1,16}", re.ASCII)
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,20}|[0-9]{1,20}(\.[0-9]{0,20})?)([eE][-+]?[0-9]{1,3})?", re.ASCII)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(slots=True)
class Document:
    """What a text says. `data` is None if it is empty or cannot be read at all."""

    data: Any = None  # str, int, float, bool, None, and dicts and lists of them
    lines: dict[Path, int] = field(default_factory=dict)  # of the key, for values in a mapping
    findings: list[Finding] = field(default_factory=list)

    def line(self, path: Path) -> int:
        """The line of `path`, or of the nearest thing around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 0)


def parse(raw: bytes, source: str) -> Document:
    """Read one YAML document. Whatever is wrong becomes a finding; never raises for any input."""
    if len(raw) > MAX_BYTES:
        wrong = f"the file has {len(raw)} bytes"
        return Document(findings=[Finding(source, 0, "", wrong, f"at most {MAX_BYTES}")])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return Document(findings=[Finding(source, line, "", "is not UTF-8 text", "save the file as UTF-8")])
    return _Builder(text, source).document()


class _Stop(Exception):
    """Nothing after this point can be understood."""

    def __init__(self, line: int, wrong: str, right: str = "") -> None:
        self.line, self.wrong, self.right = line, wrong, right


class _Builder:
    """Follows PyYAML's events, which come from a parser that does not recurse; depth is bounded here."""

    def __init__(self, text: str, source: str) -> None:
        self._text = text
        self._source = source
        self._out = Document()
        self._anchors: dict[str, Any] = {}
        self._values = 0
        self._events = self._checked_events()

    def document(self) -> Document:
        try:
            self._document()
        except _Stop as stop:
            self._out.data = None
            self._out.findings.append(Finding(self._source, stop.line, "", stop.wrong, stop.right))
        return self._out

    def _checked_events(self) -> Iterator[Any]:  # PyYAML's types know no common event
        try:
            yield from yaml.parse(self._text, Loader=yaml.SafeLoader)
        except yaml.reader.ReaderError as error:
            line = self._text.count("\n", 0, error.position) + 1
            raise _Stop(line, f"has the character {error.character!a}", "printable text only") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            context = f" {error.context}" if error.context else ""
            raise _Stop(mark.line + 1 if mark else 0, f"is not YAML: {error.problem}{context}") from None
        except yaml.YAMLError as error:
            raise _Stop(0, f"is not YAML: {error}") from None
        except (ValueError, OverflowError):  # what Python says of them differs between its versions
            raise _Stop(0, "is not YAML: an escape, or the number in a %YAML line, is out of range") from None

    def _document(self) -> None:
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                self._out.data = self._value(next(self._events), ())
                break
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                raise _Stop(_line(event), "a second document starts here", "one document per file")

    def _value(self, event: Any, path: Path) -> Any:
        line = _line(event)
        self._out.lines.setdefault(path, line)
        self._count(line)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, path, line)
        if len(path) >= MAX_DEPTH and not isinstance(event, yaml.ScalarEvent):
            raise _Stop(line, f"nests deeper than {MAX_DEPTH} levels")
        if event.tag is not None and event.tag != "!":
            self._wrong(line, path, f"has the tag {show(event.tag)}", "values without tags")
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, path, line)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._list(path)
        else:
            value = self._mapping(path)
        if event.anchor is not None:
            self._anchors[event.anchor] = value
        return value

    def _count(self, line: int, values: int = 1) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise _Stop(line, f"has more than {MAX_VALUES} values, aliases written out")

    def _alias(self, event: Any, path: Path, line: int) -> Any:
        if event.anchor not in self._anchors:  # not there yet while its own content is read: no endless loops
            raise _Stop(line, f"the alias *{event.anchor} has no anchor before it")
        value = self._anchors[event.anchor]
        values, depth = _measure(value)
        self._count(line, values)
        if len(path) + depth > MAX_DEPTH:
            raise _Stop(line, f"nests deeper than {MAX_DEPTH} levels")
        return value

    def _scalar(self, event: Any, path: Path, line: int) -> Any:
        if _SURROGATE.search(event.value):
            self._wrong(line, path, "has half of a surrogate pair", "the character itself")
            return ""
        is_text = event.style is not None or event.tag == "!"
        return event.value if is_text else plain(event.value)

    def _list(self, path: Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._value(event, (*path, len(items))))
        return items

    def _mapping(self, path: Path) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            line = _line(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise _Stop(line, "a key is not plain text")
            key, merge = event.value, event.value == "<<" and event.style is None
            at = (*path, key)
            first = self._out.lines.get(at) if key in pairs else None
            self._out.lines[at] = line
            value = self._value(next(self._events), at)
            if first is not None:
                self._wrong(line, at, f"is written twice, first on line {first}", "each key once")
            elif merge:
                self._wrong(line, at, "merge keys are not read", "an alias for a whole value")
            elif _SURROGATE.search(key):
                self._wrong(line, at, "has half of a surrogate pair", "the character itself")
            else:
                pairs[key] = value
        return pairs

    def _wrong(self, line: int, path: Path, wrong: str, right: str) -> None:
        self._out.findings.append(Finding(self._source, line, dotted(path), wrong, right))


def _line(event: Any) -> int:
    return 1 + int(event.start_mark.line)


def plain(text: str) -> Any:
    """Read a scalar without quotes as the core schema of YAML 1.2 does."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _measure(value: Any) -> tuple[int, int]:
    """How many values there are in it, itself included, and how deep it nests."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    sizes = [_measure(each) for each in inner]
    return 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
