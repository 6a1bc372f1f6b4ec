"""The built models say what they are known to say, with the plainest pre- and post-processing, written out here."""

from __future__ import annotations

import base64
import json
import unicodedata
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gateway.artifacts import fetch
from gateway.models import measure
from gateway.models.pictures import CALIBRATION, calibration_inputs, picture, sample_photo, to_input
from gateway.models.sources import PICTURES

Golden = dict[str, list[dict[str, Any]]]


def _labels(repository: Path, model: str) -> list[str]:
    return (repository / model / "labels.txt").read_text(encoding="utf-8").splitlines()


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def _input(case: dict[str, Any]) -> bytes:
    return base64.b64decode(case["data"]) * case["repeat"]


# Images


@pytest.mark.parametrize("model", ["efficientnet_lite0_onnx", "efficientnet_lite0_onnx_int8"])
@pytest.mark.parametrize(
    ("name", "labels", "score"),
    [
        ("coffee.png", {"espresso"}, 0.9),
        ("chelsea.png", {"tiger cat", "Egyptian cat", "tabby"}, 0.3),
        ("rocket.jpg", {"missile"}, 0.2),
    ],
)
def test_known_pictures_get_their_known_labels(
    repository: Path, model: str, name: str, labels: set[str], score: float
) -> None:
    inputs = to_input(picture(fetch(PICTURES), name))[None]
    probabilities = _softmax(measure.scores(repository / model / "1/model.onnx", inputs)[0])
    best = int(probabilities.argmax())
    assert _labels(repository, model)[best] in labels
    assert probabilities[best] > score


def test_int8_agrees_with_fp32_on_photos_it_has_not_seen(repository: Path) -> None:
    """98 % of 200 views here; a little less is allowed to another CPU's rounding."""
    inputs, classes = measure.held_out()
    fp32, int8 = (
        measure.scores(repository / name / "1/model.onnx", inputs)
        for name in ("efficientnet_lite0_onnx", "efficientnet_lite0_onnx_int8")
    )
    assert (fp32.argmax(1) == int8.argmax(1)).mean() >= 0.95
    assert (int8.argmax(1) == classes).mean() >= (fp32.argmax(1) == classes).mean() - 0.03


def test_int8_is_less_than_a_third_of_fp32s_size(repository: Path) -> None:
    fp32, int8 = (
        (repository / name / "1/model.onnx").stat().st_size
        for name in ("efficientnet_lite0_onnx", "efficientnet_lite0_onnx_int8")
    )
    assert int8 * 3 < fp32


def test_the_sample_photo_is_a_jpeg_and_always_the_same() -> None:
    photo = sample_photo()
    assert photo == sample_photo()
    with Image.open(BytesIO(photo)) as image:
        assert (image.format, image.size) == ("JPEG", (600, 400))


def test_calibration_has_ten_views_of_each_picture() -> None:
    inputs = calibration_inputs(fetch(PICTURES))
    assert inputs.shape == (10 * len(CALIBRATION), 3, 224, 224)
    assert inputs.min() >= -1
    assert inputs.max() <= 1


# File types


def _tell_by_rule(data: bytes) -> str:
    try:
        data.decode()
    except UnicodeDecodeError:
        return "unknown"
    return "txt"


def _file_type(rules: dict[str, Any], labels: list[str], run: Any, data: bytes) -> tuple[str, float]:
    if not data:
        return "empty", 1.0
    block, padding = rules["block_size"], rules["padding"]
    begin = list(data[:block].lstrip()[: rules["begin_size"]])
    end = list(data[-block:].rstrip()[-rules["end_size"] :])
    if len(begin) < rules["min_file_size"]:
        return _tell_by_rule(data[:block]), 1.0
    begin += [padding] * (rules["begin_size"] - len(begin))
    end = [padding] * (rules["end_size"] - len(end)) + end
    probabilities = run(None, {"bytes": np.array([begin + end], np.int32)})[0][0]
    raw, score = labels[int(probabilities.argmax())], float(probabilities.max())
    label = rules["overwrite_map"].get(raw, raw)
    if score < rules["thresholds"].get(raw, rules["medium_confidence_threshold"]):
        label = "txt" if rules["types"][label]["is_text"] else "unknown"
    return label, score


def test_magika_answers_as_the_original_package(repository: Path, golden: Golden) -> None:
    rules = json.loads((repository / "magika/content_types.json").read_text(encoding="utf-8"))
    labels = _labels(repository, "magika")
    run = measure.session(repository / "magika/1/model.onnx", 2).run
    for case in golden["magika"]:
        label, score = _file_type(rules, labels, run, _input(case))
        assert label == case["label"], case["name"]
        assert score == pytest.approx(case["score"], abs=1e-4), case["name"]


# Languages


def _normalised(data: bytes) -> bytes:
    for trim in range(4):
        try:
            text = data[: len(data) - trim].decode()
        except UnicodeDecodeError as e:
            if e.start < len(data) - 3:
                return data
            continue
        return unicodedata.normalize("NFC", text.lower() if text.isupper() else text).encode()
    return data


def _text_inputs(tables: dict[str, list[int]], data: bytes) -> dict[str, NDArray[Any]]:
    text = _normalised(data)
    state, found = 0, Counter[int]()
    for byte in text:
        state = tables["next_state"][tables["row_base"][state] + byte]
        if tables["feature"][state] >= 0:
            found[tables["feature"][state]] += 1
    places = max(64, 1 << max(len(found) - 1, 0).bit_length())
    features, counts = np.zeros((1, places), np.int32), np.zeros((1, places), np.float32)
    features[0, : len(found)], counts[0, : len(found)] = list(found.keys()), list(found.values())
    return {"features": features, "counts": counts, "length": np.array([[len(text)]], np.int32)}


def test_langid_answers_as_the_original_package(repository: Path, golden: Golden) -> None:
    names = ("next_state", "row_base", "feature")
    tables: Any = {name: memoryview(np.load(repository / f"langid/1/{name}.npy")) for name in names}
    labels = _labels(repository, "langid")
    run = measure.session(repository / "langid/1/model.onnx", 1).run
    for case in golden["langid"]:
        probabilities = run(None, _text_inputs(tables, _input(case)))[0][0]
        best = int(probabilities.argmax())
        assert probabilities.sum() == pytest.approx(1, abs=1e-5)
        assert (labels[best] if probabilities[best] >= 0.05 else "und") == case["label"], case["name"]
        assert probabilities[best] == pytest.approx(case["score"], abs=1e-4), case["name"]
        for label, score in case["ranking"]:
            assert probabilities[labels.index(label)] == pytest.approx(score, abs=1e-4), case["name"]


def test_padding_and_company_in_a_batch_change_no_answer(repository: Path, golden: Golden) -> None:
    names = ("next_state", "row_base", "feature")
    tables: Any = {name: memoryview(np.load(repository / f"langid/1/{name}.npy")) for name in names}
    run = measure.session(repository / "langid/1/model.onnx", 1).run
    rows = [_text_inputs(tables, _input(case)) for case in golden["langid"] if case["repeat"] == 1]
    widest = max(row["features"].shape[1] for row in rows)
    pad = {"features": widest, "counts": widest, "length": 1}
    batch = {
        name: np.concatenate([np.pad(row[name], ((0, 0), (0, width - row[name].shape[1]))) for row in rows])
        for name, width in pad.items()
    }
    together = run(None, batch)[0]
    for row, answer in zip(rows, together, strict=True):
        np.testing.assert_allclose(run(None, row)[0][0], answer, atol=1e-5)
