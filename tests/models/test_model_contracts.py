"""The configs, the label files and the weights agree with one another."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from gateway.models import catalogue

VARIANTS = ("efficientnet_lite0_onnx", "efficientnet_lite0_onnx_int8", "efficientnet_lite0_tensorrt")
ON_CPU = tuple(recipe.name for recipe in catalogue.RECIPES if not recipe.needs_gpu)
_ONNX_TYPES = {"TYPE_FP32": "tensor(float)", "TYPE_INT32": "tensor(int32)"}


def _config(repository: Path, model: str) -> model_config_pb2.ModelConfig:
    text = (repository / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_the_variants_of_the_image_model_have_one_contract(repository: Path) -> None:
    contracts = [
        (list(map(str, config.input)), list(map(str, config.output)), config.max_batch_size)
        for config in (_config(repository, variant) for variant in VARIANTS)
    ]
    assert contracts[0] == contracts[1] == contracts[2]


def test_every_model_batches_dynamically(repository: Path) -> None:
    for recipe in catalogue.RECIPES:
        config = _config(repository, recipe.name)
        assert config.HasField("dynamic_batching")
        assert all(size <= config.max_batch_size for size in config.dynamic_batching.preferred_batch_size)


def test_each_kind_of_variant_names_the_backend_that_runs_it(repository: Path) -> None:
    configs = [_config(repository, variant) for variant in VARIANTS]
    assert [config.backend or config.platform for config in configs] == ["onnxruntime", "onnxruntime", "tensorrt_plan"]
    kinds = [config.instance_group[0].kind for config in configs]
    group = model_config_pb2.ModelInstanceGroup
    assert kinds == [group.KIND_CPU, group.KIND_CPU, group.KIND_GPU]


@pytest.mark.parametrize("model", [recipe.name for recipe in catalogue.RECIPES])
def test_each_output_has_as_many_labels_as_scores(repository: Path, model: str) -> None:
    (output,) = _config(repository, model).output
    labels = (repository / model / output.label_filename).read_text(encoding="utf-8").splitlines()
    assert len(labels) == len(set(labels)) == output.dims[0]
    assert all(label and label == label.strip() for label in labels)


@pytest.mark.parametrize("model", ON_CPU)
def test_the_weights_take_and_give_what_the_config_says(repository: Path, model: str) -> None:
    config = _config(repository, model)
    session = onnxruntime.InferenceSession(str(repository / model / "1/model.onnx"), providers=["CPUExecutionProvider"])
    for declared, found in (
        (config.input, session.get_inputs()),
        (config.output, session.get_outputs()),
    ):
        named = {tensor.name: tensor for tensor in found}
        assert named.keys() == {tensor.name for tensor in declared}
        for tensor in declared:
            type_name = model_config_pb2.DataType.Name(tensor.data_type)
            batch, *row = named[tensor.name].shape
            assert _ONNX_TYPES[type_name] == named[tensor.name].type
            assert isinstance(batch, str)
            assert [size if isinstance(size, int) else -1 for size in row] == list(tensor.dims)


def test_the_committed_labels_and_rules_are_those_of_the_pinned_wheels(repository: Path) -> None:
    for path, content in catalogue.committed_files().items():
        assert (repository / path).read_bytes() == content, path
