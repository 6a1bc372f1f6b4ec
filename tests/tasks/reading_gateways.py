"""The reading models on a real Triton, and gateways with the shipped config over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from task_models import CHECKOUT, example, written
from v2_gateways import gateway_of

from gateway.app import Gateway
from gateway.config import load

REPOSITORY = CHECKOUT / "model_repository"
PAGES = CHECKOUT / "tests/data/reading"
MODELS = ("ocr_detection", "ocr_direction", "ocr_recognition")


def reading_gateway(folder: Path, *endpoints: str, least_short_side: int = 736, **fan_out: Any) -> Gateway:
    """A gateway with deploy/examples/reading.yaml.

    least_short_side: pixels that the detector sees at least; a page takes it the less time the fewer.
    fan_out:          what is changed in the pipeline's fan-out.
    """
    config = example("reading", REPOSITORY, *endpoints)
    steps = config["models"]["page-text"]["pipeline"]["steps"]
    steps[0]["with"] = {"least_short_side": least_short_side}
    (part,) = [part["fan_out"] for part in steps if "fan_out" in part]
    part.update(fan_out)
    return gateway_of(load(written(folder, config), {}))
