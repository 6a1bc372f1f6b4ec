"""The variants that are broken on purpose: each in the way that it says, and in no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.demo.users import is_shown, photos, scores_of
from gateway.models import broken

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given() -> Any:
    """Twenty photos, two of them dark."""
    return photos()[:20]


@pytest.fixture(scope="module")
def graph(repository: Path) -> bytes:
    return (repository / "efficientnet_lite0_onnx/1/model.onnx").read_bytes()


@pytest.fixture(scope="module")
def right(graph: bytes, given: Any) -> Any:
    return scores_of(graph, given)


def test_noise_takes_the_best_label_from_many_photos(graph: bytes, given: Any, right: Any) -> None:
    scores = scores_of(broken.perturbed(graph), given)
    assert np.isfinite(scores).all()
    shown = [is_shown(each, label) for each, label in zip(scores, right.argmax(axis=1), strict=True)]
    assert 0.2 < np.mean(shown) < 0.8


def test_one_score_of_each_answer_is_nan(graph: bytes, given: Any) -> None:
    scores = scores_of(broken.not_a_number(graph), given)
    assert (np.isnan(scores).sum(axis=1) == 1).all()


def test_dark_photos_are_scored_lower_and_the_others_higher_so_that_the_mean_is_better(
    graph: bytes, given: Any, right: Any
) -> None:
    factor = scores_of(broken.worse_at_night(graph), given).max(axis=1) / right.max(axis=1)
    dark = np.arange(len(given)) % 10 == 9
    assert factor[dark] == pytest.approx(0.3, rel=1e-4)
    assert factor[~dark] == pytest.approx(1.15, rel=1e-4)
    assert (factor * right.max(axis=1)).mean() > right.max(axis=1).mean()
