"""Makes the pictures of the admin page, docs/page.png and docs/shift.gif, by the demo's models and a real Chromium.

Run it after a change of the page, for a quarter of an hour, since its plots have a point a minute:
`PYTHONPATH=tests/integration python tests/docs/pictures.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import math
import tempfile
import time
from pathlib import Path

import grpc
from browser import Browser, browser
from PIL import Image

from gateway.app import Gateway, Place
from gateway.config import Loaded, load
from gateway.models import catalogue
from gateway.models.pictures import sample_photo
from gateway.triton import LocalTriton
from gateway.v1 import classification_pb2, classification_pb2_grpc

ROOT = Path(__file__).parents[2]
MODELS = ("efficientnet_lite0_onnx", "efficientnet_lite0_onnx_int8")
CONFIG = """
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
telemetry: {{access_log: {{destination: none}}}}
upstreams: {{cpu: {{endpoints: ["{triton}"]}}}}
models:
  imagenet:
    variants:
      onnx: {{upstream: cpu, model: efficientnet_lite0_onnx}}
      int8: {{upstream: cpu, model: efficientnet_lite0_onnx_int8}}
    split: {{onnx: {onnx}, int8: {int8}}}
    sticky: {{metadata: x-user-id}}
  photo-labels:
    pipeline:
      inputs: [{{name: image, datatype: BYTES, shape: [1]}}]
      outputs: [{{name: label, datatype: BYTES, shape: [-1]}}, {{name: score, datatype: FP32, shape: [-1]}}]
      steps:
        - {{step: decode_image, with: {{size: 224, resize: 256}}}}
        - {{call: imagenet, inputs: [image], outputs: [scores]}}
        - {{step: top_k, with: {{k: 5, softmax: true, labels: {labels}}}}}
"""
LABELS = ROOT / "model_repository" / "efficientnet_lite0_onnx" / "labels.txt"
WIDTH = 1100  # of the window, in pixels
FRAMES, BEFORE, SECONDS = 14, 3, 5.0  # frames, those before the shift, and the time between two
PLOTTED = 6.5 * 60  # seconds before the frames, and after them, for the plots


async def main() -> None:
    catalogue.build(MODELS, ROOT / "model_repository")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with LocalTriton(ROOT / "model_repository", models=MODELS) as triton, browser(folder) as page:
            await picture(folder, triton.grpc_address, page)


async def picture(folder: Path, triton: str, page: Browser) -> None:
    file = folder / "gateway.yaml"

    def write(onnx: int) -> None:
        file.write_text(CONFIG.format(triton=triton, onnx=onnx, int8=100 - onnx, labels=LABELS))

    def again() -> Loaded:
        return load(file, {})

    write(90)
    async with Gateway(again(), again, {}, Place("127.0.0.1:0")) as gateway:
        caller = asyncio.ensure_future(call(gateway.listen))
        await page.resize(WIDTH, 900)
        await page.open(f"http://{gateway.admin_address}/")
        await asyncio.sleep(PLOTTED)
        frames = []
        for number in range(FRAMES):
            if number == BEFORE:
                write(50)
            await asyncio.sleep(SECONDS)
            frames.append(await shot(page, "document.getElementById('model-photo-labels')"))
        await asyncio.sleep(PLOTTED)
        (ROOT / "docs" / "page.png").write_bytes(small(Image.open(io.BytesIO(await page.screenshot()))))
        caller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await caller
    first, *others = frames
    kept = {
        "save_all": True,
        "append_images": others,
        "loop": 0,
        "duration": [700] * BEFORE + [500] * (len(others) - BEFORE) + [2500],
    }
    first.save(ROOT / "docs" / "shift.gif", optimize=True, **kept)


async def call(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = classification_pb2_grpc.ClassificationServiceStub(channel)
        request = classification_pb2.ClassifyRequest(model="photo-labels", image=sample_photo(), max_labels=1)
        for number in itertools.count():
            await stub.Classify(request, metadata=[("x-user-id", f"user-{number % 500}")], timeout=30)
            await asyncio.sleep(0.15 + 0.1 * math.sin(time.monotonic() / 60))  # more calls now, fewer then


async def shot(page: Browser, element: str) -> Image.Image:
    """What is shown of an element, as few colours as it has."""
    box = await page.run(
        f"const box = {element}.getBoundingClientRect(); return [box.x, box.y + window.scrollY, box.width, box.height]"
    )
    x, y, width, height = box
    whole = Image.open(io.BytesIO(await page.screenshot()))
    return whole.crop((int(x), int(y), int(x + width), int(y + height))).convert("RGB").quantize(64)


def small(image: Image.Image) -> bytes:
    written = io.BytesIO()
    image.convert("RGB").quantize(64).save(written, "PNG", optimize=True)
    return written.getvalue()


if __name__ == "__main__":
    asyncio.run(main())
