"""The commands of docs/operations.md, run while an incident is there: what the page prints is what they print."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
TOOLS = ("bash", "curl", "grep", "jq")
MISSING = ", ".join(tool for tool in TOOLS if shutil.which(tool) is None)

needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"not here: {MISSING}")

_WRITTEN = re.compile(r"\d+(?:\\\.\d+)*(?:e\\?[+-]?\d+)?")  # a number or an address, in text that is escaped
_NUMBER = r"[\d.]+(?:e[+-]?\d+)?"


def commands(incident: str) -> list[tuple[str, list[str]]]:
    """An incident's commands, each with the lines that the page prints after it."""
    (text,) = re.findall(rf'<a id="{incident}"></a>(.*?)(?=<a id=|\Z)', PAGE.read_text(encoding="utf-8"), re.DOTALL)
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif line:
                found[-1][1].append(line)
    return found


def incidents() -> list[str]:
    """Those that have commands."""
    names = re.findall(r'^<a id="([\w-]+)"></a>', PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [name for name in names if any(not command.startswith("kubectl") for command, _ in commands(name))]


def of_kubernetes() -> list[str]:
    """The commands of all incidents for a cluster, also those within sentences."""
    _, _, text = PAGE.read_text(encoding="utf-8").partition("# Incidents\n")
    return sorted(set(re.findall(r"(?:`|^\$ )(kubectl [^`|\n]+)", text, re.MULTILINE)))


async def unknown_to_kubectl(command: str, folder: Path) -> str:
    """What kubectl says it does not know of a command, without a cluster: it reads all of it before it connects."""
    output = await _run(command, "", folder)
    return "\n".join(line for line in output.splitlines() if re.search("unknown|invalid|unrecognized", line))


async def as_the_page_says(
    incident: str,
    admin: str,
    folder: Path,
    names: Mapping[str, str],
    *,
    log: str = "",
    without: Sequence[str] = (),
    within: float = 60.0,
) -> None:
    """Run every command of an incident, and again until it prints what the page does, numbers apart.

    folder:   has the gateway.yaml.
    names:    what is called otherwise here, by its name on the page.
    log:      of the gateway.
    without:  beginnings of lines that are not waited for.
    """
    if MISSING:
        return  # a test of its own is skipped, and says so
    (folder / "gateway.log").write_text(log)
    for command, printed in commands(incident):
        if command.startswith("kubectl"):
            continue  # `unknown_to_kubectl` looks
        given = _renamed(command, names)
        wanted = [_pattern(_renamed(line, names)) for line in printed if not line.startswith(tuple(without))]
        give_up = time.monotonic() + within
        while missing := await _missing(given, wanted, admin, folder):
            assert time.monotonic() < give_up, (
                f"{given}\nprints no line like {missing[0]}\nbut\n{await _run(given, admin, folder)}"
            )
            await asyncio.sleep(0.3)


async def _missing(command: str, wanted: list[str], admin: str, folder: Path) -> list[str]:
    output = await _run(command, admin, folder)
    return [pattern for pattern in wanted if not re.search(pattern, output, re.MULTILINE)]


async def _run(command: str, admin: str, folder: Path) -> str:
    """Output and errors of a line of shell."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", command),
        cwd=folder,
        env={**os.environ, "PATH": path, "ADMIN": f"http://{admin}", "KUBECONFIG": "/dev/null"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return output.decode()


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for name, here in names.items():
        text = text.replace(name, here)
    return text


def _pattern(line: str) -> str:
    """Numbers may differ, and `…` stands for anything."""
    parts = [_WRITTEN.sub(lambda _: _NUMBER, re.escape(part)) for part in line.split("…")]
    return ".*".join(parts)
