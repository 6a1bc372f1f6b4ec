"""Which models of a Triton repository the local server can serve, and why it can't serve the others.

Reads a repository's files as Triton does; starts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from gateway.triton.host import has_gpu

_DEFAULT_FILES = {"onnxruntime": "model.onnx", "python": "model.py", "tensorrt": "model.plan"}
_PLATFORMS = {"onnxruntime_onnx": "onnxruntime", "tensorrt_plan": "tensorrt", "ensemble": "ensemble"}
_SERVED = ("onnxruntime", "python")

Configs = dict[str, "model_config_pb2.ModelConfig | str"]  # by model name; a text says why a config could not be read


@dataclass(frozen=True, slots=True)
class FoundModel:
    """One model of a repository."""

    name: str
    backend: str  # "" if its config does not say
    problem: str = ""  # why the local server does not load it, "" if it can


def survey(repository: Path) -> list[FoundModel]:
    """The repository's models in the order of their names."""
    configs: Configs = {}
    for folder in sorted(repository.iterdir()):
        config = folder / "config.pbtxt"
        if config.is_file():
            configs[folder.name] = _read(config)
        elif folder.is_dir() and _versions(folder):
            configs[folder.name] = _guess(folder)
    return [_judge(name, repository, configs, ()) for name in configs]


def _read(config: Path) -> model_config_pb2.ModelConfig | str:
    """The parsed config, or a text with what is wrong with it."""
    try:
        return text_format.Parse(config.read_bytes(), model_config_pb2.ModelConfig(), allow_unknown_field=True)
    except (text_format.ParseError, UnicodeDecodeError) as e:
        return f"its config.pbtxt cannot be read: {e}"


def _guess(folder: Path) -> model_config_pb2.ModelConfig:
    """The backend of a model without a config, by the name of its file, as Triton guesses it."""
    for backend, file in _DEFAULT_FILES.items():
        if any((version / file).is_file() for version in _versions(folder)):
            return model_config_pb2.ModelConfig(backend=backend)
    return model_config_pb2.ModelConfig()


def _judge(name: str, repository: Path, configs: Configs, within: tuple[str, ...]) -> FoundModel:
    config = configs.get(name, "it is not in the repository")
    if isinstance(config, str):
        return FoundModel(name, "", config)
    backend = config.backend or _PLATFORMS.get(config.platform, config.platform)
    if backend == "ensemble" or config.HasField("ensemble_scheduling"):
        steps = [step.model_name for step in config.ensemble_scheduling.step]
        return FoundModel(name, "ensemble", _problem_of_steps(steps, repository, configs, (*within, name)))
    if backend not in _SERVED:
        return FoundModel(name, backend, _why_not(backend))
    if _only_on_gpu(config):
        return FoundModel(name, backend, "its instance_group is KIND_GPU, and the local server runs models on the CPU")
    file = config.default_model_filename or _DEFAULT_FILES[backend]
    there = any((version / file).is_file() for version in _versions(repository / name))
    return FoundModel(name, backend, "" if there else f"its weights are missing: no {file} in a version folder")


def _problem_of_steps(steps: list[str], repository: Path, configs: Configs, within: tuple[str, ...]) -> str:
    for step in steps:
        if step in within:
            return f"it contains itself through {step}"
        part = _judge(step, repository, configs, within)
        if part.problem:
            return f"its step {step} is not served: {part.problem}"
    return ""


def _only_on_gpu(config: model_config_pb2.ModelConfig) -> bool:
    gpu = model_config_pb2.ModelInstanceGroup.KIND_GPU
    return bool(config.instance_group) and all(group.kind == gpu for group in config.instance_group)


def _why_not(backend: str) -> str:
    if backend == "tensorrt" and not has_gpu():
        return "it needs a GPU, and this host has none"
    return f"the local server has no {backend or 'such'} backend; NVIDIA's container may"


def _versions(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.isdigit() and path.name[0] != "0" and path.is_dir()]
