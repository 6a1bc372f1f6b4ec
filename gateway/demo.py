"""I/O: `inference-gateway demo`: classifies a photo with a local Triton behind a gateway.

`prepare` builds the models; `run` starts a local Triton and a gateway in this process, sends a photo as a client would,
shows what came back, and stays up.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.app import Gateway, Place
from gateway.config import load
from gateway.forwarding.messages import build_request, parse_response
from gateway.models.catalogue import build
from gateway.models.pictures import sample_photo
from gateway.steps import Read
from gateway.steps.image import DecodeImage, DecodeImageParams
from gateway.supervisor import reserve
from gateway.triton import LocalTriton, install
from gateway.triton.command import Signals
from gateway.v1 import classification_pb2, classification_pb2_grpc
from gateway.v2.names import INFER

_PIPELINE, _MODEL = "photo-labels", "imagenet"


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """The settings from the command line."""

    config: Path
    repository: Path
    listen: str
    admin_listen: str
    once: bool


def prepare(settings: DemoSettings) -> None:
    """Do what takes long once: fetch the local Triton, build the models. Blocks; Ctrl-C ends it at any time.

    The ports are checked first, so that a port that is taken is reported before the downloads.

    :raises CannotServe: if a port is taken.
    :raises LocalTritonError, FetchFailed, BuildFailed, OSError: if this host is unsuitable, or something can't be had.
    """
    for flag, address in (("--listen", settings.listen), ("--admin-listen", settings.admin_listen)):
        with reserve(address, flag):
            pass
    console = Console(highlight=False, soft_wrap=True)
    install()
    if not build([], settings.repository, report=lambda line: console.print(f"[dim]models:[/] {escape(line)}")):
        console.print("[dim]models:[/] all built")


async def run(settings: DemoSettings) -> int:
    """Run the demo; the exit code. Errors that a user can mend are raised with a text that says how.

    :raises Stopped: if a signal ends it before all is up.
    """
    signals = Signals()
    with signals.heard():
        await _run(settings, signals)
    return 0


async def _run(settings: DemoSettings, signals: Signals) -> None:
    console = Console(highlight=False)
    began = time.monotonic()
    console.print("[dim]triton:[/] starting on this host's CPU")
    photo = await asyncio.to_thread(sample_photo)
    async with LocalTriton(settings.repository) as triton:
        console.print(f"[dim]triton:[/] ready at {triton.grpc_address}")
        environ = {
            **os.environ,
            "TRITON_ENDPOINT": triton.grpc_address,
            "GATEWAY_LISTEN": settings.listen,
            "GATEWAY_ADMIN_LISTEN": settings.admin_listen,
        }
        loaded = load(settings.config, environ)
        place = Place(loaded.config.admin.listen)
        async with Gateway(loaded, lambda: load(settings.config, environ), environ, place) as gateway:
            console.print(f"[dim]gateway:[/] ready at {gateway.listen} after {time.monotonic() - began:.1f} s\n")
            await _show(console, gateway.listen, photo)
            if not settings.once:
                _say_what_to_try(console, gateway)
                await signals.wait(triton)
                console.print("\ndraining")
            await gateway.drain()


async def _show(console: Console, address: str, photo: bytes) -> None:
    """Send the photo in both ways and print the answers."""
    table = Table(title=f"A photo ({len(photo) / 1000:.0f} kB JPEG) sent to {address}", title_justify="left")
    for heading in ("call", "labels", "variant", "version", "ms"):
        table.add_column(heading)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = classification_pb2_grpc.ClassificationServiceStub(channel)
        request = classification_pb2.ClassifyRequest(model=_PIPELINE, image=photo, max_labels=3)
        # The first call of all includes one-time work (the first run of a session); the second is what a user sees.
        await stub.Classify(request)
        answer, took = await _timed(stub.Classify(request))
        served, timings = answer.served, answer.served.timings
        parts = "\n".join(
            f"{shown} {getattr(timings, name).ToNanoseconds() / 1e6:.1f}"
            for name, shown in (("preprocess", "decode"), ("model", "model"), ("postprocess", "top-k"))
        )
        table.add_row(
            f"typed API\nClassify\n{_PIPELINE}",
            "\n".join(f"{label.name} {label.score:.2f}" for label in answer.labels),
            served.variant,
            served.model_version,
            f"{took * 1e3:.1f}\n{parts}",
        )
    scores, trailers, took = await asyncio.to_thread(_by_tritonclient, address, _pixels(photo))
    table.add_row(
        f"tritonclient\ninfer, FP32 tensor\n{_MODEL}, raw scores",
        "\n".join(scores),
        trailers.get("gateway-variant", ""),
        trailers.get("gateway-model-version", ""),
        f"{took * 1e3:.1f}",
    )
    console.print(table)
    console.print(f"[dim]answered by {served.endpoint}, attempts: {served.attempts}[/]\n")


async def _timed(call: Awaitable[Any]) -> tuple[Any, float]:
    """Any: a protobuf message."""
    began = time.perf_counter()
    return await call, time.perf_counter() - began


def _pixels(photo: bytes) -> np.ndarray[Any, Any]:
    """The tensor that a client with its own pre-processing sends."""

    def no_files(name: str) -> bytes:
        raise OSError(f"decode_image reads no file, not even {name}")

    read: Read = no_files
    step = DecodeImage(DecodeImageParams(size=224, resize=256), read)
    item = np.empty((1, 1), np.object_)
    item[0, 0] = photo
    return step({"image": item})["image"]


def _by_tritonclient(address: str, pixels: np.ndarray[Any, Any]) -> tuple[list[str], dict[str, str], float]:
    """Call as any client of Triton does, with the address of the gateway."""
    from tritonclient import grpc as triton  # noqa: PLC0415  (its import takes a while)

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
        trailers = {key: value for key, value in call.trailing_metadata() if isinstance(value, str)}
    return [f"{name} {float(score):.2f}" for score, _, name in rows], trailers, took


def _say_what_to_try(console: Console, gateway: Gateway) -> None:
    code = (
        f"import tritonclient.grpc as t; c = t.InferenceServerClient('{gateway.listen}'); "
        f"print(c.get_model_metadata('{_MODEL}'))"
    )
    console.print("[bold]try[/]  ", end="")
    console.print(f'.venv/bin/python -c "{code}"', soft_wrap=True, markup=False)
    console.print("[bold]load[/] ", end="")
    console.print(f"perf_analyzer -m {_MODEL} -u {gateway.listen} -i grpc --concurrency-range 4", soft_wrap=True)
    console.print(f"[bold]stop[/] Ctrl-C   [dim](state: http://{gateway.admin_address}/state)[/]", soft_wrap=True)
