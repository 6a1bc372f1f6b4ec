"""Config: the only module that reads files, environment and flags. It gives a whole valid config, or every finding.

Order of precedence: flag, environment, file, default.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gateway.config import access_check, certificates, probes, words
from gateway.config.check import Names, check, with_safe_control
from gateway.config.findings import ConfigError, Finding, Path, Severity, dotted, in_order, known, show
from gateway.config.schema import Config, json_schema
from gateway.config.text import MAX_BYTES, Document, parse, plain
from gateway.config.units import REFUSED
from gateway.steps import Pipeline, PipelineError, build_pipeline
from gateway.steps.catalogue import module_of
from gateway.steps.declare import named_steps

OVERRIDES: Mapping[Path, tuple[str, str]] = {
    ("listen",): ("GATEWAY_LISTEN", "--listen"),
    ("admin", "listen"): ("GATEWAY_ADMIN_LISTEN", "--admin-listen"),
    ("workers",): ("GATEWAY_WORKERS", "--workers"),
}
"""The settings that the environment and flags may set: those that differ between places that share one file."""

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A config in use, and what is worth knowing about where it came from."""

    config: Config
    source: str  # the name of the file as given, or the flag
    digest: str  # SHA-256, hex, of the config's values and the files it names: what is equal means the same
    files: tuple[FilePath, ...] = ()  # the config file and the files that it names, to be watched
    warnings: tuple[Finding, ...] = ()
    pipelines: Mapping[str, Pipeline] = field(default_factory=dict)  # by public model, built, with their files read
    expiries: Mapping[str, float] = field(
        default_factory=dict
    )  # when the gateway's own certificates expire, in Unix time, by config key
    line_of: Callable[[Path], int] = field(default=lambda path: 0, compare=False)  # in the file; 0 if there is none


def load(path: str | FilePath, environ: Mapping[str, str], flags: Mapping[str, str] | None = None) -> Loaded:
    """Read and check a config file.

    flags:  values from the command line by flag, such as {"--listen": "0.0.0.0:8001"}.

    :raises ConfigError: if anything is wrong with it; nothing else, whatever the file holds.
    """
    source = str(path)
    return _Loader(source, parse(content(source), source), environ, flags or {}, FilePath(path)).loaded()


def content(source: str) -> bytes:
    """What is in a config file, or as much of it as shows that it is too long.

    :raises ConfigError: if it cannot be read.
    """
    try:
        return _read(FilePath(source), MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(
            [Finding(source, 0, "", f"cannot be read: {_reason(error)}", "needs a readable YAML file")]
        ) from error


def transparent(triton: str, environ: Mapping[str, str], flags: Mapping[str, str] | None = None) -> Loaded:
    """The config of a gateway for one Triton and all its models, for `serve --triton HOST:PORT`.

    :raises ConfigError: if `triton` or a flag cannot be used.
    """
    data = {"upstreams": {"triton": {"endpoints": [triton]}}, "direct": {"models": "all"}}
    return _Loader("--triton", Document(data), environ, flags or {}).loaded()


def fingerprint(files: tuple[FilePath, ...]) -> tuple[object, ...]:
    """What changes when any of the files is written, replaced, or reached through another symbolic link.

    Kubernetes updates a mounted ConfigMap by turning the link `..data` to a new folder; the path in the config file's
    own link never changes, so the real path is part of it.
    """
    marks: list[object] = []
    for file in files:
        try:
            real = os.path.realpath(file)
            found = os.stat(real)
            marks.append((real, found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev))
        except (OSError, ValueError) as error:
            marks.append(_reason(error))
    return tuple(marks)


def _import_beside(file: FilePath) -> None:
    """Let steps be imported from the config's folder: last of all, so that nothing that is installed is hidden by it.

    It stays, since a step may import more when it runs.
    """
    folder = os.path.abspath(file.parent)
    if folder not in sys.path:
        sys.path.append(folder)


_imported: dict[str, bytes] = {}
"""SHA-256 of the files of users' steps as they were when this process imported them, by module."""


def _maybe_old_code(step: str) -> str:
    """The module of a user's step, if its file is not any more what was imported; "" otherwise."""
    name = module_of(step)
    file = getattr(sys.modules.get(name), "__file__", None)
    if not name or not file:
        return ""
    try:
        now = hashlib.sha256(_read(FilePath(file))).digest()
    except OSError:  # it is gone, as in an upgrade that is under way
        now = b""
    return name if _imported.setdefault(name, now) != now else ""


@dataclass(slots=True)
class _Loader:
    """One run over one document."""

    source: str
    document: Document
    environ: Mapping[str, str]
    flags: Mapping[str, str]
    file: FilePath | None = None
    findings: list[Finding] = field(default_factory=list)
    labels: dict[Path, str] = field(default_factory=dict)  # paths whose values are not the file's
    read: dict[FilePath, bytes] = field(default_factory=dict)  # digests of the files that the config names
    pipelines: dict[str, Pipeline] = field(default_factory=dict)

    def loaded(self) -> Loaded:
        self.findings += self.document.findings
        config = self._config()
        files = (*(() if self.file is None else (self.file,)), *self.read)
        if config is None or any(finding.severity is Severity.ERROR for finding in self.findings):
            raise ConfigError(self.findings, files)
        digest, expiries = self._digest(config), certificates.expiries(config)
        warnings = in_order(self.findings)
        return Loaded(
            config, self.source, digest, files, warnings, self.pipelines, expiries, line_of=self.document.line
        )

    def _config(self) -> Config | None:
        data = self._mapping()
        if data is None:
            return None
        if self.file is not None:
            self._interpolate(data)
        self._override(data)
        config = self._validated(data)
        if config is not None:
            config = with_safe_control(config)
            now = datetime.now(timezone.utc)
            for problem in (
                *check(config, Names.of(data)),
                *certificates.problems(config, now),
                *probes.problems(config),
                *(() if self._has_error(("access",)) else access_check.problems(config)),  # what is wrong is not in it
            ):
                self._add(problem.path, problem.wrong, problem.right, problem.severity)
            self._build_pipelines(config)
        return config

    def _has_error(self, section: Path) -> bool:
        key = dotted(section)
        return any(each.severity is Severity.ERROR and each.key.startswith(key) for each in self.findings)

    def _build_pipelines(self, config: Config) -> None:
        imported = frozenset(sys.modules)
        for name, model in config.models.items():
            if model.pipeline is None:
                continue
            at: Path = ("models", name, "pipeline")
            steps = list(named_steps(model.pipeline.steps))
            if self.file is not None and any(":" in step for _, step in steps):
                _import_beside(self.file)
            try:
                self.pipelines[name] = build_pipeline(name, model.pipeline, self._content, imported)
            except PipelineError as error:
                for each in error.findings:
                    self._add((*at, *each.where), each.wrong, each.right)
            for where, step in steps:
                if module := _maybe_old_code(step):
                    wrong = f"the file of '{module}' has changed since this process imported it"
                    self._add((*at, "steps", *where), wrong, "restart to run its new code", Severity.WARNING)

    def _mapping(self) -> dict[str, Any] | None:
        data = self.document.data
        if isinstance(data, dict):
            return data
        if not self.findings:
            self._add((), f"is {show(data)}", "a mapping with at least 'upstreams'")
        return None

    def _add(self, path: Path, wrong: str, right: str, severity: Severity = Severity.ERROR) -> None:
        source, line = self.source, self.document.line(path)
        for prefix, label in self.labels.items():
            if path[: len(prefix)] == prefix:
                source, line = label, 0
        self.findings.append(Finding(source, line, dotted(path), wrong, right, severity))

    # Values that are not the file's own text

    def _interpolate(self, data: dict[str, Any]) -> None:
        """Replace variables in what differs from cluster to cluster, or is secret: endpoints and the store."""
        store = data.get("store")
        if isinstance(store, dict):
            for key in {"url", "unit_key"} & store.keys():
                unset = "sqlite:///unset" if key == "url" else "unset-unit-key-16"
                store[key] = self._replaced(store[key], ("store", key), unset)
        upstreams = data.get("upstreams")
        for name, upstream in upstreams.items() if isinstance(upstreams, dict) else ():
            endpoints = upstream.get("endpoints") if isinstance(upstream, dict) else None
            if isinstance(endpoints, list):
                at = ("upstreams", name, "endpoints")
                upstream["endpoints"] = [self._replaced(each, (*at, i)) for i, each in enumerate(endpoints)]

    def _replaced(self, value: Any, path: Path, instead: str = "") -> Any:
        """instead: a valid value for one whose variable is not set, so that this causes no other finding."""
        if not isinstance(value, str):
            return value

        unset = [found[1] for found in _VARIABLE.finditer(value) if found[2] is None and not self.environ.get(found[1])]
        for name in unset:
            self._add(path, f"the environment has no {name}", f"set it, or write ${{{name}:-default}}")
        if unset:
            return instead or f"unset-{path[-1]}:1"  # a valid and unique endpoint
        return _VARIABLE.sub(lambda found: self.environ.get(found[1]) or found[2], value)

    def _override(self, data: dict[str, Any]) -> None:
        for path, (variable, flag) in OVERRIDES.items():
            value, label = self.flags.get(flag), flag
            if value is None:
                value, label = self.environ.get(variable) or None, variable
            section: Any = data
            for part in path[:-1]:
                section = section.setdefault(part, {}) if isinstance(section, dict) else None
            if value is not None and isinstance(section, dict):
                section[path[-1]] = plain(value)
                self.labels[path] = label

    def _located(self, name: str) -> FilePath:
        folder = self.file.parent if self.file is not None else FilePath()
        return FilePath(os.path.abspath(folder / name))

    def _content(self, name: str) -> bytes:
        """What is in a file that the config names; from now on that file belongs to the config.

        :raises OSError: if it cannot be read.
        """
        file = self._located(name)
        self.read[file] = b""  # watched from now on, also if it is not there yet
        content = _read(file)
        self.read[file] = hashlib.sha256(content).digest()
        return content

    def _resolve(self, name: str) -> str:
        """The absolute path of such a file.

        :raises OSError: if it cannot be read.
        """
        self._content(name)
        return str(self._located(name))

    def _digest(self, config: Config) -> str:
        digest = hashlib.sha256(config.model_dump_json().encode("utf-8", "replace"))
        for content in self.read.values():
            digest.update(content)
        return digest.hexdigest()

    # The schema

    def _validated(self, data: dict[str, Any]) -> Config | None:
        """The config without whatever is wrong in it, so that the rest can be checked as well; None if nothing is left.

        The first round's errors are the findings. Later rounds only follow from what was taken out.
        """
        context = {"resolve": self._resolve}
        rest = data
        for attempt in range(8):
            try:
                return Config.model_validate(rest, context=context)
            except ValidationError as error:
                errors = error.errors(include_url=False)
            if attempt == 0:
                rest = copy.deepcopy(data)
                for each in errors:
                    found = translated(each, data, json_schema())
                    if found is not None:
                        self._add(*found)
            paths = [(_path(each, rest), each["type"] == "missing") for each in errors]
            if not all(_take_out(rest, path, missing) for path, missing in paths):
                return None
        return None


def translated(error: ErrorDetails, data: Any, schema: words.Node) -> tuple[Path, str, str] | None:  # Any: plain data
    """What pydantic says, in our words: where, what is wrong, what would be right; None if another finding says it."""
    path = _path(error, data)
    kind, context = error["type"], error.get("ctx", {})
    wrong, right = f"is {show(error['input'])}", words.expected(path, schema)
    if kind == "missing":
        wrong = "is missing"
    elif kind == "extra_forbidden":
        wrong, right = f"unknown key {show(path[-1])}", known(words.keys_at(path[:-1], schema), str(path[-1]))
    elif error["loc"][-1] == "[key]":
        wrong, right = "cannot be a name here", words.expected_key(path[:-1], schema)
    elif kind in ("too_short", "too_long"):
        if context["actual_length"] != len(error["input"]):
            return None  # only because entries were refused, each with a finding of its own
        wrong = f"has {context['actual_length']} entries"
    elif kind == "value_error":
        wrong, right = str(context["error"]), ""
    elif kind == REFUSED and context["wrong"]:
        wrong, right = context["wrong"], context["right"] or right
    return path, wrong, right


def _path(error: ErrorDetails, data: Any) -> Path:
    """Where in the file an error is: pydantic's location without the names of alternatives and shorthands."""
    path: list[str | int] = []
    for part in error["loc"]:
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if in_list or (isinstance(data, dict) and part in data):
            data = data[part]
            path.append(part)
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    return tuple(path)


def _take_out(data: dict[str, Any], path: Path, missing: bool) -> bool:
    """Remove what is wrong: the value, the whole list if it is in one, or what lacks something.

    False if that is everything.
    """
    if missing:
        path = path[:-1]
    in_list = next((index for index, part in enumerate(path) if isinstance(part, int)), len(path))
    path = path[:in_list]
    if not path:
        return False
    section: Any = data
    for part in path[:-1]:
        section = section.get(part, {}) if isinstance(section, dict) else {}
    section.pop(path[-1], None)
    return True


def _read(file: FilePath, most: int = -1) -> bytes:
    """The content of a regular file, at most so many bytes.

    ValueError is for names that no file can have.

    :raises OSError, ValueError: if it cannot be read, or is a folder, a pipe or a device.
    """
    with open(file, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        content: bytes = opened.read(most)
        return content


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
