"""A typed call, JPEG in and labels out, against a KServe transformer that does so in front of the same model.

And with shared memory against without: its decoding step then writes where the model reads.
"""

from __future__ import annotations

import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from io import BytesIO
from pathlib import Path

import grpc
import numpy as np
from PIL import Image
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from gateway.artifacts import cache_folder
from gateway.models.pictures import sample_photo
from gateway.v1 import classification_pb2, classification_pb2_grpc
from perf import gateways, models
from perf.bench import Keep, Miss, Say
from perf.children import Child, NotStarted
from perf.stack import Stack, System, until_ready
from perf.summary import KSERVE, Sample

PICTURE, PHONE = "picture", "phone"
TITLES = {
    PICTURE: "A JPEG of 600 × 400 in, five labels out, 4 clients",
    PHONE: "A JPEG of 4000 × 3000, as a phone takes it, in, five labels out, 4 clients",
}
KSERVE_VERSION = "0.21.0"
_CLIENTS = 4
_PINS = (f"kserve=={KSERVE_VERSION}", "Pillow>=11")
_MODEL = "transformed"

Call = Callable[[], object]


def measure(
    stack: Stack, ours: Sequence[System], rounds: int, seconds: float, keep: Keep, miss: Miss, say: Say
) -> None:
    """All in turn. The transformer has a virtual environment of its own in the cache, made the first time."""
    photos = {PICTURE: sample_photo(), PHONE: _phone_photo()}
    with ExitStack() as ended:
        systems: list[tuple[System, Callable[[str, bytes], Call]]] = [(gateway, _typed) for gateway in ours]
        try:
            systems.append((System(KSERVE, *_transformer(stack, ended, say)), _transformed))
        except (OSError, NotStarted) as error:
            miss(f"the KServe transformer: {error}")
        for number in range(rounds):
            for scenario, photo in photos.items():
                turn = number % len(systems)
                for system, make in (*systems[turn:], *systems[:turn]):
                    try:
                        sample = _sample(scenario, system, partial(make, system.address, photo), number, seconds)
                    except OSError as error:
                        miss(f"{scenario}, round {number + 1}: {error}")
                        continue
                    keep(sample)
                    say(f"round {number + 1}  {scenario}: {system.name} {sample.rate:,.0f}/s {sample.cpu:,.0f} µs")


def _phone_photo() -> bytes:
    """The same cup of coffee at 12 megapixels, with noise as a sensor makes it: 2.6 MB, as phones write."""
    with Image.open(BytesIO(sample_photo())) as small:
        large = small.crop((33, 0, 567, 400)).resize((4000, 3000), Image.Resampling.LANCZOS)
    noise = np.random.default_rng(0).normal(0, 6, (3000, 4000, 3))
    encoded = BytesIO()
    pixels = (np.asarray(large) + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def _sample(scenario: str, system: System, make: Callable[[], Call], number: int, seconds: float) -> Sample:
    """:raises OSError: if a call fails."""
    calls = [make() for _ in range(_CLIENTS)]
    with ThreadPoolExecutor(_CLIENTS) as clients:
        try:
            for _ in clients.map(lambda call: call(), calls):  # warms up
                pass
            before, until = system.cpu_seconds(), time.perf_counter() + seconds
            took = [each for many in clients.map(lambda call: _repeat(call, until), calls) for each in many]
        except (grpc.RpcError, InferenceServerException) as error:
            raise OSError(f"{system.name}: {error}") from error
    used = system.cpu_seconds() - before
    p50, p99 = (float(value) * 1e6 for value in np.percentile(took, [50, 99]))
    return Sample(scenario, system.name, number, len(took) / seconds, p50, p99, used / len(took) * 1e6)


def _repeat(call: Call, until: float) -> list[float]:
    """How long each call took, in seconds; at least one."""
    took: list[float] = []
    while not took or time.perf_counter() < until:
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return took


def _typed(address: str, photo: bytes) -> Call:
    stub = classification_pb2_grpc.ClassificationServiceStub(grpc.insecure_channel(address))
    request = classification_pb2.ClassifyRequest(model=gateways.PHOTO, image=photo)
    return lambda: stub.Classify(request)


def _transformed(address: str, photo: bytes) -> Call:
    client = InferenceServerClient(address)
    image = InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([photo], dtype=np.object_))
    return lambda: client.infer(_MODEL, [image])


def _transformer(stack: Stack, ended: ExitStack, say: Say) -> tuple[str, Child]:
    python = _environment(say)
    grpc_port, http_port = stack.ports.take(), stack.ports.take()
    command = [str(python), str(Path(__file__).with_name("kserve_transformer.py")), "--workers", "1"]
    command += ["--grpc_port", str(grpc_port), "--http_port", str(http_port)]
    command += ["--model_name", _MODEL, "--predictor_model", models.SCORES, "--predictor_host", stack.triton.address]
    command += ["--predictor_protocol", "grpc-v2"]
    child = ended.enter_context(Child(command, grpc_port, stack.work / "kserve.log"))
    until_ready(child.address, [_MODEL])
    return child.address, child


def _environment(say: Say) -> Path:
    """The Python of a virtual environment with KServe; not the project's, whose versions it would move."""
    folder = cache_folder() / f"kserve-{KSERVE_VERSION}-py3{sys.version_info.minor}"
    done = folder / "installed"
    if not done.exists():
        say(f"installing KServe {KSERVE_VERSION} in an environment of its own, once (450 MB)")
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        told = subprocess.run([*pip, *_PINS], capture_output=True, text=True, check=False)
        if told.returncode:
            raise OSError(told.stderr.strip().splitlines()[-1])
        done.touch()
    return folder / "bin" / "python"
