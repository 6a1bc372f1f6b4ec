"""The reading models on a real Triton, and gateways with the shipped config over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from v2_gateways import gateway_of

from gateway.app import Gateway
from gateway.config import load

CHECKOUT = Path(__file__).parents[2]
REPOSITORY = CHECKOUT / "model_repository"
PAGES = CHECKOUT / "tests/data/reading"
MODELS = ("ocr_detection", "ocr_direction", "ocr_recognition")


def reading_gateway(folder: Path, *endpoints: str, least_short_side: int = 736, **fan_out: Any) -> Gateway:
    """A gateway with deploy/examples/reading.yaml.

    least_short_side: pixels that the detector sees at least; a page takes it the less time the fewer.
    fan_out:          what is changed in the pipeline's fan-out.
    """
    text = (CHECKOUT / "deploy/examples/reading.yaml").read_text("utf-8")
    config = yaml.safe_load(text.replace("../../model_repository", str(REPOSITORY)))
    config["upstreams"]["local"]["endpoints"] = list(endpoints)
    steps = config["models"]["page-text"]["pipeline"]["steps"]
    steps[0]["with"] = {"least_short_side": least_short_side}
    (part,) = [part["fan_out"] for part in steps if "fan_out" in part]
    part.update(fan_out)
    quiet = {"telemetry": {"access_log": {"destination": "none"}}}
    config |= {"listen": "127.0.0.1:0", "admin": {"listen": "127.0.0.1:0"}, **quiet}
    file = folder / "gateway.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    return gateway_of(load(file, {}))
