"""I/O: a package with a step of one's own, made from the example in `templates/step` by giving it another name.

The example is itself such a package, which the tests run and docs/steps explains; so there is one source of both.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path
from typing import Final

from gateway.errors import CommandFailed, Misused
from gateway.steps.catalogue import SHIPPED

_EXAMPLE: Final = "tidy_text"
_FOLDER: Final = Path(__file__).with_name("templates") / "step"
_NAME: Final = re.compile(r"[a-z](?:[a-z0-9_-]{0,48}[a-z0-9])?")


class UnfitStepName(Misused):
    """No step can have this name; the text says why, and what would do."""


def new_step(name: str, folder: Path | None = None) -> list[Path]:
    """Write the package, and answer its files.

    name:    of the step; the module's has `_` where it has `-`.
    folder:  to be made; None is one of the module's name here.
    :raises UnfitStepName: if it can be no module's name, or another module or step has it.
    :raises CommandFailed: if the folder is there and has files.
    :raises OSError: if it cannot be written.
    """
    example = _example()
    module = module_of(name, example)
    target = Path(module) if folder is None else folder
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CommandFailed(f"{target} is there already; name another folder: --folder FOLDER")
    _require_free(name, module)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for file, text in sorted(example.items()):
        path = target / _renamed(file, module)
        path.write_text(_renamed(text, module), encoding="utf-8")
        written.append(path)
    return written


def module_of(name: str, example: dict[str, str]) -> str:
    """:raises UnfitStepName: if it is not of the form of a name, or a word that Python or the step's code uses."""
    such = f"such as '{_EXAMPLE}'"
    if not _NAME.fullmatch(name):
        raise UnfitStepName(f"'{name}' cannot be a step's name; it has lower-case letters, digits, '_' and '-', {such}")
    module = name.replace("-", "_")
    used = set(re.findall(r"\b[A-Z]\w+", example[f"{_EXAMPLE}.py"])) - {
        _class_of(_EXAMPLE),
        f"{_class_of(_EXAMPLE)}Params",
    }
    if keyword.iskeyword(module) or {_class_of(module), f"{_class_of(module)}Params"} & used:
        raise UnfitStepName(f"'{name}' cannot be a step's name: its code already means something else by it")
    return module


def _require_free(name: str, module: str) -> None:
    """:raises UnfitStepName: if a step or a module has the name, which would be found in place of the new one."""
    if module in SHIPPED:
        raise UnfitStepName(f"the gateway has a step '{module}'; choose another name than '{name}'")
    if importlib.util.find_spec(module) is not None:
        raise UnfitStepName(
            f"Python has a module '{module}', which would be imported in its place; choose another name"
        )


def _example() -> dict[str, str]:
    """The files of the example, by their names."""
    return {file.name: file.read_text("utf-8") for file in _FOLDER.iterdir() if file.is_file()}


def _renamed(text: str, module: str) -> str:
    for old, new in (
        (_EXAMPLE, module),
        (_class_of(_EXAMPLE), _class_of(module)),
        (_EXAMPLE.replace("_", "-"), module.replace("_", "-")),
    ):
        text = text.replace(old, new)
    return text


def _class_of(module: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in module.split("_"))
