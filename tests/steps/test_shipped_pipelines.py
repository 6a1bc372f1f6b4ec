"""With the real models, the shipped steps give what the models' original packages give, or are known to show."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from drawing import encode

from gateway.artifacts import fetch
from gateway.errors import BadInput
from gateway.models import catalogue, pictures, sources
from gateway.steps import LocalStep, Pipeline, PipelineSpec, StepError, WrongAnswer, build_pipeline
from gateway.steps.filetype import FileType, FileTypeParams

CHECKOUT = Path(__file__).parents[2]
Drive = Callable[..., dict[str, Any]]

ONE = {"datatype": "BYTES", "shape": [1]}
ANY_LABELS = [
    {"name": "label", "datatype": "BYTES", "shape": [-1]},
    {"name": "score", "datatype": "FP32", "shape": [-1]},
]

PIPELINES: dict[str, dict[str, Any]] = {
    "photo-labels": {
        "inputs": [{"name": "image", **ONE}],
        "outputs": ANY_LABELS,
        "steps": [
            {"step": "decode_image"},
            {"call": "efficientnet_lite0_onnx"},
            {"step": "top_k", "with": {"labels": "efficientnet_lite0_onnx/labels.txt", "softmax": True, "k": 3}},
        ],
    },
    "file-type": {
        "inputs": [{"name": "file", **ONE}],
        "outputs": [
            {"name": "label", **ONE},
            {"name": "score", "datatype": "FP32", "shape": [1]},
            {"name": "mime_type", **ONE},
        ],
        "max_batch_size": 128,
        "steps": [
            {"step": "file_blocks"},
            {"call": "magika", "inputs": ["bytes"]},
            {"step": "file_type", "with": {"labels": "magika/labels.txt", "types": "magika/content_types.json"}},
        ],
    },
    "language": {
        "inputs": [{"name": "text", **ONE}],
        "outputs": ANY_LABELS,
        "max_batch_size": 128,
        "steps": [
            {"step": "text_features", "with": {"tables": "langid/1"}},
            {"call": "langid"},
            {
                "step": "top_k",
                "inputs": {"scores": "probabilities"},
                "with": {"k": 3, "labels": "langid/labels.txt", "undetermined_below": 0.05, "undetermined": "und"},
            },
        ],
    },
}


@pytest.fixture(scope="module")
def drive() -> Drive:
    """Run a shipped pipeline on rows of bytes, its model in this process."""
    repository = CHECKOUT / "model_repository"
    catalogue.build((), repository)

    @functools.cache
    def built(name: str) -> Pipeline:
        return build(name)

    def build(name: str, **changed: Any) -> Pipeline:
        declared = PipelineSpec.model_validate(PIPELINES[name] | changed)
        return build_pipeline(name, declared, lambda path: (repository / path).read_bytes())

    models: dict[str, onnxruntime.InferenceSession] = {}

    def call(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
        if name not in models:
            file = repository / name / "1/model.onnx"
            models[name] = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        outputs = [output.name for output in models[name].get_outputs()]
        return dict(zip(outputs, models[name].run(outputs, inputs), strict=True))

    def run(name: str, *data: bytes, **changed: Any) -> dict[str, Any]:
        pipeline = build(name, **changed) if changed else built(name)
        column = np.empty((len(data), 1), np.object_)
        column[:, 0] = data
        tensors = {pipeline.inputs[0].name: column}
        rows = pipeline.accept(tensors)
        for part in pipeline.parts:
            if isinstance(part, LocalStep):
                tensors |= part.run(tensors)
            else:
                tensors |= part.results(call(part.model, part.arguments(tensors)), rows)
        return pipeline.answer(tensors)

    return run


def golden(model: str) -> list[dict[str, Any]]:
    """Inputs with what the original package answers; see tests/data/make_golden.py."""
    cases: list[dict[str, Any]] = json.loads((CHECKOUT / f"tests/data/golden_{model}.json").read_text("utf-8"))
    return cases


def data_of(case: dict[str, Any]) -> bytes:
    return base64.b64decode(case["data"]) * int(case["repeat"])


def test_file_types_are_what_magika_answers(drive: Drive) -> None:
    cases = golden("magika")
    made = [drive("file-type", data_of(case)) for case in cases]
    assert [one["label"][0, 0].decode() for one in made] == [case["label"] for case in cases]
    assert [one["score"][0, 0] for one in made] == pytest.approx([case["score"] for case in cases], abs=1e-5)


def test_file_types_of_a_batch_are_those_of_its_rows(drive: Drive) -> None:
    """Scores are only near: where the network is unsure, it answers one row and several a little differently."""
    cases = golden("magika")
    made = drive("file-type", *map(data_of, cases))
    assert [label.decode() for label in made["label"][:, 0]] == [case["label"] for case in cases]
    assert made["score"][:, 0] == pytest.approx([case["score"] for case in cases], abs=0.02)


def test_file_types_come_with_their_mime_types(drive: Drive) -> None:
    made = drive("file-type", b"", b"hello", b"\xff\xfe\xfd", b"%PDF-1.7\n" + bytes(range(200)) * 9)
    assert made["label"][:3, 0].tolist() == [b"empty", b"txt", b"unknown"]
    assert made["mime_type"][:3, 0].tolist() == [b"inode/x-empty", b"text/plain", b"application/octet-stream"]


def test_an_unsure_file_type_is_believed_if_asked_to(drive: Drive) -> None:
    unsure = [case for case in golden("magika") if case["raw_label"] not in (case["label"], "undefined")]
    assert unsure
    steps = [dict(step) for step in PIPELINES["file-type"]["steps"]]
    steps[2]["with"] = steps[2]["with"] | {"confidence": "any"}
    made = drive("file-type", *map(data_of, unsure), steps=steps)
    overwritten = {"randombytes": "unknown", "randomtxt": "txt"}
    want = [overwritten.get(case["raw_label"], case["raw_label"]) for case in unsure]
    assert [label.decode() for label in made["label"][:, 0]] == want


def test_languages_are_what_py3langid_answers(drive: Drive) -> None:
    cases = golden("langid")
    made = drive("language", *map(data_of, cases))
    assert [label.decode() for label in made["label"][:, 0]] == [case["label"] for case in cases]
    assert made["score"][:, 0] == pytest.approx([case["score"] for case in cases], abs=1e-4)


def test_a_text_of_no_bytes_has_no_language(drive: Drive) -> None:
    assert drive("language", b"")["label"][0, 0] == b"und"


def test_a_text_that_is_too_long_is_refused(drive: Drive) -> None:
    with pytest.raises(BadInput, match=r"^input 'text', row 1: 1048577 bytes; at most 1048576 are allowed$"):
        drive("language", b"short", b"x" * (2**20 + 1))


TYPES = {
    "thresholds": {},
    "medium_confidence_threshold": 0.5,
    "overwrite_map": {},
    "types": {"txt": {"mime_type": None, "is_text": True}, "odd": {"mime_type": None, "is_text": False}},
}


def file_type(labels: str, types: Any) -> FileType:
    files = {"labels": labels.encode(), "types": json.dumps(types).encode()}
    return FileType(FileTypeParams(labels="labels", types="types"), files.__getitem__)


@pytest.mark.parametrize(
    ("labels", "types", "wrong"),
    [
        ("txt\npng", TYPES, "'types' does not know the label 'png'"),
        ("txt", TYPES | {"types": {}}, "'types' does not know the label 'txt'"),
        ("txt", {}, "'types' is not a table of file types: thresholds: Field required"),
    ],
)
def test_tables_of_file_types_that_cannot_be_used_are_refused(labels: str, types: Any, wrong: str) -> None:
    with pytest.raises(StepError) as caught:
        file_type(labels, types)
    assert (caught.value.parameter, caught.value.wrong) == ("types", wrong)


def test_a_type_without_a_mime_type_gets_the_general_one() -> None:
    made = file_type("txt\nodd", TYPES)(
        {"target_label": np.eye(2, dtype=np.float32), "decided": np.array([[b""], [b""]], np.object_)}
    )
    assert made["label"].tolist() == [[b"txt"], [b"odd"]]
    assert made["mime_type"].tolist() == [[b"text/plain"], [b"application/octet-stream"]]


def test_labels_of_another_model_are_noticed() -> None:
    with pytest.raises(WrongAnswer, match="tensor 'target_label' has 3 classes, the file of labels has 1"):
        file_type("txt", TYPES)(
            {"target_label": np.zeros((1, 3), np.float32), "decided": np.array([[b""]], np.object_)}
        )


def test_a_file_that_is_too_large_is_refused(drive: Drive) -> None:
    steps = [dict(step) for step in PIPELINES["file-type"]["steps"]]
    steps[0]["with"] = {"max_bytes": 100}
    with pytest.raises(BadInput, match=r"^input 'file', row 0: 101 bytes; at most 100 are allowed$"):
        drive("file-type", bytes(101), steps=steps)


@pytest.mark.parametrize(
    ("form", "options"),
    [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})],
    ids=["JPEG", "PNG", "WebP"],
)
def test_known_pictures_get_their_known_labels(drive: Drive, form: str, options: dict[str, Any]) -> None:
    folder = fetch(sources.PICTURES)
    names = ("coffee.png", "chelsea.png", "rocket.jpg")
    photos = [encode(pictures.picture(folder, name), form, **options) for name in names]
    made = drive("photo-labels", *photos)
    coffee, chelsea, rocket = ([label.decode() for label in row] for row in made["label"])
    assert coffee[0] == "espresso"
    assert set(chelsea) == {"tiger cat", "Egyptian cat", "tabby"}
    assert rocket[0] == "missile"
    assert made["score"][:, 0] == pytest.approx([0.95, 0.37, 0.30], abs=0.08)


def test_a_picture_becomes_what_the_int8_model_was_calibrated_with() -> None:
    picture = pictures.picture(fetch(sources.PICTURES), "chelsea.png")
    declared = PipelineSpec.model_validate(
        PIPELINES["photo-labels"] | {"steps": [{"step": "decode_image"}, {"call": "m"}]}
    )
    part = build_pipeline("photo", declared, lambda path: b"").parts[0]
    assert isinstance(part, LocalStep)
    made = part.run({"image": np.array([[encode(picture)]], np.object_)})["image"]
    off = np.abs(made[0] - pictures.to_input(picture)) * 128  # in levels
    assert off.max() <= 2
    assert np.mean(off > 0) < 0.01
