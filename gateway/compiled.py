"""Importing: is the hot path the native modules that were compiled when the gateway was installed, or its source?

Depends on nothing. `GATEWAY_NO_EXTENSIONS=1` chooses the source, for whoever debugs, profiles or tests it. Where a
source is not the one that its native module was made of, somebody has edited it and expects it to run: then all are
chosen, since native modules are made for one another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

_log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_MADE_OF = _FOLDER / "compiled.json"  # written by hatch_build.py
_NATIVE = "rpc/connection"  # one of the native modules: if it is there, all are


class _SourcesFirst:
    """Finds the sources of this package's modules, before the usual finders find native modules."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if path is None or not name.startswith(f"{__package__}."):
            return None
        specs = (FileFinder(folder, (SourceFileLoader, SOURCE_SUFFIXES)).find_spec(name) for folder in path)
        return next((spec for spec in specs if spec is not None), None)


def ignore_native_modules() -> None:
    """Choose the sources for modules that are imported from now on."""
    sys.meta_path.insert(0, _SourcesFirst)


def ignore_stale_modules() -> None:
    """Choose the sources if a native module was made from another source, and warn of it."""
    edited = _edited()
    if edited:
        _log.warning(
            "%s: not what the native modules were compiled from, so all sources are interpreted; install the gateway "
            "anew (in a checkout: make setup COMPILE=1) to have the hot path compiled",
            edited,
        )
        ignore_native_modules()


def _edited() -> str:
    """The first source that has changed since it was compiled; "" if none has, or none is compiled for this Python."""
    if not any((_FOLDER / f"{_NATIVE}{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return ""
    try:
        made_of: dict[str, str] = json.loads(_MADE_OF.read_bytes())
    except (OSError, ValueError):
        return _MADE_OF.name
    for name, digest in made_of.items():
        source = _FOLDER / name
        if source.exists() and hashlib.sha256(source.read_bytes()).hexdigest() != digest:
            return name
    return ""


def is_compiled() -> bool:
    """Does this process run the hot path as native code?"""
    spec = find_spec("gateway.rpc.connection")
    return spec is not None and not isinstance(spec.loader, SourceFileLoader)
