"""The configs, the label files and the weights agree with one another."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from gateway.models import catalogue
from gateway.models.tensorrt import read_profile

VARIANTS = {  # with backend and kind of instances
    "efficientnet_lite0_onnx": ("onnxruntime", "KIND_CPU"),
    "efficientnet_lite0_onnx_int8": ("onnxruntime", "KIND_CPU"),
    "efficientnet_lite0_onnx_pruned": ("onnxruntime", "KIND_CPU"),
    "efficientnet_lite0_onnx_cuda": ("onnxruntime", "KIND_GPU"),
    "efficientnet_lite0_onnx_trt": ("onnxruntime", "KIND_GPU"),
    "efficientnet_lite0_tensorrt": ("tensorrt_plan", "KIND_GPU"),
}
ON_GPU = [model for model, (_, kind) in VARIANTS.items() if kind == "KIND_GPU"]
READING = ("ocr_detection", "ocr_direction", "ocr_recognition")
BUILT_ANYWHERE = (*(recipe.name for recipe in catalogue.BY_DEFAULT), *READING)
LABELLED = tuple(recipe.name for recipe in catalogue.RECIPES if not recipe.on_demand)
_ONNX_TYPES = {"TYPE_FP32": "tensor(float)", "TYPE_INT32": "tensor(int32)"}


def _config(repository: Path, model: str) -> model_config_pb2.ModelConfig:
    return _parsed(repository / model / "config.pbtxt")


def _parsed(file: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())


SMALLER = {  # what configs/edge.pbtxt says otherwise than config.pbtxt
    "efficientnet_lite0_onnx_int8": {"instance_group", "parameters"},
    "ocr_detection": {"max_batch_size"},
    "ocr_direction": {"parameters"},
    "ocr_recognition": {"max_batch_size"},
}


def test_the_configs_for_a_small_machine_change_no_contract() -> None:
    repository = Path(__file__).parents[2] / "model_repository"
    assert {file.parents[1].name for file in repository.glob("*/configs/edge.pbtxt")} == SMALLER.keys()
    for model, changed in SMALLER.items():
        usual, small = (_parsed(repository / model / file) for file in ("config.pbtxt", "configs/edge.pbtxt"))
        fields = {name for config in (usual, small) for name in (field.name for field, _ in config.ListFields())}
        assert {name for name in fields if str(getattr(usual, name)) != str(getattr(small, name))} == changed, model
        assert small.max_batch_size <= usual.max_batch_size


def test_the_variants_of_the_image_model_have_one_contract(repository: Path) -> None:
    contracts = [
        (list(map(str, config.input)), list(map(str, config.output)), config.max_batch_size)
        for config in (_config(repository, variant) for variant in VARIANTS)
    ]
    assert all(contract == contracts[0] for contract in contracts)


def test_every_variant_of_the_image_model_is_in_the_table_above() -> None:
    assert VARIANTS.keys() == {recipe.name for recipe in catalogue.RECIPES if recipe.name.startswith("efficientnet")}


def test_every_model_batches_but_those_whose_answers_come_in_parts(repository: Path) -> None:
    for recipe in catalogue.RECIPES:
        config = _config(repository, recipe.name)
        batches = config.HasField("dynamic_batching") or config.HasField("sequence_batching")
        assert batches == (config.max_batch_size > 0 and not config.model_transaction_policy.decoupled), recipe.name
        assert all(size <= config.max_batch_size for size in config.dynamic_batching.preferred_batch_size)


@pytest.mark.parametrize("model", VARIANTS)
def test_each_variant_names_the_backend_and_the_device_that_run_it(repository: Path, model: str) -> None:
    config = _config(repository, model)
    kinds = {model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind) for group in config.instance_group}
    assert (config.backend or config.platform, kinds) == (VARIANTS[model][0], {VARIANTS[model][1]})


@pytest.mark.parametrize("model", ON_GPU)
def test_a_model_on_a_gpu_is_warm_before_it_is_ready(repository: Path, model: str) -> None:
    """With the smallest batch, the largest, and those that are preferred; of the tensors that the config names."""
    config = _config(repository, model)
    sizes = {warmup.batch_size for warmup in config.model_warmup}
    assert sizes >= {1, config.max_batch_size, *config.dynamic_batching.preferred_batch_size}
    (tensor,) = config.input
    for warmup in config.model_warmup:
        assert warmup.inputs.keys() == {tensor.name}
        tried = warmup.inputs[tensor.name]
        assert (tried.data_type, list(tried.dims), tried.zero_data) == (tensor.data_type, list(tensor.dims), True)


def test_the_engine_takes_every_batch_that_triton_may_make(repository: Path) -> None:
    model = repository / "efficientnet_lite0_onnx_trt" / "config.pbtxt"
    (accelerator,) = _config(
        repository, model.parent.name
    ).optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    profile = read_profile(model)
    for key, size in (("min", profile.least), ("opt", profile.usual), ("max", profile.most)):
        assert accelerator.parameters[f"trt_profile_{key}_shapes"] == profile.shapes(size)
    assert "precision_mode" not in accelerator.parameters, "types are the graph's; TensorRT 11 knows no other way"


@pytest.mark.parametrize("model", LABELLED)
def test_each_output_has_as_many_labels_as_scores(repository: Path, model: str) -> None:
    (output,) = _config(repository, model).output
    labels = (repository / model / output.label_filename).read_text(encoding="utf-8").splitlines()
    assert len(labels) == len(set(labels)) == output.dims[0]
    assert all(label and label == label.strip() for label in labels)


@pytest.mark.parametrize("model", BUILT_ANYWHERE)
def test_the_weights_take_and_give_what_the_config_says(repository: Path, model: str) -> None:
    config = _config(repository, model)
    catalogue.build((model,), repository)
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
