"""A pipeline is checked whole when it is built, and then does what it declares."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import encode, photo, png
from pydantic import Field, ValidationError

from gateway.errors import BadInput
from gateway.steps import (
    LocalStep,
    ModelCall,
    Params,
    Pipeline,
    PipelineError,
    PipelineSpec,
    Read,
    Step,
    StepFailed,
    TensorSpec,
    WrongAnswer,
    build_pipeline,
)
from gateway.steps.catalogue import SHIPPED

FILES = {"labels.txt": b"red\ngreen\nblue\n"}

PHOTO_LABELS: dict[str, Any] = {
    "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1]}],
    "outputs": [
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": "score", "datatype": "FP32", "shape": [-1]},
    ],
    "max_batch_size": 4,
    "steps": [
        {"step": "decode_image"},
        {"call": "colours"},
        {"step": "top_k", "with": {"k": 2, "labels": "labels.txt", "softmax": True}},
    ],
}


def read(path: str) -> bytes:
    try:
        return FILES[path]
    except KeyError:
        raise FileNotFoundError(2, "No such file or directory") from None


def build(**changes: Any) -> Pipeline:
    return build_pipeline("photo-labels", PipelineSpec.model_validate(PHOTO_LABELS | changes), read)


def findings(**changes: Any) -> list[str]:
    with pytest.raises(PipelineError) as caught:
        build(**changes)
    return [str(finding) for finding in caught.value.findings]


def colours(model: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A model: the mean of each channel."""
    assert model == "colours"
    return {"scores": inputs["image"].mean(axis=(2, 3))}


def run(pipeline: Pipeline, tensors: dict[str, Any], model: Any = colours) -> dict[str, Any]:
    """Drive a pipeline in the plainest way."""
    rows = pipeline.accept(tensors)
    for part in pipeline.parts:
        if isinstance(part, LocalStep):
            tensors = tensors | part.run(tensors)
        else:
            tensors = tensors | part.results(model(part.model, part.arguments(tensors)), rows)
    return pipeline.answer(tensors)


def column(*values: bytes) -> Any:
    array = np.empty((len(values), 1), np.object_)
    array[:, 0] = values
    return array


def filled(colour: str) -> bytes:
    picture = photo(64, 64)
    picture.paste(colour, (0, 0, 64, 64))
    return encode(picture)


def test_a_picture_goes_in_and_labels_come_out() -> None:
    made = run(build(), {"image": column(filled("red"), filled("blue"))})
    assert list(made) == ["label", "score"]
    assert made["label"][:, 0].tolist() == [b"red", b"blue"]
    assert made["score"].shape == (2, 2)


def test_it_says_which_models_it_calls() -> None:
    assert build().models == ("colours",)


def test_a_call_sends_what_the_part_before_made_and_asks_for_all() -> None:
    call = build().parts[1]
    assert call == ModelCall("colours", {"image": "image"}, {})
    assert isinstance(call, ModelCall)
    assert call.requested == ()


def test_tensors_can_be_renamed_on_the_way() -> None:
    steps = [
        {"step": "decode_image", "inputs": {"image": "photo"}, "outputs": {"image": "pixels"}},
        {"call": "colours", "inputs": {"image": "pixels"}, "outputs": {"scores": "means"}},
        {"step": "top_k", "inputs": {"scores": "means"}, "outputs": {"label": "colour"}},
    ]
    pipeline = build(
        inputs=[{"name": "photo", "datatype": "BYTES", "shape": [1]}],
        outputs=[
            {"name": "colour", "datatype": "BYTES", "shape": [-1]},
            {"name": "photo", "datatype": "BYTES", "shape": [1]},
        ],
        steps=steps,
    )
    red = filled("red")
    made = run(pipeline, {"photo": column(red)})
    assert made["colour"].tolist() == [[b"0", b"1", b"2"]]
    assert made["photo"].tolist() == [[red]]
    with pytest.raises(BadInput, match=r"^input 'photo', row 0: empty$"):
        run(pipeline, {"photo": column(b"")})


def test_rows_can_be_made_on_several_threads() -> None:
    part = build().parts[0]
    assert isinstance(part, LocalStep)
    tensors = {"image": column(*(encode(photo(300 + n, 256)) for n in range(4)))}
    work = part.start(tensors, most=3)
    assert len(work.tasks) == 3
    with concurrent.futures.ThreadPoolExecutor() as threads:
        for done in [threads.submit(task) for task in work.tasks]:
            done.result()
    assert np.array_equal(work.result()["image"], part.run(tensors)["image"])


def test_a_row_that_fails_on_a_thread_is_named_as_in_the_request() -> None:
    part = build().parts[0]
    assert isinstance(part, LocalStep)
    work = part.start({"image": column(filled("red"), filled("red"), png(50_000, 50_000))}, most=3)
    with pytest.raises(BadInput, match=r"^input 'image', row 2: 50000x50000 = 2500000000 pixels; at most"):
        [task() for task in work.tasks]


def test_a_model_may_replace_any_tensor() -> None:
    steps = [{"call": "thumbnails"}, {"step": "softmax", "inputs": {"scores": "image"}}, STEPS[2]]
    assert build(steps=steps).models == ("thumbnails",)


REFUSED = {
    "missing": ({}, "input 'image' is missing; 'photo-labels' takes image"),
    "unknown": ({"image": column(b""), "mask": column(b"")}, "input 'mask' is unknown; 'photo-labels' takes image"),
    "no rows": ({"image": column()}, "input 'image': 0 rows; 'photo-labels' takes 1 to 4"),
    "many rows": ({"image": column(*[b""] * 5)}, "input 'image': 5 rows; 'photo-labels' takes 1 to 4"),
    "no batch axis": ({"image": column(b"")[0]}, "input 'image': expected BYTES [rows, 1], got BYTES [1]"),
    "datatype": ({"image": np.zeros((1, 1), np.uint8)}, "input 'image': expected BYTES [rows, 1], got UINT8 [1, 1]"),
    "two a row": ({"image": column(b"", b"").T}, "input 'image': expected BYTES [rows, 1], got BYTES [1, 2]"),
    "a scalar": ({"image": np.array(1)}, "input 'image': expected BYTES [rows, 1], got INT64 []"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_as_declared_is_refused(name: str) -> None:
    tensors, text = REFUSED[name]
    with pytest.raises(BadInput) as caught:
        build().accept(tensors)
    assert caught.value.text == text


def test_all_inputs_have_the_same_number_of_rows() -> None:
    inputs = [{"name": name, "datatype": "FP32", "shape": []} for name in ("a", "b")]
    outputs = [{"name": "c", "datatype": "FP32", "shape": []}]
    pipeline = build(inputs=inputs, outputs=outputs, steps=[{"call": "colours"}])
    with pytest.raises(BadInput, match="input 'b' has 1 rows, 'a' has 2"):
        pipeline.accept({"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)})


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({}, "step 'top_k' needs a tensor 'scores', which no model answered"),
        ({"scores": np.zeros((1, 3))}, "step 'top_k' needs 'scores' as FP32 [-1] a row, got FP64 [1, 3]"),
        (
            {"scores": np.zeros((1, 3, 1), np.float32)},
            "step 'top_k' needs 'scores' as FP32 [-1] a row, got FP32 [1, 3, 1]",
        ),
        ({"scores": np.zeros((2, 3), np.float32)}, "'colours' answered 'scores' as FP32 [2, 3] to 1 rows"),
        ({"scores": np.zeros((1, 4), np.float32)}, "tensor 'scores' has 4 classes, the file of labels has 3"),
    ],
)
def test_a_model_that_answers_something_else_is_not_the_callers_fault(answer: dict[str, Any], text: str) -> None:
    with pytest.raises(WrongAnswer) as caught:
        run(build(), {"image": column(filled("red"))}, lambda model, inputs: answer)
    assert caught.value.text == text


def test_an_output_that_was_asked_for_must_be_answered() -> None:
    steps = [*PHOTO_LABELS["steps"]]
    steps[1] = {"call": "colours", "outputs": ["scores"]}
    with pytest.raises(WrongAnswer, match="'colours' did not answer the output 'scores'; it has points"):
        run(build(steps=steps), {"image": column(filled("red"))}, lambda m, i: {"points": np.zeros((1, 3), np.float32)})


STEPS = PHOTO_LABELS["steps"]
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown step": (
        {"steps": [{"step": "decode_imgae"}, *STEPS[1:]]},
        [
            f"steps.0.step: unknown step 'decode_imgae'; known: {', '.join(sorted(SHIPPED))} "
            "(did you mean 'decode_image'?)",
        ],
    ),
    "an unknown parameter": (
        {"steps": [*STEPS[:2], {"step": "top_k", "with": {"kk": 3}}]},
        [
            "steps.2.with.kk: unknown parameter 'kk'; known: k, labels, softmax, undetermined_below, undetermined "
            "(did you mean 'k'?)"
        ],
    ),
    "values out of range, all at once": (
        {"steps": [{"step": "decode_image", "with": {"size": 7, "layout": "CHWN"}}, *STEPS[1:]]},
        [
            "steps.0.with.size: Input should be greater than or equal to 8",
            "steps.0.with.layout: Input should be 'NCHW' or 'NHWC'",
        ],
    ),
    "a value in none of its forms": (
        {"steps": [{"step": "decode_image", "with": {"mean": "grey"}}, *STEPS[1:]]},
        [
            "steps.0.with.mean: Input should be a valid number, unable to parse string as a number, "
            "or: Input should be a valid tuple",
        ],
    ),
    "parameters that contradict one another": (
        {"steps": [{"step": "decode_image", "with": {"size": 300}}, *STEPS[1:]], "inputs": PHOTO_LABELS["inputs"]},
        [
            "steps.0.with: resize (256) must be at least size (300)",
        ],
    ),
    "a missing file": (
        {"steps": [*STEPS[:2], {"step": "top_k", "with": {"labels": "lables.txt"}}]},
        ["steps.2.with.labels: step 'top_k': cannot read 'lables.txt': No such file or directory"],
    ),
    "a tensor that nothing makes": (
        {"steps": [STEPS[0], {"call": "colours", "outputs": ["logits"]}, STEPS[2]]},
        ["steps.2: step 'top_k' reads 'scores', which nothing before makes; there are: image, logits"],
    ),
    "a tensor of another type": (
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1]}]},
        ["steps.0: step 'decode_image' reads 'image' as BYTES [1] a row, but it is UINT8 [-1]"],
    ),
    "an output of another type": (
        {"outputs": [{"name": "label", "datatype": "BYTES", "shape": [1, 1]}]},
        ["outputs.0: the pipeline promises 'label' as BYTES [1, 1] a row, but it is BYTES [-1]"],
    ),
    "an output that nothing makes": (
        {
            "outputs": [{"name": "lable", "datatype": "BYTES", "shape": [-1]}],
            "steps": [STEPS[0], {"call": "c", "outputs": ["label"]}],
        },
        [
            "outputs.0: the pipeline promises 'lable', which nothing before makes; there are: image, label "
            "(did you mean 'label'?)"
        ],
    ),
    "a rename of what the step has not": (
        {"steps": [{"step": "decode_image", "outputs": {"pixels": "p"}}, *STEPS[1:]]},
        ["steps.0.outputs.pixels: step 'decode_image' has no tensor 'pixels'; known: image"],
    ),
    "a call of which it is not known what it sends": (
        {"steps": [STEPS[0], {"call": "a"}, {"call": "b"}, STEPS[2]]},
        ["steps.2: call of 'b': not known what to send it; name them: inputs: [...]"],
    ),
    "two tensors of one name": (
        {"inputs": PHOTO_LABELS["inputs"] * 2, "outputs": PHOTO_LABELS["outputs"][:1] * 2},
        [
            "inputs.1.name: a second input 'image'; each name once",
            "outputs.1.name: a second output 'label'; each name once",
        ],
    ),
    "an input that nothing reads": (
        {"inputs": [*PHOTO_LABELS["inputs"], {"name": "mask", "datatype": "BYTES", "shape": [1]}]},
        ["inputs.1.name: nothing reads the input 'mask'; drop it, or use it"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_found_when_the_pipeline_is_built(name: str) -> None:
    changes, texts = WRONG[name]
    assert findings(**changes) == texts


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": []},
        {"steps": []},
        {"max_batch_size": 0},
        {"steps": [{"step": "softmax", "call": "colours"}]},
        {"steps": [{"with": {}}]},
        {"steps": [{"call": "colours", "with": {"k": 1}}]},
        {"inputs": [{"name": "x", "datatype": "BF16", "shape": [1]}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [0]}]},
        {"inputs": [{"name": "x", "datatype": "STRING", "shape": [1]}]},
        {"stpes": []},
    ],
)
def test_a_declaration_of_the_wrong_form_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PipelineSpec.model_validate(PHOTO_LABELS | changes)


class InvertParams(Params):
    of: float = Field(default=1.0, description="What values are taken from.")


class Invert(Step[InvertParams]):
    """A user's step."""

    params_type = InvertParams

    def __init__(self, params: InvertParams, read: Read) -> None:
        self.reads = self.writes = (TensorSpec("scores", "FP32", (-1,)),)
        self._of = np.float32(params.of)

    def __call__(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {"scores": self._of - tensors["scores"]}


class Broken(Invert):
    def __init__(self, params: InvertParams, read: Read) -> None:
        super().__init__(params, read)
        print(1 / 0)


class Forgetful(Invert):
    def __call__(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def test_a_users_step_is_found_by_module_and_attribute() -> None:
    steps = [*STEPS[:2], {"step": f"{__name__}:Invert", "with": {"of": 0}}, STEPS[2]]
    made = run(build(steps=steps), {"image": column(filled("red"))})
    assert b"red" not in made["label"][0]


def test_a_users_step_is_found_by_entry_point(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "invert-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: invert\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[inference_gateway.steps]\ninvert = {__name__}:Invert\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert build(steps=[*STEPS[:2], {"step": "invert"}, STEPS[2]]).parts[2].name == "invert"
    assert "invert, line_pixels" in findings(steps=[*STEPS[:2], {"step": "inverse"}, STEPS[2]])[0]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("nowhere.to.be:found", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("collections:Nothing", "cannot be imported: AttributeError: module 'collections' has no attribute 'Nothing'"),
        ("collections:OrderedDict", "is not a step"),
        ("gateway.steps:Step", "is not a step"),
    ],
)
def test_a_users_step_that_is_none_is_a_finding(name: str, wrong: str) -> None:
    right = "a subclass of gateway.steps.Step or SplitStep, as module:attribute, with params_type set"
    assert findings(steps=[*STEPS[:2], {"step": name}, STEPS[2]]) == [f"steps.2.step: step '{name}' {wrong}; {right}"]


def test_a_users_step_that_cannot_be_built_is_a_finding() -> None:
    name = f"{__name__}:Broken"
    found = findings(steps=[*STEPS[:2], {"step": name}, STEPS[2]])
    assert found == [f"steps.2.step: step '{name}' cannot be built: ZeroDivisionError: division by zero"]


def test_a_users_step_that_makes_something_else_than_it_declares_is_noticed() -> None:
    steps = [*STEPS[:2], {"step": f"{__name__}:Forgetful"}, STEPS[2]]
    with pytest.raises(StepFailed, match="declares 'scores' as FP32 \\[-1\\] a row and made nothing"):
        run(build(steps=steps), {"image": column(filled("red"))})


def test_every_parameter_of_every_step_says_what_it_is() -> None:
    for name, step in SHIPPED.items():
        for field, info in step.params_type.model_fields.items():
            assert info.description, f"{name}.{field}"


def test_a_module_that_ends_the_process_while_it_is_imported_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_script.py").write_text("raise SystemExit(2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = findings(steps=[*STEPS[:2], {"step": "a_script:Step"}, STEPS[2]])
    assert found.startswith("steps.2.step: step 'a_script:Step' cannot be imported: SystemExit: 2; ")
