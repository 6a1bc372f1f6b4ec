"""langid: py3langid's naive Bayes model as an ONNX graph, and the automaton that finds its features as NumPy tables.

The graph takes counted features and not text: an automaton steps once per byte, which a graph of tensor operators does
a thousand times slower than a plain loop. What comes out are calibrated probabilities, one per language, so that
Triton's classification extension and any client can use them as they are.

source: py3langid 0.4.0, `langid.py`: `_sparse_score`, `_decide`; `modelio.py`: `load_model`.
"""

from __future__ import annotations

import io
import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.models.efficientnet import IR_VERSION, OPSET

TABLES = ("next_state", "row_base", "feature")


@dataclass(frozen=True)
class Source:
    """What py3langid's model file says.

    weights:     [features, columns], float16: log-likelihood of a feature in a language.
    prior:       [columns].
    columns:     the language of each column; two scripts of one language have two columns.
    next_state:  [rows * 256]: the state after `row_base[state] + byte`.
    row_base:    [states]: where the state's row begins in `next_state`.
    feature:     [states]: what was found on reaching the state, -1 if nothing.
    """

    weights: NDArray[np.float16]
    prior: NDArray[np.float32]
    columns: tuple[str, ...]
    next_state: NDArray[np.uint32]
    row_base: NDArray[np.uint32]
    feature: NDArray[np.int32]


def read(wheel: Path) -> Source:
    """wheel: the folder with the unpacked `sources.LANGID`."""
    raw = lzma.decompress((wheel / "py3langid/data/model.npz.xz").read_bytes())
    with np.load(io.BytesIO(raw), allow_pickle=False) as data:
        return Source(
            weights=data["ptc"],
            prior=data["pc"],
            columns=tuple(data["classes"].tolist()),
            next_state=data["nextmove"].astype(np.uint32),
            row_base=data["nextmove_row"].astype(np.uint32) << 8,
            feature=data["out_feat"].astype(np.int32),
        )


def labels(source: Source) -> list[str]:
    """ISO 639 codes in the order of the model's output: each language once, at the place of its first column."""
    return list(dict.fromkeys(source.columns))


def tables(source: Source) -> dict[str, bytes]:
    """The automaton: name of the table → its `.npy` file."""
    return {name: _npy(getattr(source, name)) for name in TABLES}


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def build(source: Source) -> bytes:
    """The ONNX model, see `model_repository/README.md` for its tensors.

    probabilities = softmax((log(1 + counts) @ weights[features] + prior) / sqrt(length)), with the columns of one
    language added up; a text without any feature has equal scores.
    """
    import onnx  # noqa: PLC0415  # of the extra `local`
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

    names = labels(source)
    merge = np.zeros((len(source.columns), len(names)), np.float32)
    merge[np.arange(len(source.columns)), [names.index(column) for column in source.columns]] = 1
    constants: Mapping[str, NDArray[Any]] = {
        "weights": source.weights,
        "prior": source.prior,
        "merge": merge,
        "axis1": np.array([1], np.int64),
        "one": np.float32(1),  # type: ignore[dict-item]  # a scalar is what ONNX wants here
        "zero": np.float32(0),  # type: ignore[dict-item]
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["weights", "features"], ["rows_half"]),  # [batch, n, columns]
        node("Cast", ["rows_half"], ["rows"], to=TensorProto.FLOAT),
        node("Add", ["counts", "one"], ["counts_plus_one"]),
        node("Log", ["counts_plus_one"], ["evidence"]),  # 0 where a place is unused
        node("Unsqueeze", ["evidence", "axis1"], ["evidence_row"]),  # [batch, 1, n]
        node("MatMul", ["evidence_row", "rows"], ["sums_row"]),
        node("Squeeze", ["sums_row", "axis1"], ["sums"]),
        node("Add", ["sums", "prior"], ["scores"]),
        node("ReduceMax", ["counts"], ["most"], axes=[1], keepdims=1),
        node("Greater", ["most", "zero"], ["has_features"]),
        node("Where", ["has_features", "scores", "zero"], ["known_scores"]),
        node("Cast", ["length"], ["length_float"], to=TensorProto.FLOAT),
        node("Max", ["length_float", "one"], ["length_positive"]),
        node("Sqrt", ["length_positive"], ["temperature"]),  # keeps the probabilities calibrated over text lengths
        node("Div", ["known_scores", "temperature"], ["cooled"]),
        node("Softmax", ["cooled"], ["by_column"], axis=1),
        node("MatMul", ["by_column", "merge"], ["probabilities"]),
    ]
    value = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "langid",
            [
                value("features", TensorProto.INT32, ["batch", "n"]),
                value("counts", TensorProto.FLOAT, ["batch", "n"]),
                value("length", TensorProto.INT32, ["batch", 1]),
            ],
            [value("probabilities", TensorProto.FLOAT, ["batch", len(names)])],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="inference-gateway",
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))
