"""What a model that is built on demand says of itself, by its config and its README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from gateway.models import catalogue

REPOSITORY = Path(__file__).parents[2] / "model_repository"

ON_DEMAND = [recipe for recipe in catalogue.RECIPES if recipe.on_demand]
every_model = pytest.mark.parametrize("recipe", ON_DEMAND, ids=lambda recipe: recipe.name)


@every_model
def test_its_config_is_one_that_triton_s_schema_knows(recipe: catalogue.Recipe) -> None:
    text = (REPOSITORY / recipe.name / "config.pbtxt").read_text("utf-8")
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.name == recipe.name
    assert config.backend in ("onnxruntime", "python")
    assert {group.kind for group in config.instance_group} == {model_config_pb2.ModelInstanceGroup.KIND_CPU}


@every_model
def test_its_readme_names_tensors_source_and_licence(recipe: catalogue.Recipe) -> None:
    folder = REPOSITORY / recipe.name
    readme = (folder / "README.md").read_text("utf-8")
    config = text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), model_config_pb2.ModelConfig())
    for artifact in recipe.sources:
        assert artifact.sha256 in readme
        assert re.search(rf"`?{artifact.project}`? {artifact.version}", readme)
    assert any(licence in readme for licence in ("MIT", "Apache-2.0", "BSD"))
    assert all(f"`{tensor.name}`" in readme for tensor in (*config.input, *config.output))
    assert all(f"`{parameter}`" in readme for parameter in config.parameters if config.backend == "python")


def test_none_of_them_is_built_unless_it_is_asked_for() -> None:
    assert not set(ON_DEMAND) & set(catalogue.BY_DEFAULT)
