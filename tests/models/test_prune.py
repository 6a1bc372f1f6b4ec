"""The pruned graph: fewer channels, the same contract, and answers that the remaining channels make up for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from gateway.artifacts import fetch
from gateway.models import pictures, sources
from gateway.models.prune import Floats, prune, surgeon

CHANNELS = 48


def _layer(seed: int) -> tuple[Floats, Floats]:
    """Weights of a layer with a bias, and samples of its inputs, of which the second half says what the first does."""
    random = np.random.default_rng(seed)
    first = random.normal(size=(4000, CHANNELS // 2))
    samples = np.column_stack([first, first * 2 + 1, np.ones(4000)])
    return random.normal(size=(8, CHANNELS + 1)), samples


def _output_lost(weights: Floats, samples: Floats, tolerance: float) -> tuple[int, float]:
    """How many inputs stay, and the share of the output's variance that is lost."""
    kept, narrow = surgeon(weights, samples.T @ samples / len(samples), tolerance)
    whole, cut = samples @ weights.T, samples[:, [*kept, CHANNELS]] @ narrow.T
    return len(kept), float(((whole - cut) ** 2).mean(0).sum() / whole.var(0).sum())


@pytest.mark.parametrize("seed", range(3))
def test_channels_that_others_can_stand_in_for_go_first(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.models.prune._RIDGE", 1e-9)
    kept, lost = _output_lost(*_layer(seed), tolerance=1e-6)
    assert kept == 32  # 24 would do, and channels are kept in sixteens
    assert lost < 1e-6


def test_what_is_lost_stays_within_the_tolerance() -> None:
    weights, samples = _layer(4)
    found = [_output_lost(weights, samples, tolerance) for tolerance in (0.0, 0.1, 0.3, 1.0)]
    assert found[0] == (CHANNELS, pytest.approx(0))
    assert [kept for kept, _ in found] == sorted((kept for kept, _ in found), reverse=True)
    assert all(lost <= tolerance for (_, lost), tolerance in zip(found, (1e-9, 0.1, 0.3, 1.0), strict=True))


def test_the_pruned_graph_is_smaller_and_answers_alike(repository: Path) -> None:
    whole = (repository / "efficientnet_lite0_onnx/1/model.onnx").read_bytes()
    inputs = pictures.calibration_inputs(fetch(sources.PICTURES))[::10]
    pruned = prune(whole, inputs, tolerance=0.05)
    assert 0.9 * len(whole) < len(pruned) < len(whole)
    before, after = onnx.load_from_string(whole).graph, onnx.load_from_string(pruned).graph
    assert [list(map(str, values)) for values in (after.input, after.output)] == [
        list(map(str, values)) for values in (before.input, before.output)
    ]
    assert [node.op_type for node in after.node] == [node.op_type for node in before.node]
    (expected,), (found,) = (
        onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"image": inputs[:6]})
        for model in (whole, pruned)
    )
    assert (expected.argmax(1) == found.argmax(1)).sum() >= 5
