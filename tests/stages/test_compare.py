"""A pipeline's calls are held to what the models say of themselves; each fault has the place where it is written."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.stages import PipelineSpec, build_pipeline
from gateway.stages.compare import ModelFacts, ModelTensor, compare, facts_of

LOGITS = {"name": "logits", "datatype": "FP32", "shape": [-1]}
CALL = {"call": "m", "inputs": ["logits"], "outputs": {"probabilities": "scores"}}
TOP = {"step": "top_k", "with": {"k": 1}}


def pipeline(**more: Any) -> Any:
    declared = {
        "inputs": [LOGITS],
        "outputs": [{"name": "label", "datatype": "BYTES", "shape": [1]}],
        "max_batch_size": 4,
        "steps": [CALL, TOP],
        **more,
    }
    return build_pipeline("p", PipelineSpec.model_validate(declared), lambda _: b"")


def tensor(name: str, *shape: int, datatype: str = "FP32", optional: bool = False) -> ModelTensor:
    return ModelTensor(name, datatype, shape, optional)


def model(
    inputs: tuple[ModelTensor, ...] = (tensor("logits", -1, 10),),
    outputs: tuple[ModelTensor, ...] = (tensor("probabilities", -1, 10),),
    most: int = 4,
) -> ModelFacts:
    return ModelFacts("variant 'v'", inputs, outputs, most)


FITTING = {
    "as it is": (pipeline(), model()),
    "more rows than needed": (pipeline(), model(most=8)),
    "no batching, any rows": (pipeline(), model(most=0)),
    "one row, and no batching": (
        pipeline(max_batch_size=1),
        model((tensor("logits", 1, 10),), (tensor("probabilities", 1, 10),), 0),
    ),
    "an input that may be left out": (
        pipeline(),
        model((tensor("logits", -1, -1), tensor("prior", -1, 1, optional=True))),
    ),
    "BF16 answers, which are FP32 here": (
        pipeline(),
        model(outputs=(tensor("probabilities", -1, 10, datatype="BF16"),)),
    ),
    "all outputs": (
        pipeline(steps=[{"call": "m", "inputs": ["logits"]}, TOP]),
        model(outputs=(tensor("scores", -1, 10),)),
    ),
}

WRONG = {
    "no such output": (
        pipeline(steps=[{**CALL, "outputs": {"logit": "scores"}}, TOP]),
        model(),
        ["steps.0.outputs.logit: variant 'v' has no output 'logit'; it has probabilities"],
    ),
    "no such input": (
        pipeline(steps=[{**CALL, "inputs": {"pixels": "logits"}}, TOP]),
        model(),
        [
            "steps.0.inputs.pixels: variant 'v' has no input 'pixels'; it has logits",
            "steps.0.inputs: variant 'v' needs an input 'logits'; it has logits",
        ],
    ),
    "another datatype": (
        pipeline(),
        model((tensor("logits", -1, 10, datatype="FP16"),)),
        ["steps.0.inputs.logits: variant 'v' takes 'logits' as FP16 [10] a row, but 'logits' is FP32 [-1] a row"],
    ),
    "other dims": (
        pipeline(),
        model((tensor("logits", -1, 3, 10),)),
        ["steps.0.inputs.logits: variant 'v' takes 'logits' as FP32 [3, 10] a row, but 'logits' is FP32 [-1] a row"],
    ),
    "more rows than it takes": (
        pipeline(),
        model(most=2),
        ["max_batch_size: is 4, but variant 'v' takes 2 rows at most; at most 2"],
    ),
    "no batch axis": (
        pipeline(),
        model((tensor("logits", 10),), most=0),
        ["steps.0.inputs.logits: variant 'v' takes 'logits' as FP32 [10], which has no batch axis"],
    ),
    "an answer that the next step can't read": (
        pipeline(),
        model(outputs=(tensor("probabilities", -1, 10, datatype="INT32"),)),
        ["steps.1: step 'top_k' reads 'scores' as FP32 [-1] a row, but variant 'v' answers INT32 [10]"],
    ),
    "an answer that is missing among all outputs": (
        pipeline(steps=[{"call": "m", "inputs": ["logits"]}, TOP]),
        model(),
        ["steps.1: step 'top_k' reads 'scores', which no model answers"],
    ),
    "an answer that is not as promised": (
        pipeline(outputs=[{"name": "scores", "datatype": "FP32", "shape": [5]}], steps=[CALL]),
        model(),
        ["outputs.0: the pipeline promises 'scores' as FP32 [5] a row, but variant 'v' answers FP32 [10]"],
    ),
}


@pytest.mark.parametrize(("made", "told"), FITTING.values(), ids=FITTING)
def test_what_fits_is_not_complained_of(made: Any, told: ModelFacts) -> None:
    assert compare(made, {"m": [told]}) == []


@pytest.mark.parametrize(("made", "told", "findings"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_found_where_it_is_written(made: Any, told: ModelFacts, findings: list[str]) -> None:
    assert [str(each) for each in compare(made, {"m": [told]})] == findings


def test_what_could_not_be_asked_is_not_judged() -> None:
    assert compare(pipeline(), {}) == []
    assert compare(pipeline(steps=[{"call": "m", "inputs": ["logits"]}, TOP]), {"m": []}) == []


def test_every_variant_must_fit() -> None:
    other = ModelFacts("variant 'w'", (tensor("logits", -1, 10),), (tensor("scores", -1, 10),), 4)
    assert [each.wrong for each in compare(pipeline(), {"m": [model(), other]})] == [
        "variant 'w' has no output 'probabilities'"
    ]


def test_a_pipeline_that_is_called_is_as_it_declares() -> None:
    outer = pipeline(steps=[{"call": "m", "inputs": {"image": "logits"}, "outputs": {"label": "label"}}])
    found = [str(each) for each in compare(outer, {"m": [facts_of(pipeline())]})]
    assert found[0] == "steps.0.inputs.image: pipeline 'p' has no input 'image'; it has logits"
