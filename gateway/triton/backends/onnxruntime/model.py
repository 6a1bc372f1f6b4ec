"""Serves ONNX models in the local Triton, whose build has no ONNX Runtime backend of its own.

A python-based backend: Triton hands every model whose config says `backend: "onnxruntime"` to this file, one process
per model instance. It reads a model's config as NVIDIA's own ONNX Runtime backend does, so that one model repository
serves both. Runs inside Triton's Python stub: it may import only numpy, onnxruntime and `triton_python_backend_utils`,
and nothing of this package. It is the hot path of the local server, so it does nothing per request that it could do
once.

source: github.com/triton-inference-server/onnxruntime_backend, README, "Model Config Options".
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any


class _Later:
    """Has parts of NumPy loaded when they are asked for, as no graph asks for them: they take 4 MiB of each instance,
    which is a process. source: importlib's documentation, "Implementing lazy imports".
    """

    parts = frozenset(f"numpy.{part}" for part in ("ctypeslib", "fft", "ma", "polynomial", "random", "testing"))

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name in cls.parts else None
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


sys.meta_path.insert(0, _Later)  # type: ignore[arg-type]
import numpy as np  # noqa: E402

sys.meta_path.remove(_Later)  # type: ignore[arg-type]
import onnxruntime as ort  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402

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


# Of `request.flags()`; source: tritonserver.h, TRITONSERVER_RequestFlag.
_SEQUENCE_START = 1
_SEQUENCE_END = 2


class States:
    """What a model remembers of each sequence that has begun: the `state` tensors of its config, a row each.

    Triton's core gives native backends these tensors, and Python models nothing. It says which request begins or ends a
    sequence, and never lets an instance have more of them at once than the config allows. A sequence that has been
    given up for idleness is told of to nobody, so the one that was used longest ago is dropped: those that live are
    newer.
    """

    def __init__(self, config: Config) -> None:
        batching = config.get("sequence_batching") or {}
        self.tensors = list(batching.get("state", ()))
        oldest = batching.get("oldest") or {}
        self._most = int(oldest.get("max_candidate_sequences", 0)) or max(1, config["max_batch_size"])
        self._initial = {state["input_name"]: self._zeros(state) for state in self.tensors}
        self._kept: OrderedDict[Any, Arrays] = OrderedDict()  # by correlation id, least recently used first

    @staticmethod
    def _zeros(state: Config) -> np.ndarray:
        first = (state.get("initial_state") or [{}])[0]
        if not first.get("zero_data", True):
            raise pb_utils.TritonModelException(
                f"state {state['input_name']!r}: this server begins states with zeros only; say zero_data: true"
            )
        sizes = [int(size) for size in state["dims"]]
        return np.zeros((1, *sizes), pb_utils.triton_string_to_numpy(state["data_type"]))

    def before(self, request: Any) -> Arrays:
        """The state tensors that go into the model with this request."""
        if request.flags() & _SEQUENCE_START:
            return self._initial
        return self._kept[request.correlation_id()]  # the core refuses a sequence that has not begun

    def after(self, request: Any, arrays: Arrays) -> None:
        """Keep what came out, by the names of the inputs that it becomes."""
        key = request.correlation_id()
        if request.flags() & _SEQUENCE_END:
            self._kept.pop(key, None)
            return
        self._kept[key] = arrays
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)


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
        self.states = States(config)
        kept = [state["output_name"] for state in self.states.tensors]
        missing = {*self.outputs, *kept} - {node.name for node in self.session.get_outputs()}
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
        inputs = [self._inputs(request) for request in requests]
        # Triton batches only requests of one shape, unless the config allows ragged ones; those fail here.
        merged = {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}
        wanted = self._wanted(requests)
        arrays, states = self._run(wanted, merged)
        rows = len(next(iter(merged.values())))
        if any(len(array) != rows for array in arrays):
            raise ValueError("an output's first dimension is not the batch, so its rows belong to nobody")
        self._keep(requests, states)
        return _split(requests, inputs, dict(zip(wanted, arrays, strict=True)))

    def _run_alone(self, request: Any) -> Any:
        try:
            wanted = self._wanted((request,))
            arrays, states = self._run(wanted, self._inputs(request))
            self._keep((request,), states)
        except Exception as e:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"onnxruntime: {e}"))
        return pb_utils.InferenceResponse([_write(name, array) for name, array in zip(wanted, arrays, strict=True)])

    def _inputs(self, request: Any) -> Arrays:
        inputs = _read(request)
        return {**inputs, **self.states.before(request)} if self.states.tensors else inputs

    def _run(self, wanted: list[str], inputs: Arrays) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The outputs that are wanted, and those that are states."""
        if not self.states.tensors:
            return self.session.run(wanted, inputs), []
        arrays = self.session.run([*wanted, *(state["output_name"] for state in self.states.tensors)], inputs)
        return arrays[: len(wanted)], arrays[len(wanted) :]

    def _keep(self, requests: Sequence[Any], states: Sequence[np.ndarray]) -> None:
        """Give each sequence its row of the states; such models take one row per request."""
        if not states:
            return
        for row, request in enumerate(requests):
            own = (array[row : row + 1].copy() for array in states)
            names = (state["input_name"] for state in self.states.tensors)
            self.states.after(request, dict(zip(names, own, strict=True)))

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
    options.enable_cpu_mem_arena = bool(_parameter(config, "enable_mem_arena", 1))
    options.enable_mem_pattern = bool(_parameter(config, "enable_mem_pattern", 1))
    # Threads that spin while they wait take the cores from Triton's front end and from the other instances.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return ort.InferenceSession(weights, options, providers=["CPUExecutionProvider"])


def _parameter(config: Config, name: str, default: int = 0) -> int:
    return int(config.get("parameters", {}).get(name, {}).get("string_value", default))


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
