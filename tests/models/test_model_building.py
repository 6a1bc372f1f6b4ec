"""What is built, when it is built again, and what is left where it was."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.models import catalogue
from gateway.models.catalogue import BuildFailed, Recipe, State, build, find, state_of

MODEL = "magika"
WEIGHTS = "magika/1/model.onnx"


def test_no_name_builds_every_cpu_model_and_each_build_gives_the_same_bytes(
    repository: Path, empty_repository: Path
) -> None:
    """One test, as it takes the longest: `repository` was built before, by this or an earlier run."""
    heard: list[str] = []
    built = build((), empty_repository, report=heard.append)
    assert built == [recipe.name for recipe in catalogue.BY_DEFAULT]
    assert len(heard) == len(built)
    states = {model.name: model.state for model in catalogue.list_models(empty_repository)}
    assert {name for name, state in states.items() if state is State.BUILT} == set(built)
    assert set(states.values()) == {State.BUILT, State.MISSING}
    for file in empty_repository.glob("*/1/[!.]*"):
        assert file.read_bytes() == (repository / file.relative_to(empty_repository)).read_bytes(), file


def test_what_is_current_is_not_built_again(empty_repository: Path) -> None:
    assert build([MODEL], empty_repository) == [MODEL]
    assert build([MODEL], empty_repository) == []
    assert build([MODEL], empty_repository, force=True) == [MODEL]


def test_of_several_builders_at_once_one_builds_and_the_others_wait(empty_repository: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: build([MODEL], empty_repository), range(4)))
    assert sorted(built) == [[], [], [], [MODEL]]
    assert state_of(find(MODEL), empty_repository) is State.BUILT


def _lose_the_weights(repository: Path) -> None:
    (repository / WEIGHTS).unlink()


def _cut_the_weights(repository: Path) -> None:
    (repository / WEIGHTS).write_bytes(b"half")


def _lose_the_stamp(repository: Path) -> None:
    (repository / MODEL / catalogue.STAMP).unlink()


def _spoil_the_stamp(repository: Path) -> None:
    (repository / MODEL / catalogue.STAMP).write_text("[]")


@pytest.mark.parametrize("spoil", [_lose_the_weights, _cut_the_weights, _lose_the_stamp, _spoil_the_stamp])
def test_what_is_not_whole_is_built_again(spoil, empty_repository: Path) -> None:  # type: ignore[no-untyped-def]
    build([MODEL], empty_repository)
    good = (empty_repository / WEIGHTS).read_bytes()
    spoil(empty_repository)
    assert state_of(find(MODEL), empty_repository) is not State.BUILT
    assert build([MODEL], empty_repository) == [MODEL]
    assert (empty_repository / WEIGHTS).read_bytes() == good


def test_another_revision_of_the_recipe_makes_a_model_stale(empty_repository: Path) -> None:
    build([MODEL], empty_repository)
    newer = replace(find(MODEL), revision=find(MODEL).revision + 1)
    assert state_of(newer, empty_repository) is State.STALE


def test_a_model_that_was_never_built_is_missing(empty_repository: Path) -> None:
    assert state_of(find(MODEL), empty_repository) is State.MISSING


def test_a_build_that_fails_leaves_the_old_weights(empty_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_kit: catalogue.Kit) -> catalogue.Files:
        raise BuildFailed("on purpose")

    build([MODEL], empty_repository)
    recipe = find(MODEL)
    failing = Recipe(MODEL, recipe.task, recipe.revision, recipe.sources, fail)
    monkeypatch.setattr(catalogue, "RECIPES", (failing,))
    with pytest.raises(BuildFailed, match="on purpose"):
        build([MODEL], empty_repository, force=True)
    assert state_of(recipe, empty_repository) is State.BUILT


def test_a_build_leaves_no_partial_file(empty_repository: Path) -> None:
    left_over = empty_repository / "magika/1/.model.onnx.partial"  # of a build that was killed
    left_over.parent.mkdir()
    left_over.write_bytes(b"half")
    build([MODEL], empty_repository)
    assert not left_over.exists()


def test_an_unknown_model_is_refused_with_the_names_that_exist(empty_repository: Path) -> None:
    with pytest.raises(
        BuildFailed, match=r"no model 'resnet' to build; known models: .*efficientnet_lite0_onnx, .*langid"
    ):
        build(["magika", "resnet"], empty_repository)
    assert state_of(find(MODEL), empty_repository) is State.MISSING


def test_a_folder_that_is_no_model_repository_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=r"magika/config\.pbtxt, so it is not the model repository"):
        build([MODEL], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("trtexec") is not None, reason="this host can build TensorRT plans")
def test_a_gpu_model_asked_for_without_its_tools_says_where_to_build_it(empty_repository: Path) -> None:
    with pytest.raises(BuildFailed, match=r"`trtexec`, which is not here.*TensorRT container"):
        build(["efficientnet_lite0_tensorrt"], empty_repository)
