"""Tutorials do what they show: their files are written, their commands run in order, and what they print is compared.

In a page, a block of YAML, Python or JavaScript whose first line is a comment with a file's name is that file, and a
block of `sh` is commands. A block without a language right after that is what they print, where `…` stands for
anything. What serves is left running.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator
from importlib.metadata import metadata
from pathlib import Path

import pytest
from command_line import Command, command, free_address
from test_documentation import PAGES, blocks, name_of
from traffic import until

from gateway.models import catalogue

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?:#|//) ([\w-]+\.\w+)\n")
SERVES = re.compile(r"inference-gateway (serve|triton start)\b")
UP = {"serve": "serving gRPC on", "triton start": "Ctrl-C stops it"}
PORTS = {"9001": "GATEWAY_LISTEN", "9002": "GATEWAY_ADMIN_LISTEN", "8001": "TRITON_ENDPOINT"}
"""Those that pages name, and the variable that moves each."""
GRPC_JS = ROOT / ".venv" / "grpc-js" / "node_modules"
LEFT_OUT = ("grpcurl", *(() if (GRPC_JS / "@grpc" / "proto-loader").exists() else ("node",)))
"""Commands that are on few machines; `make test` installs what those of JavaScript need, where npm is."""
INSTALLS = re.compile(r"^python3 -m pip install '\.\[([\w,]+)\]'.*\n", re.MULTILINE)


class Reader:
    """Does what a page says, in a folder, on other ports."""

    def __init__(self, folder: Path, servers: contextlib.AsyncExitStack) -> None:
        self.folder = self._cwd = folder
        self._servers = servers
        self._gateway: Command | None = None
        self._has_triton = False
        self._ports: dict[str, str] = {}
        for port in PORTS:
            while (free := free_address().rpartition(":")[2]) in self._ports.values():
                pass  # a port that was free a moment ago, and may be given again
            self._ports[port] = free
        self._environ = {
            **{PORTS[port]: f"127.0.0.1:{other}" for port, other in self._ports.items()},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "NODE_PATH": str(GRPC_JS),
            "PYTEST_ADDOPTS": "-p no:cloudcoil -p no:cacheprovider",
            "MYPY_CACHE_DIR": os.devnull,
        }

    def moved(self, text: str) -> str:
        return re.sub(r"(127\.0\.0\.1|localhost):(\d+)", lambda m: f"{m[1]}:{self._ports.get(m[2], m[2])}", text)

    async def follow(self, text: str) -> int:
        """How many commands were run."""
        ran = 0
        blocks = list(BLOCK.finditer(text))
        for block, then in zip(blocks, [*blocks[1:], None], strict=True):
            content = self.moved(block[2])
            if name := FILE.match(content):
                (self._cwd / name[1]).write_text(content, encoding="utf-8")
            elif block[1] == "sh" and not content.startswith(LEFT_OUT):
                ran += 1
                is_output = then is not None and then[1] == "" and not text[block.end() : then.start()].strip()
                await self._do(content, self.moved(then[2]) if then and is_output else None)
        return ran

    async def _do(self, script: str, wanted: str | None) -> None:
        before = self._follows()
        for extras in INSTALLS.findall(script):  # as the environment of the tests has them
            assert set(extras.split(",")) <= set(metadata("inference-gateway").get_all("Provides-Extra", []))
        script = INSTALLS.sub("", script)
        lines: list[str] = []
        for line in script.splitlines():
            if serves := SERVES.match(line):
                await self._run("\n".join(lines))
                await self._serve(line, serves[1])
                lines.clear()
            else:
                lines.append(line)
        commands = "\n".join(lines)
        printed = await self._run(commands)
        if wanted is not None:
            for _ in range(40):  # what a gateway has counted is in the store within a second or two
                if is_as_shown(printed, wanted) or "experiment" not in commands:
                    break
                await asyncio.sleep(0.5)
                printed = await self._run(commands)
            assert is_as_shown(printed, wanted), f"$ {commands}\n{printed}\n-- in place of --\n{wanted}"
        await self._until_followed(before)

    async def _run(self, script: str) -> str:
        """Run it as one shell does that stays where `cd` led."""
        done = await asyncio.to_thread(
            subprocess.run,
            ["bash", "-ec", f"{script}\npwd > {shlex.quote(str(self.folder / '.cwd'))}"],
            cwd=self._cwd,
            env={**os.environ, **self._environ},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, f"$ {script}\n{done.stdout}{done.stderr}"
        self._cwd = Path((self.folder / ".cwd").read_text().strip())
        return done.stdout

    async def _serve(self, line: str, what: str) -> None:
        arguments = shlex.split(line.rstrip(" &"), comments=True)[1:]
        if what == "triton start":
            others = [free_address().rpartition(":")[2] for _ in "hm"]
            arguments += ["--grpc-port", self._ports["8001"], "--http-port", others[0], "--metrics-port", others[1]]
            catalogue.build(re.findall(r"--model (\S+)", line), ROOT / "model_repository")
        running = await self._servers.enter_async_context(
            command(*arguments, folder=self.folder, cwd=self._cwd, environ=self._environ)
        )
        await running.until_said(UP[what], 60)
        if what == "serve":
            self._gateway = running
            if self._has_triton:
                await running.until_said(r"endpoint \S+ is ready", 30)
        self._has_triton = what == "triton start"

    def _follows(self) -> tuple[int, list[bytes]]:
        """How many configs the gateway has taken over, and what the configs are."""
        taken = self._gateway.errors.count("is in force") if self._gateway else 0
        return taken, [file.read_bytes() for file in sorted(self._cwd.glob("*.yaml"))]

    async def _until_followed(self, before: tuple[int, list[bytes]]) -> None:
        """Wait until the gateway has taken over what a command has changed."""
        if self._gateway and self._follows()[1] != before[1]:
            await until(lambda: self._follows()[0] > before[0], 30, "the new config", lambda: self._gateway.errors)


def is_as_shown(printed: str, wanted: str) -> bool:
    pattern = "\n".join(re.escape(line.rstrip()).replace("…", ".*") for line in wanted.strip().splitlines())
    return re.fullmatch(pattern, "\n".join(line.rstrip() for line in printed.strip().splitlines())) is not None


def section(page: str, title: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0] if title else text


TUTORIALS = {
    "a first A/B": ("docs/first-ab.md", "", 10),
    "files that are judged": ("docs/experiments.md", "First steps", 1),
    "recommendations": ("docs/tasks/recommend.md", "", 2),
    "translations": ("docs/tasks/translate.md", "", 2),
    "reading": ("docs/tasks/reading.md", "", 2),
    "a voice assistant": ("docs/tasks/voice.md", "", 3),
    "a step of one's own": ("docs/steps/README.md", "Begin", 2),
}

MODELS = ("efficientnet_lite0_onnx", "efficientnet_lite0_onnx_int8", "langid", "magika")
DEMO = f"""
```sh
inference-gateway triton start {" ".join(f"--model {model}" for model in MODELS)} &
inference-gateway serve --config deploy/examples/demo.yaml &
python -c 'from gateway.models import pictures; open("photo.jpg", "wb").write(pictures.sample_photo())'
```
"""
CALLED = """
```sh
python labels.py
```

```
[[b'espresso' b'cup' …]] [[0.9… 0.0… …]]
```

```sh
node labels.js
```

```
[
  { name: 'espresso', score: 0.9… },
  { name: 'cup', score: 0.0… },
  { name: 'consomme', score: 0.0… }
] onnx
```
"""


@pytest.mark.parametrize(("page", "title", "commands"), TUTORIALS.values(), ids=TUTORIALS)
async def test_a_tutorial_does_what_it_shows(page: str, title: str, commands: int, tmp_path: Path) -> None:
    """With a real Triton of the demo's models: a quarter of a minute each, for this is what a newcomer does first."""
    async with reader_in(tmp_path) as reader:
        assert await reader.follow(section(page, title)) >= commands


async def test_the_clients_of_the_readme_get_labels_from_the_demo(tmp_path: Path) -> None:
    async with reader_in(tmp_path) as reader:
        await reader.follow(DEMO)
        assert await reader.follow(section("README.md", "Clients") + CALLED) >= 1


@contextlib.asynccontextmanager
async def reader_in(folder: Path) -> AsyncIterator[Reader]:
    for name in ("deploy", "model_repository", "protos", "tests"):  # as in the checkout, where files would stay
        (folder / name).symlink_to(ROOT / name)
    async with contextlib.AsyncExitStack() as servers:
        yield Reader(folder, servers)


ELSEWHERE = {
    "README.md": "tests/integration/test_demo.py",
    "deploy/systemd/README.md": "tests/deploy/test_systemd.py",
    "docs/clients.md": "tests/docs/test_clients.py",
    "docs/edge.md": "tests/faults/test_edge_config.py",
    "docs/experiments.md": "tests/store/test_in_gateway.py",
    "docs/metrics.md": "tests/forwarding/test_replay.py",
    "docs/operations.md": "tests/integration/test_incidents.py",
    "docs/rollouts.md": "tests/store/test_rollouts_in_gateway.py",
    "docs/security.md": "tests/fuzz/test_corpus.py",
    "docs/steps/README.md": "tests/docs/test_example_step.py",
}
"""Pages whose commands, or some of them, are run by another test."""
NEED_MORE = {
    *("deploy/docker/README.md", "deploy/helm/README.md", "deploy/kubernetes/README.md", "model_repository/README.md"),
    "perf/README.md",
}
"""Pages whose commands need containers, a cluster, or half an hour: README, "What was not run"."""


def test_every_page_with_commands_is_run_somewhere() -> None:
    pages = {name_of(page) for page in PAGES if any(True for _ in blocks(page, r"(?:sh|console|bash)"))}
    assert pages == {page for page, _, _ in TUTORIALS.values()} | {*ELSEWHERE, *NEED_MORE}
    assert not [test for test in ELSEWHERE.values() if not (ROOT / test).exists()]
