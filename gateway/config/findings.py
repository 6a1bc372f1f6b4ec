"""Config: what is wrong with a file, where, and what would be right. Values only; no reading, no schema."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path as FilePath

from gateway.errors import Misused, without_credentials

Path = tuple[str | int, ...]
"""Where a value stands: ("models", "imagenet", "rules", 0, "variant")."""

_SHOWN = 60  # characters of a wrong value that a finding repeats: enough to recognise it, short enough to read
_MOST = 500  # most findings that are reported: they go into logs and answers


class Severity(Enum):
    """What a finding does to the config that it is about."""

    ERROR = "error"  # the config is refused
    WARNING = "warning"  # the config is valid, but probably not what was meant
    NOTICE = "notice"  # the config is valid, but a part of it has no effect before a restart


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to put right."""

    source: str  # the file as it was named, or the variable or flag that the value came from
    line: int  # counted from 1; 0 if the source has no lines
    key: str  # dotted path, "" for the whole file
    wrong: str
    right: str  # what would be right, "" if `wrong` says it
    severity: Severity = Severity.ERROR

    def __str__(self) -> str:
        where = f"{self.source}:{self.line}" if self.line else self.source
        grade = "" if self.severity is Severity.ERROR else f"{self.severity.value}: "
        key = f"{self.key}: " if self.key else ""
        right = f"; {self.right}" if self.right else ""
        text = without_credentials(f"{where}: {grade}{key}{self.wrong}{right}")
        # Names and paths may contain anything, so control characters are escaped for terminals.
        return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to put right, and where; the loader knows the line."""

    path: Path
    wrong: str
    right: str = ""
    severity: Severity = Severity.ERROR


class ConfigError(Misused):
    """A config that cannot be used; `findings` says why, all at once, in the order of lines."""

    def __init__(self, findings: Iterable[Finding], files: Iterable[FilePath] = ()) -> None:
        """files: all files that the config names, as far as it was understood; one of them may have the fault."""
        ordered = in_order(findings)
        self.findings = ordered[:_MOST]
        if len(ordered) > _MOST:
            last = ordered[-1]
            self.findings += (Finding(last.source, last.line, "", f"and {len(ordered) - _MOST} more, up to here", ""),)
        self.files = tuple(files)
        super().__init__("\n".join(map(str, self.findings)))


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Each finding once, by source and line."""
    return tuple(sorted(dict.fromkeys(findings), key=lambda f: (f.source, f.line, f.key)))


def dotted(path: Iterable[str | int]) -> str:
    """("rules", 0, "variant") → "rules[0].variant"; a key that is not plain text is quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if part.isprintable() and part and len(part) <= _SHOWN else show(part)
            text += f".{shown}" if text else shown
    return text


def show(value: object) -> str:
    """A value as it may stand in a message: on one line, short, without a URL's credentials, and never a section's
    whole content."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        value = without_credentials(value)  # before it is cut
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def known(names: Sequence[str], given: str) -> str:
    """ "known: gpu, cpu (did you mean 'gpu'?)" """
    if not names:
        return "none is defined"
    close = difflib.get_close_matches(given[:200], names, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return f"known: {listed}{hint}"
