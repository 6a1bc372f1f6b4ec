"""What the kubelet makes of a container, as a shell can play it: its command, its environment, volumes as folders."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Container = Mapping[str, Any]


def environment(container: Container) -> dict[str, str]:
    """The variables with plain values."""
    return {each["name"]: each["value"] for each in container.get("env", ()) if "value" in each}


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` as Kubernetes expands it in commands and arguments."""
    return re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1], found[0]), text)


def mounts(container: Container, volumes: Mapping[str, Path]) -> dict[str, Path]:
    """Path in the container → folder here."""
    return {each["mountPath"]: volumes[each["name"]] for each in container.get("volumeMounts", ())}


def inside(text: str, paths: Mapping[str, Path]) -> str:
    """A text in which each path of the container is the folder that stands for it."""
    if not paths:
        return text
    longest_first = "|".join(re.escape(path) for path in sorted(paths, key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])({longest_first})(?![\w-])", lambda found: str(paths[found[1]]), text)


def run(
    container: Container,
    paths: Mapping[str, Path],
    *,
    environ: Mapping[str, str] | None = None,
    timeout: float = 200,
) -> subprocess.CompletedProcess[str]:
    """Run a container's command to its end.

    paths:    what is mounted in it and what of its image it uses.
    environ:  more variables, and other values for those of the manifest.
    """
    variables = {name: inside(value, paths) for name, value in environment(container).items()}
    words = [inside(expanded(word, variables), paths) for word in (*container["command"], *container.get("args", ()))]
    return subprocess.run(
        words,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables, **(environ or {})},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
