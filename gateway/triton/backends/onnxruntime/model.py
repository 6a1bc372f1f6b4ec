"""Serves ONNX models in the local Triton, whose build has no ONNX Runtime backend of its own.

A python-based backend: Triton hands every model whose config says `backend: "onnxruntime"` to this file, one process
per model instance. It reads a model's config as NVIDIA's own ONNX Runtime backend does, so that one model repository
serves both. Runs inside Triton's Python stub: it may import only numpy, onnxruntime and `triton_python_backend_utils`,
and nothing of this package. It is the hot path of the local server, so it does nothing per request that it could do
once.

source: github.com/triton-inference-server/onnxruntime_backend, README, "Model Config Options".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

# `optimization { graph { level } }` in NVIDIA's numbering; everything is on when it is not set.
_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

_TRITON_TYPES = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
}

Config = Mapping[str, Any]  # a ModelConfig as Triton writes it in JSON
Arrays = dict[str, np.ndarray]


class TritonPythonModel:
    """One instance of one model: a session, and the names that requests may use."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Fill in the inputs and outputs that the config leaves out, from the graph."""
        known = config.as_dict()
        if known["input"] and known["output"]:
            return config
        session = _open(pb_utils.get_model_dir(), known)
        batched = known["max_batch_size"] > 0
        if not known["input"]:
            for node in session.get_inputs():
                config.add_input(_describe(node, batched))
        if not known["output"]:
            for node in session.get_outputs():
                config.add_output(_describe(node, batched))
        return config

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        if args["model_instance_kind"] == "GPU":
            raise pb_utils.TritonModelException(
                f"{args['model_name']}: this server runs ONNX models on the CPU only; "
                "give its instance_group KIND_CPU (or KIND_AUTO on a machine without a GPU)"
            )
        self.session = _open(pb_utils.get_model_dir(), config)
        self.batches = config["max_batch_size"] > 0
        self.outputs = [output["name"] for output in config["output"]]
        missing = set(self.outputs) - {node.name for node in self.session.get_outputs()}
        if missing:
            raise pb_utils.TritonModelException(f"{args['model_name']}: the graph has no output {sorted(missing)[0]!r}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        if len(requests) > 1 and self.batches:
            try:
                return self._run_together(requests)
            except Exception:  # noqa: S110  # one of them is at fault; alone, each gets its own answer
                pass
        return [self._run_alone(request) for request in requests]

    def _run_together(self, requests: Sequence[Any]) -> list[Any]:
        inputs = [_read(request) for request in requests]
        # Triton batches only requests of one shape, unless the config allows ragged ones; those fail here.
        merged = {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}
        wanted = self._wanted(requests)
        arrays = self.session.run(wanted, merged)
        rows = len(next(iter(merged.values())))
        if any(len(array) != rows for array in arrays):
            raise ValueError("an output's first dimension is not the batch, so its rows belong to nobody")
        return _split(requests, inputs, dict(zip(wanted, arrays, strict=True)))

    def _run_alone(self, request: Any) -> Any:
        try:
            wanted = self._wanted((request,))
            arrays = self.session.run(wanted, _read(request))
        except Exception as e:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"onnxruntime: {e}"))
        return pb_utils.InferenceResponse([_write(name, array) for name, array in zip(wanted, arrays, strict=True)])

    def _wanted(self, requests: Sequence[Any]) -> list[str]:
        """The outputs that any of them asked for, in the config's order."""
        asked = {name for request in requests for name in request.requested_output_names()}
        return [name for name in self.outputs if name in asked]


def _open(folder: str, config: Config) -> ort.InferenceSession:
    """A session on the model's weights, with the threads and optimizations that its config asks for.

    folder:  of the model's version.
    """
    weights = os.path.join(folder, config.get("default_model_filename") or "model.onnx")
    if not os.path.isfile(weights):
        raise pb_utils.TritonModelException(f"{config['name']}: its weights {weights} are missing; build them first")
    options = ort.SessionOptions()
    options.graph_optimization_level = _LEVELS[int(config.get("optimization", {}).get("graph", {}).get("level", 0))]
    options.intra_op_num_threads = _parameter(config, "intra_op_thread_count")
    options.inter_op_num_threads = _parameter(config, "inter_op_thread_count")
    options.execution_mode = ort.ExecutionMode(_parameter(config, "execution_mode"))
    # Threads that spin while they wait take the cores from Triton's front end and from the other instances.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return ort.InferenceSession(weights, options, providers=["CPUExecutionProvider"])


def _parameter(config: Config, name: str) -> int:
    return int(config.get("parameters", {}).get(name, {}).get("string_value", 0))


def _describe(node: Any, batched: bool) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else -1 for size in node.shape]
    return {"name": node.name, "data_type": _TRITON_TYPES[node.type], "dims": shape[1:] if batched else shape}


def _read(request: Any) -> Arrays:
    """The request's inputs by name; numbers are views into shared memory, texts must be UTF-8."""
    arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    for name, array in arrays.items():
        if array.dtype.hasobject:  # onnxruntime would take a bytes object for its repr
            arrays[name] = np.array([text.decode() for text in array.flat], np.object_).reshape(array.shape)
    return arrays


def _write(name: str, array: np.ndarray) -> Any:
    return pb_utils.Tensor(name, np.ascontiguousarray(array))


def _split(requests: Sequence[Any], inputs: Sequence[Arrays], outputs: Arrays) -> list[Any]:
    """Each request's own rows, and of those the outputs that it asked for."""
    responses = []
    start = 0
    for request, one in zip(requests, inputs, strict=True):
        end = start + len(next(iter(one.values())))
        asked = set(request.requested_output_names())
        rows = [_write(name, array[start:end]) for name, array in outputs.items() if name in asked]
        responses.append(pb_utils.InferenceResponse(rows))
        start = end
    return responses
