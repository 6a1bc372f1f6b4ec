"""Magika: the network is taken as it is; its rules become one small JSON file beside the labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MODEL = "magika/models/standard_v3_3"
_KNOWLEDGE = "magika/config/content_types_kb.min.json"
_BY_RULE = ("empty", "txt", "unknown")
"""Answers that the rules give without the network."""


def build(wheel: Path) -> bytes:
    """The ONNX model: `bytes` INT32 [batch, 2048] → `target_label` FP32 [batch, 214], probabilities.

    wheel:  the folder with the unpacked `sources.MAGIKA`.
    """
    return (wheel / _MODEL / "model.onnx").read_bytes()


def labels(wheel: Path) -> list[str]:
    """The labels in the order of the network's output."""
    return [str(label) for label in _config(wheel)["target_labels_space"]]


def content_types(wheel: Path) -> dict[str, Any]:
    """The constants of pre- and post-processing, and what is known of each label that can come out.

    The keys are described in `model_repository/README.md`, section magika. Values are whatever JSON the package has.
    """
    config = _config(wheel)
    knowledge = json.loads((wheel / _KNOWLEDGE).read_text(encoding="utf-8"))
    known = sorted({*labels(wheel), *config["overwrite_map"].values(), *_BY_RULE})
    return {
        "begin_size": config["beg_size"],
        "end_size": config["end_size"],
        "block_size": config["block_size"],
        "padding": config["padding_token"],
        "min_file_size": config["min_file_size_for_dl"],
        "medium_confidence_threshold": config["medium_confidence_threshold"],
        "thresholds": config["thresholds"],
        "overwrite_map": config["overwrite_map"],
        "types": {label: knowledge[label] for label in known},
    }


def _config(wheel: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((wheel / _MODEL / "config.min.json").read_text(encoding="utf-8"))
    return config
