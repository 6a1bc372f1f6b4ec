"""routing (pure): what a rule asks of a request. May use values only.

Parameters have types and metadata has none, so both are compared as text: true and false in lower case, integers in
decimal, floats as Python's repr (1.0, 0.25, 1e-07), strings as they are. Comparison is exact: case counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pydantic_core import SchemaError, SchemaValidator, core_schema

from gateway.types import Facts, Parameter

MAX_REGEX_TEXT = 1024
"""Characters. Callers choose the text that a regex reads, and a long text is costly, so longer ones do not match."""


def as_text(value: Parameter) -> str:
    """A parameter's value as text, for comparing, hashing and showing."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


@dataclass(frozen=True, slots=True)
class Key:
    """Where a rule or a sticky assignment finds its value in a request."""

    source: Literal["metadata", "parameter"]
    name: str

    def __post_init__(self) -> None:
        """:raises ValueError: if the name is one that `Facts` can't contain."""
        if not self.name:
            raise ValueError("a key needs a name")
        if self.source == "metadata" and (self.name != self.name.lower() or self.name.endswith("-bin")):
            raise ValueError(f"metadata key '{self.name}' must be lower case and not end in -bin")

    def maybe_read(self, facts: Facts) -> str | None:
        """The value as text; None if the request has none."""
        if self.source == "metadata":
            return facts.metadata.get(self.name)
        value = facts.parameters.get(self.name)
        return None if value is None else as_text(value)

    def __str__(self) -> str:
        return f"{self.source} {self.name}"


@dataclass(frozen=True, slots=True)
class Exact:
    """The value is this text."""

    text: str

    def holds(self, value: str | None) -> bool:
        return value == self.text

    def __str__(self) -> str:
        return f"'{self.text}'"


@dataclass(frozen=True, slots=True)
class AnyOf:
    """The value is one of these texts."""

    texts: frozenset[str]

    def holds(self, value: str | None) -> bool:
        return value in self.texts

    def __str__(self) -> str:
        return "any of " + ", ".join(f"'{text}'" for text in sorted(self.texts))


@dataclass(frozen=True, slots=True)
class Prefix:
    """The value begins with this text."""

    text: str

    def holds(self, value: str | None) -> bool:
        return value is not None and value.startswith(self.text)

    def __str__(self) -> str:
        return f"beginning with '{self.text}'"


def _compiled(pattern: str) -> Callable[[str], bool]:
    schema = core_schema.str_schema(pattern=pattern, regex_engine="rust-regex", strict=True)
    try:
        return SchemaValidator(schema).isinstance_python
    except SchemaError as error:
        raise ValueError(_why(str(error))) from None


def _compiled_whole(pattern: str) -> Callable[[str], bool]:
    """For a pattern that compiles alone: does the whole of a text match it?"""
    try:
        return _compiled(rf"\A(?:{pattern})\z")
    except ValueError:  # in verbose mode, `(?x)`, a comment at its end hides the bracket; there a line's end is nothing
        return _compiled(f"\\A(?:{pattern}\n)\\z")


def _why(text: str) -> str:
    """The last line of what the engine says of a pattern; those before it draw where."""
    return text.rstrip().rpartition("\n")[2].strip().removeprefix("error: ").removeprefix("SchemaError: ")


@dataclass(frozen=True, slots=True)
class Regex:
    """The whole value matches this pattern and has at most MAX_REGEX_TEXT characters.

    Callers choose the values, so no engine that backtracks will do: 45 characters hold Python's for years with
    a pattern such as `(a+)+`, and its worker's loop with it. Rust's `regex`, which pydantic brings along, takes time
    in proportion to value and pattern; it has no look-around and no back-references, which need backtracking.

    :raises ValueError: if the pattern is none; its text says why.
    """

    pattern: str
    _holds: Callable[[str], bool] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _compiled(self.pattern)  # alone, or `a)(b` would be one in the brackets below
        object.__setattr__(self, "_holds", _compiled_whole(self.pattern))

    def holds(self, value: str | None) -> bool:
        return value is not None and len(value) <= MAX_REGEX_TEXT and self._holds(value)

    def __str__(self) -> str:
        return f"matching /{self.pattern}/"


@dataclass(frozen=True, slots=True)
class Present:
    """The request has the value; with `wanted=False`: it does not have it."""

    wanted: bool = True

    def holds(self, value: str | None) -> bool:
        return (value is not None) is self.wanted

    def __str__(self) -> str:
        return "present" if self.wanted else "absent"


Test = Exact | AnyOf | Prefix | Regex | Present


@dataclass(frozen=True, slots=True)
class Condition:
    """One requirement of a rule."""

    key: Key
    test: Test

    def holds(self, facts: Facts) -> bool:
        return self.test.holds(self.key.maybe_read(facts))

    def __str__(self) -> str:
        return f"{self.key} {self.test}"


@dataclass(frozen=True, slots=True)
class Rule:
    """A variant, and conditions that a request must all meet to get it. A route's first rule that matches wins."""

    name: str
    conditions: tuple[Condition, ...]
    variant: str

    def __post_init__(self) -> None:
        """:raises ValueError: if there are no conditions, which would hide every later rule and the split."""
        if not self.conditions:
            raise ValueError(f"rule '{self.name}' needs a condition")

    def matches(self, facts: Facts) -> bool:
        for condition in self.conditions:  # a loop and not all(): no generator on the hot path  # noqa: SIM110
            if not condition.holds(facts):
                return False
        return True

    @property
    def reason(self) -> str:
        """The rule's name in plans and telemetry."""
        return f"rule:{self.name}"
