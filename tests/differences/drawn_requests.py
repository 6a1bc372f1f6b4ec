"""What callers may send, as hypothesis strategies: right in most cases, and with up to two oddities.

A request is drawn under its model's own name; `ways` sends it under others. What Triton 2.51
itself hangs on (a tensor without rows and columns) or dies of (a classification of texts) is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import serialize_byte_tensor

UNARY = ("identity_fp32", "identity_bytes", "identity_int64", "counted", "silent", "words", "batched_echo")
UNARY += ("params_echo", "classifier", "fails", "repeat", "größe")
MODELS = (*UNARY, "accumulate", "slow", "changes")
"""What is sent to."""

FORGED = (
    *("it broke: ä", "cannot parse: Server is stopping", "Socket closed", "failed to connect to all addresses"),
    *("This protocol is restricted, expecting header 'triton-grpc-protocol-x'", "", "%41%zz\n\t", "ä" * 300),
    *("Request for unknown model: 'x' has no available versions, it says", "Stream removed", "GOAWAY received"),
)
"""Texts that a model may fail with, of which some sound like a server's."""

CODES = ("INTERNAL", "NOT_FOUND", "INVALID_ARG", "UNSUPPORTED", "ALREADY_EXISTS", "CANCELLED", "UNAVAILABLE", "UNKNOWN")


@dataclass(frozen=True)
class Asked:
    """A ModelInferRequest under the model's own name, and what goes beside it."""

    message: Any
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    compression: grpc.Compression | None = None

    def to(self, model: str) -> Any:
        """The same request to another name."""
        message = pb.ModelInferRequest()
        message.CopyFrom(self.message)
        message.model_name = model
        return message


TYPED = {"FP32": "fp32_contents", "INT32": "int_contents", "INT64": "int64_contents", "BYTES": "bytes_contents"}
NUMPY = {"FP32": np.float32, "INT32": np.int32, "INT64": np.int64}


def put(message: Any, values: Any, datatype: str, *, name: str = "IN", typed: bool = False) -> None:
    """Add an input."""
    array = np.asarray(values, np.object_ if datatype == "BYTES" else NUMPY[datatype])
    tensor = message.inputs.add(name=name, datatype=datatype, shape=array.shape)
    if typed:
        getattr(tensor.contents, TYPED[datatype]).extend(array.flatten().tolist())
    elif datatype == "BYTES":
        message.raw_input_contents.append(serialize_byte_tensor(array).item() if array.size else b"")
    else:
        message.raw_input_contents.append(array.tobytes())


texts = st.text(max_size=12)
small = st.integers(-(2**31), 2**31 - 3)
floats = st.floats(width=32, allow_nan=False)
words = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3).map(" ".join).map(str.encode)


def table(elements: st.SearchStrategy[Any], *, rows: int = 3, columns: int | None = None) -> st.SearchStrategy[Any]:
    """Rows of one width."""
    widths = st.integers(0, 3) if columns is None else st.just(columns)
    return widths.flatmap(
        lambda width: st.lists(st.lists(elements, min_size=width, max_size=width), min_size=1, max_size=rows)
    )


INPUTS: dict[str, tuple[str, st.SearchStrategy[Any]]] = {
    "identity_fp32": ("FP32", table(floats)),
    "größe": ("FP32", table(floats)),
    "identity_bytes": ("BYTES", table(st.binary(max_size=9))),
    "identity_int64": ("INT64", table(st.integers(-(2**63), 2**63 - 1))),
    "counted": ("INT32", table(small)),
    "silent": ("INT32", table(small)),
    "words": ("BYTES", table(words, columns=1)),
    "batched_echo": ("INT32", table(small, columns=1)),
    "params_echo": ("INT32", st.just([0])),
    "classifier": ("FP32", table(floats, columns=4)),
    "repeat": ("INT32", st.lists(st.integers(0, 3), min_size=1, max_size=1)),
}


@st.composite
def right(draw: st.DrawFn, model: str) -> Any:
    """A request that Triton answers, or that the model was told to fail."""
    message = pb.ModelInferRequest(model_name=model)
    if model == "fails":
        put(message, [draw(st.sampled_from(FORGED)).encode()], "BYTES")
        put(message, [draw(st.sampled_from(CODES)).encode()], "BYTES", name="CODE")
    else:
        datatype, values = INPUTS[model]
        put(message, draw(values), datatype, typed=draw(st.integers(0, 4)) == 0)
    return message


ids = st.one_of(
    st.sampled_from(["", "1", "7", "0", "-1", "1:2", "%20", "a" * 1000, str(2**64), "größe/1", " ", "\x00", "a\nb"]),
    st.text(max_size=20),
)
versions = st.sampled_from(["1", "2", "9", "0", "-1", "abc", "01", " 1", "1.0", str(2**63), "9" * 1000, "²"])
parameter_values = st.one_of(
    st.tuples(st.just("bool_param"), st.booleans()),
    st.tuples(st.just("int64_param"), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just("string_param"), texts),
    st.tuples(st.just("double_param"), st.floats(allow_nan=False, allow_infinity=False)),
    st.tuples(st.just("uint64_param"), st.integers(0, 2**64 - 1)),
)
# Nothing that begins a sequence at a model that has none, nor a `timeout` that decides by the clock.
reserved = st.sampled_from(["priority", "headers", "binary_data_output", "triton_mine", "sequence_end", "sequence_id"])


def _id(draw: st.DrawFn, message: Any) -> None:
    message.id = draw(ids)


def _version(draw: st.DrawFn, message: Any) -> None:
    message.model_version = draw(versions)


good_values = st.sampled_from([("bool_param", True), ("int64_param", -3), ("string_param", "ä"), ("string_param", "")])


def _parameters(draw: st.DrawFn, message: Any) -> None:
    """Several good ones, or one of any kind: of several bad ones Triton names whichever comes first in its map."""
    if message.parameters:
        return
    several = st.dictionaries(texts.map("x-".__add__), good_values, max_size=3)
    for key, (kind, value) in draw(several | st.dictionaries(texts | reserved, parameter_values, max_size=1)).items():
        setattr(message.parameters[key], kind, value)


def _empty_final_response(draw: st.DrawFn, message: Any) -> None:
    message.parameters["triton_enable_empty_final_response"].bool_param = draw(st.booleans())


def _parameter_without_a_value(draw: st.DrawFn, message: Any) -> None:
    if not message.parameters:
        message.parameters[draw(texts)].SetInParent()


def _unknown_field(draw: st.DrawFn, message: Any) -> None:
    message.MergeFromString(draw(st.sampled_from([b"\xf8\x07\x05", b"\xfa\x07\x03abc", b"\xfd\x07abcd"])))


def _outputs(draw: st.DrawFn, message: Any) -> None:
    output = message.outputs.add(name=draw(st.sampled_from(["OUT", "OUT", "OUTT", ""])))
    key = draw(st.sampled_from(["", "classification", "binary_data", "shared_memory_region", "mine"]))
    if key:
        kind, value = draw(parameter_values)
        if key == "classification":
            if message.inputs[0].datatype not in ("FP32", "INT64"):
                return
            kind, value = "int64_param", draw(st.integers(1, 9))
        setattr(output.parameters[key], kind, value)


def _wrong_input(draw: st.DrawFn, message: Any) -> None:
    tensor = message.inputs[0]
    match draw(st.integers(0, 6)):
        case 0:
            tensor.name = draw(st.sampled_from(["INN", "", "ä"]))
        case 1:
            tensor.datatype = draw(st.sampled_from(["FP31", "", "FP64", "INT16"]))
        case 2:
            tensor.shape[:] = draw(st.sampled_from([[1], [9, 1], [1, -2], [2**40, 2**40], [1, 2, 3], []]))
        case 3:
            message.raw_input_contents[:] = draw(st.lists(st.binary(max_size=9), max_size=2))
        case 4:
            tensor.parameters["shared_memory_region"].string_param = "nowhere"
        case 5:
            message.inputs.add(name=draw(st.sampled_from(["IN", "MORE"])), datatype="INT32", shape=[1, 1])
        case 6:
            tensor.contents.int_contents.append(1)


def _other_model(draw: st.DrawFn, message: Any) -> None:
    message.model_name = draw(st.sampled_from(["nobody", "", "ä", "a" * 150, "identity_fp32/1", "IDENTITY_FP32"]))


Oddity = Callable[[st.DrawFn, Any], None]
ODDITIES: tuple[Oddity, ...] = (_id, _id, _version, _version, _parameters, _empty_final_response)
ODDITIES += (_parameter_without_a_value, _unknown_field, _outputs, _wrong_input, _other_model)

metadata = st.lists(
    st.tuples(st.sampled_from(["x-a", "x-request-id", "authorization", "baggage"]), st.text("aé".replace("é", "b c")))
    .map(lambda pair: (pair[0], pair[1].strip()))
    .filter(lambda pair: pair[1] != "")
    | st.tuples(st.just("x-a-bin"), st.binary(max_size=9)),
    max_size=2,
)
compressions = st.sampled_from([None, None, grpc.Compression.Gzip, grpc.Compression.Deflate])


@st.composite
def asked(draw: st.DrawFn, model: str) -> Asked:
    message = draw(right(model))
    for oddity in draw(st.lists(st.sampled_from(ODDITIES), max_size=2, unique=True)):
        oddity(draw, message)
    return Asked(message, tuple(draw(metadata)), draw(compressions))


def rounds(models: tuple[str, ...] = UNARY) -> st.SearchStrategy[list[Asked]]:
    """What several callers ask of one model at the same time."""
    return st.sampled_from(models).flatmap(lambda model: st.lists(asked(model), min_size=1, max_size=5))


@dataclass(frozen=True)
class Step:
    value: int
    start: bool = False
    end: bool = False


@st.composite
def sequences(draw: st.DrawFn) -> list[Step]:
    """Mostly well begun; always ended, for an open one holds a place at Triton for a minute."""
    values = draw(st.lists(st.integers(-99, 99), min_size=1, max_size=4))
    first = Step(values[0], start=draw(st.integers(0, 3)) > 0)
    return [first, *(Step(value, start=draw(st.integers(0, 9)) == 0) for value in values[1:]), Step(1, end=True)]


def large_and_even() -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of 1.5 MiB that real callers compress by far more than a hundred times."""
    rng = np.random.default_rng(7)
    columns = 192 * 1024
    mask = np.zeros((1, columns), np.int64)
    mask[0, 1000:3000] = 1
    ids = np.zeros((1, columns), np.int64)
    ids[0, :1000] = rng.integers(0, 30_000, 1000)
    yield "zeros", np.zeros((1, columns), np.int64)
    yield "mask", mask
    yield "padded ids", ids


def load_config(batches: bool) -> str:
    """For RepositoryModelLoad of `changes`."""
    dims = [1] if batches else [-1, 1]
    tensor = {"data_type": "TYPE_INT32", "dims": dims}
    config: dict[str, object] = {"backend": "python", "max_batch_size": 8 if batches else 0}
    config |= {"input": [{"name": "IN", **tensor}], "output": [{"name": "OUT", **tensor}]}
    return json.dumps(config | {"instance_group": [{"kind": "KIND_CPU", "count": 1}]})
