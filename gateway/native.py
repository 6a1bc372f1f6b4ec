"""Importing: is the hot path the native modules that were compiled when the gateway was installed, or its source?

Depends on nothing. `GATEWAY_NO_EXTENSIONS=1` chooses the source, for whoever debugs, profiles or tests it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from importlib.util import find_spec
from types import ModuleType


class _SourcesFirst:
    """Finds the sources of this package's modules, before anybody else finds native ones."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if path is None or not name.startswith(f"{__package__}."):
            return None
        specs = (FileFinder(folder, (SourceFileLoader, SOURCE_SUFFIXES)).find_spec(name) for folder in path)
        return next((spec for spec in specs if spec is not None), None)


def ignore_native_modules() -> None:
    """From now on; modules that are imported already stay."""
    sys.meta_path.insert(0, _SourcesFirst)


def is_compiled() -> bool:
    """Does this process run native code where calls pass through?"""
    spec = find_spec("gateway.wire.connection")
    return spec is not None and not isinstance(spec.loader, SourceFileLoader)
