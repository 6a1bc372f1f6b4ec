"""I/O: `inference-gateway demo`: tasks on real models, by a local Triton behind a gateway.

`prepare` builds the models; `run` starts a local Triton and a gateway in this process, sends each task's input as a
client would, shows what came back as one table, and stays up.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.app import Gateway, Place
from gateway.config import Loaded, load
from gateway.demo.experiment import MODELS, ScenarioSettings, check_installed, play
from gateway.demo.tasks import BY_DEFAULT, EVERYTHING, TASKS, Shown, Site, Task, models_of
from gateway.errors import CommandFailed
from gateway.forwarding.messages import build_request, parse_response
from gateway.models.catalogue import State, build, find, state_of
from gateway.models.pictures import sample_photo
from gateway.steps import Read
from gateway.steps.image import DecodeImage, DecodeImageParams
from gateway.supervisor import reserve
from gateway.triton import LocalTriton, install
from gateway.triton.command import Signals
from gateway.v2.names import INFER

_WIDTH = 100  # columns
_PIPELINE, _MODEL = "photo-labels", "imagenet"


class DemoFailed(CommandFailed):
    """A task could not be shown; the text says why."""


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """The settings from the command line.

    config:  None is the one that serves the tasks.
    tasks:   what to show.
    given:   a file for the one task that is shown; None stands for the demo's own input.
    with_experiment:  after the table, the short version of `experiment`.
    """

    config: Path | None
    examples: Path
    repository: Path
    listen: str
    admin_listen: str
    once: bool
    tasks: tuple[Task, ...] = BY_DEFAULT
    given: Path | None = None
    with_experiment: bool = False

    def served_by(self) -> Path:
        """The config: that of the tasks if it is one, or else that of all."""
        configs = {task.config for task in self.tasks}
        return self.config or self.examples / (configs.pop() if len(configs) == 1 else EVERYTHING)

    def served(self) -> tuple[Task, ...]:
        """All tasks of that config, which is read as a whole, with the files that each of them needs."""
        if self.config is not None:
            return self.tasks
        configs = {task.config for task in self.tasks}
        return tuple(task for task in TASKS if task.config in configs)


class NoSuchTask(DemoFailed):
    """The command line names a task that there is not."""

    exit_code = 2


def tasks_of(name: str | None, *, every: bool) -> tuple[Task, ...]:
    """:raises NoSuchTask: if there is none of this name; the text says those that there are."""
    if name is None:
        return TASKS if every else BY_DEFAULT
    found = tuple(task for task in TASKS if task.name == name)
    if not found:
        raise NoSuchTask(f"There is no task {name!r}; tasks: {', '.join(task.name for task in TASKS)}.")
    return found


def prepare(settings: DemoSettings) -> None:
    """Do what takes long once: fetch the local Triton, build the models. Blocks; Ctrl-C ends it at any time.

    The ports, the input and the config are looked at first, so that what is wrong is reported before the downloads.

    :raises CannotServe: if a port is taken.
    :raises DemoFailed: if a task needs a package that is not installed.
    :raises NotAsExpected: if the experiment does.
    :raises LocalTritonError, FetchFailed, BuildFailed, OSError: if this host is unsuitable, or something can't be had.
    """
    for flag, address in (("--listen", settings.listen), ("--admin-listen", settings.admin_listen)):
        with reserve(address, flag):
            pass
    for file in (settings.given, settings.config):
        if file is not None:
            file.read_bytes()
    for task in settings.tasks:
        if task.package and importlib.util.find_spec(task.package) is None:
            raise DemoFailed(
                f"The task {task.name} needs {task.package}: pip install 'inference-gateway[tasks]', up to Python 3.12."
            )
    if settings.with_experiment:
        check_installed()
    console = Console(highlight=False, soft_wrap=True)
    install()
    models = list(dict.fromkeys([*models_of(settings.served()), *(MODELS if settings.with_experiment else ())]))
    if size := to_fetch(settings.served(), settings.repository):
        console.print(f"[dim]models:[/] up to {size / 1e6:.0f} MB to fetch, once")
    if not build(models, settings.repository, report=lambda line: console.print(f"[dim]models:[/] {escape(line)}")):
        console.print("[dim]models:[/] all built")


def to_fetch(tasks: Sequence[Task], repository: Path) -> int:
    """Bytes of the packages that the tasks' missing models are made of."""
    missing = [recipe for recipe in map(find, models_of(tasks)) if state_of(recipe, repository) is not State.BUILT]
    return sum(artifact.size for artifact in {artifact for recipe in missing for artifact in recipe.sources})


async def run(settings: DemoSettings) -> int:
    """Run the demo; the exit code. Errors that a user can mend are raised with a text that says how.

    :raises DemoFailed: if a task is answered with an error.
    :raises Stopped: if a signal ends it before all is up.
    """
    signals = Signals()
    with signals.heard():
        await _run(settings, signals)
    return 0


async def _run(settings: DemoSettings, signals: Signals) -> None:
    console = Console(highlight=False, width=_WIDTH)
    began = time.monotonic()
    console.print("[dim]triton:[/] starting on this host's CPU")
    async with LocalTriton(settings.repository, models=models_of(settings.tasks)) as triton:
        console.print(f"[dim]triton:[/] ready at {triton.grpc_address}")
        environ = {
            **os.environ,
            "TRITON_ENDPOINT": triton.grpc_address,
            "GATEWAY_LISTEN": settings.listen,
            "GATEWAY_ADMIN_LISTEN": settings.admin_listen,
        }

        def load_again() -> Loaded:
            return _without_access_log(load(settings.served_by(), environ))

        loaded = load_again()
        place = Place(loaded.config.admin.listen)
        async with Gateway(loaded, load_again, environ, place) as gateway:
            console.print(f"[dim]gateway:[/] ready at {gateway.listen} after {time.monotonic() - began:.1f} s\n")
            await _show(console, gateway.listen, settings)
            if not settings.once:
                await _stay_up(console, gateway, settings, asyncio.ensure_future(signals.wait(triton)))
                console.print("\ndraining")
            await gateway.drain()


async def _stay_up(console: Console, gateway: Gateway, settings: DemoSettings, asked: asyncio.Future[None]) -> None:
    """Until somebody asks to end it. asked: once that is so, or the local Triton has ended."""
    try:
        if settings.with_experiment:
            await _show_experiment(console, settings.repository, asked)
        if not asked.done():
            _say_what_to_try(console, gateway, settings)
        await asked
    finally:
        asked.cancel()


async def _show_experiment(console: Console, repository: Path, asked: asyncio.Future[None]) -> None:
    """Beside all that is up, on a Triton and a gateway of its own. What becomes of it ends nothing else."""
    console.print(
        "\n[bold]Last[/], INT8 goes live with evidence, and a variant that answers NaN is taken back: half a minute"
        "\non two free cores, and two at most. What is above serves meanwhile, until Ctrl-C.\n"
    )
    task = asyncio.ensure_future(play(ScenarioSettings(repository, "127.0.0.1:0", "127.0.0.1:0", True), console))
    try:
        await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(ended, CommandFailed | OSError):
        console.print(f"[yellow]experiment:[/] {escape(str(ended))}", soft_wrap=True)
        console.print("            A busy machine needs longer, for which [bold]make experiment[/] waits.")
    elif isinstance(ended, Exception):
        raise ended
    console.print()


def _without_access_log(loaded: Loaded) -> Loaded:
    """The demo's own output is on the terminal."""
    telemetry = loaded.config.telemetry
    log = telemetry.access_log.model_copy(update={"destination": "none"})
    config = loaded.config.model_copy(update={"telemetry": telemetry.model_copy(update={"access_log": log})})
    return replace(loaded, config=config)


async def _show(console: Console, address: str, settings: DemoSettings) -> None:
    """Send each task's input and print the answers, and how to see the tasks that are not shown."""
    table = Table(title=f"Sent to {address}", title_justify="left")
    for heading in ("task", "in", "out", "variant", "ms"):
        table.add_column(heading)
    async with grpc.aio.insecure_channel(address) as channel:
        site = Site(channel, settings.repository)
        for task in settings.tasks:
            given = await task.sample(site) if settings.given is None else settings.given.read_bytes()
            _add(table, task.name, await _asked(task, site, given))
            if task.pipeline == _PIPELINE and settings.given is None:
                _add(table, "", await asyncio.to_thread(_by_tritonclient, address, sample_photo()))
    for task in () if settings.given else TASKS:
        if task not in settings.tasks:
            size = to_fetch((task,), settings.repository)
            how = f"demo --task {task.name}" + (f"  ({size / 1e6:.0f} MB to fetch)" if size else "  (built)")
            table.add_row(task.name, task.takes, f"[dim]{how}[/]", "", "")
    console.print(table)


async def _asked(task: Task, site: Site, given: bytes) -> Shown:
    try:
        return await task.ask(site, given)
    except grpc.aio.AioRpcError as error:
        raise DemoFailed(f"The task {task.name} was answered {error.code().name}: {error.details()}") from error


def _add(table: Table, name: str, shown: Shown) -> None:
    table.add_row(
        name, escape(shown.given), escape(shown.answer), shown.variant, f"{shown.seconds * 1e3:.1f}", end_section=True
    )


def _pixels(photo: bytes) -> np.ndarray[Any, Any]:
    """The tensor that a client with its own pre-processing sends."""

    def no_files(name: str) -> bytes:
        raise OSError(f"decode_image reads no file, not even {name}")

    read: Read = no_files
    step = DecodeImage(DecodeImageParams(size=224, resize=256), read)
    item = np.empty((1, 1), np.object_)
    item[0, 0] = photo
    return step({"image": item})["image"]


def _by_tritonclient(address: str, photo: bytes) -> Shown:
    """Call as any client of Triton does, with the address of the gateway and a tensor that it made itself."""
    from tritonclient import grpc as triton  # noqa: PLC0415  (its import takes a while)

    pixels = _pixels(photo)
    with triton.InferenceServerClient(address) as client:
        image = triton.InferInput("image", list(pixels.shape), "FP32")
        image.set_data_from_numpy(pixels)
        top = triton.InferRequestedOutput("scores", class_count=3)  # Triton's own classification extension
        began = time.perf_counter()
        result = client.infer(_MODEL, [image], outputs=[top])
        took = time.perf_counter() - began
        rows = [text.decode().split(":") for text in result.as_numpy("scores").ravel()]
    with grpc.insecure_channel(address) as channel:
        method = channel.unary_unary(INFER)
        body, call = method.with_call(build_request(_MODEL, {"image": pixels}), timeout=10)
        parse_response(body)
        variants = [value for key, value in call.trailing_metadata() if key == "gateway-variant"]
    answer = "\n".join(f"{name} {float(score):.2f}" for score, _, name in rows)
    return Shown(
        "the same by tritonclient: its pixels as an\nFP32 tensor in, raw scores out", answer, str(*variants), took
    )


def _say_what_to_try(console: Console, gateway: Gateway, settings: DemoSettings) -> None:
    tasks = settings.tasks
    model = _MODEL if any(task.pipeline == _PIPELINE for task in tasks) else tasks[0].pipeline
    code = (
        f"import tritonclient.grpc as t; c = t.InferenceServerClient('{gateway.listen}'); "
        f"print(c.get_model_metadata('{model}'))"
    )
    console.print("[bold]own[/]  ", end="")
    console.print(f"inference-gateway demo --task {tasks[0].name} --input FILE", soft_wrap=True, markup=False)
    console.print("[bold]next[/] ", end="")
    what = "all of it: six variants" if settings.with_experiment else "INT8 goes live with evidence"
    console.print(f"make experiment   [dim]({what}; broken ones are taken back)[/]", soft_wrap=True)
    console.print("[bold]try[/]  ", end="")
    console.print(f'.venv/bin/python -c "{code}"', soft_wrap=True, markup=False)
    if model == _MODEL:
        console.print("[bold]load[/] ", end="")
        console.print(f"perf_analyzer -m {_MODEL} -u {gateway.listen} -i grpc --concurrency-range 4", soft_wrap=True)
    console.print(f"[bold]stop[/] Ctrl-C   [dim](state: http://{gateway.admin_address}/state)[/]", soft_wrap=True)
