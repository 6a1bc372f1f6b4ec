"""What the demo shows: its tasks are served by the configs they name, and files that can't be theirs are told so."""

from __future__ import annotations

import io
import re
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import yaml

from gateway.demo import showcase, tasks
from gateway.demo.tasks import BY_DEFAULT, EVERYTHING, TASKS, Task, UnfitInput
from gateway.models import catalogue

CHECKOUT = Path(__file__).parents[2]
EXAMPLES = CHECKOUT / "deploy/examples"

every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def served(config: str) -> tuple[set[str], set[str]]:
    """The public models of an example, and the models of the repository behind them."""
    models = yaml.safe_load((EXAMPLES / config).read_text("utf-8"))["models"]
    variants = [variant for model in models.values() for variant in model.get("variants", {}).values()]
    return set(models), {variant["model"] for variant in variants}


@every_task
@pytest.mark.parametrize("shared", [False, True], ids=["its own", "edge"])
def test_a_task_s_config_serves_what_it_calls_with_models_that_it_builds(task: Task, shared: bool) -> None:
    public, models = served(EVERYTHING if shared else task.config)
    assert task.pipeline in public
    assert set(task.models) & models
    assert {catalogue.find(model).needs_gpu for model in task.models} == {False}


def test_one_config_serves_every_task_with_the_models_that_they_build() -> None:
    _, models = served(EVERYTHING)
    assert models <= set(tasks.models_of(TASKS))


def test_what_is_shown_by_default_is_what_is_built_by_default() -> None:
    by_default = {recipe.name for recipe in catalogue.BY_DEFAULT}
    assert set(tasks.models_of(BY_DEFAULT)) <= by_default
    assert not [task.name for task in TASKS if task not in BY_DEFAULT and set(task.models) <= by_default]


def test_what_must_be_fetched_is_said_once_for_models_of_one_package(tmp_path: Path) -> None:
    shutil.copytree(CHECKOUT / "model_repository", tmp_path / "models", ignore=shutil.ignore_patterns("[0-9]*"))
    (reading,) = showcase.tasks_of("reading", every=False)
    (artifact,) = {artifact for model in reading.models for artifact in catalogue.find(model).sources}
    assert showcase.to_fetch([reading], tmp_path / "models") == artifact.size
    assert showcase.to_fetch([], tmp_path / "models") == 0


def test_a_task_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(
        showcase.DemoFailed, match=re.escape("no task 'ocr'; tasks: photo, language, file-type, reading")
    ):
        showcase.tasks_of("ocr", every=False)
    assert showcase.tasks_of(None, every=False) == BY_DEFAULT
    assert showcase.tasks_of(None, every=True) == TASKS


# Recordings


def recording(samples: np.ndarray, rate: int, *, channels: int = 1, width: int = 2) -> bytes:
    encoded = io.BytesIO()
    with wave.open(encoded, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.astype({1: "u1", 2: "<i2"}[width]).tobytes())
    return encoded.getvalue()


def tone(rate: int, hertz: float = 440.0) -> np.ndarray:
    """A second of it."""
    return np.rint(10_000 * np.sin(2 * np.pi * hertz * np.arange(rate) / rate))


def test_a_recording_as_it_must_be_is_left_as_it_is() -> None:
    assert (tasks.heard(recording(tone(16_000), 16_000)) == tone(16_000)).all()


@pytest.mark.parametrize("rate", [8_000, 22_050, 24_000, 44_100, 48_000])
def test_a_recording_at_another_rate_becomes_the_same_sound(rate: int) -> None:
    assert np.abs(tasks.heard(recording(tone(rate), rate)) - tone(16_000)).max() <= 2


def test_channels_are_mixed() -> None:
    both = np.column_stack([tone(16_000), np.zeros(16_000)])
    assert np.abs(tasks.heard(recording(both, 16_000, channels=2)) - tone(16_000) / 2).max() <= 1


@pytest.mark.parametrize(
    ("file", "told"),
    [
        (b"", "no WAV file"),
        (b"\xff\xd8\xff\xe0 a picture", "no WAV file"),
        (recording(tone(8_000)[:100], 8_000, width=1), "samples of 8 bits; hearing takes 16"),
        (recording(np.zeros(0), 16_000), "has no samples"),
    ],
)
def test_a_file_that_is_no_such_recording_is_told_so(file: bytes, told: str) -> None:
    with pytest.raises(UnfitInput, match=told):
        tasks.heard(file)


@every_task
def test_for_one_task_alone_the_models_of_its_whole_config_are_built(task: Task) -> None:
    """Or the demo of it would not start where nothing else was built before: the config reads their files."""
    nowhere = "127.0.0.1:0"
    settings = showcase.DemoSettings(None, EXAMPLES, CHECKOUT / "model_repository", nowhere, nowhere, True, (task,))
    of_config = {model for each in TASKS if each.config == settings.served_by().name for model in each.models}
    assert set(task.models) <= of_config == set(tasks.models_of(settings.served()))
