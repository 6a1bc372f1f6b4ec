"""A model that ranks candidates by how well they fit a user's history, from one vector for each item.

The user is the mean of the vectors of the history; a score is the cosine between the user and a candidate. It gives all
scores, or the best candidates with theirs: what of it is asked for is what is computed and sent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.models.efficientnet import IR_VERSION, OPSET

BEST = 100
"""Most candidates that `items` and `best` have: more than any page shows, and 800 bytes in place of 40,000."""


def build(vectors: NDArray[np.float32]) -> bytes:
    """The ONNX model: `history` INT32 [batch, n], -1 where a place is unused, and `candidates` INT32 [batch, m] →
    `scores` FP32 [batch, m]; `items` INT32 and `best` FP32 [batch, min(m, BEST)], best first.

    vectors: [items, size]. An item whose vector is zero scores 0.
    A candidate that does not exist fails the request; a negative one too, which ONNX by itself would count from behind.
    """
    import onnx  # noqa: PLC0415  # of the extra `local`
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    constants = {
        "vectors": (vectors / np.maximum(lengths, 1e-12)).astype(np.float16),
        "zero": np.array(0, np.int32),
        "beyond": np.array(len(vectors), np.int32),
        "tiny": np.array(1e-12, np.float32),
        "axis1": np.array([1], np.int64),
        "axis2": np.array([2], np.int64),
        "most": np.array([BEST], np.int64),
    }
    node, value = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Less", ["history", "zero"], ["is_unused"]),
        node("Max", ["history", "zero"], ["liked"]),
        node("Gather", ["vectors", "liked"], ["liked_half"]),
        node("Cast", ["liked_half"], ["liked_vectors"], to=TensorProto.FLOAT),
        node("Not", ["is_unused"], ["is_used"]),
        node("Cast", ["is_used"], ["weights"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["weights", "axis1"], ["weight_row"]),
        node("MatMul", ["weight_row", "liked_vectors"], ["sum"]),  # [batch, 1, size]
        node("ReduceL2", ["sum"], ["length"], axes=[2], keepdims=1),
        node("Max", ["length", "tiny"], ["safe_length"]),
        node("Div", ["sum", "safe_length"], ["user"]),
        node("Less", ["candidates", "zero"], ["is_negative"]),
        node("Where", ["is_negative", "beyond", "candidates"], ["offered"]),
        node("Gather", ["vectors", "offered"], ["offered_half"]),
        node("Cast", ["offered_half"], ["offered_vectors"], to=TensorProto.FLOAT),
        node("Transpose", ["user"], ["user_column"], perm=[0, 2, 1]),
        node("MatMul", ["offered_vectors", "user_column"], ["score_column"]),
        node("Squeeze", ["score_column", "axis2"], ["scores"]),
        node("Shape", ["candidates"], ["count"], start=1),
        node("Min", ["count", "most"], ["k"]),
        node("TopK", ["scores", "k"], ["best", "places"], axis=1),
        node("GatherElements", ["candidates", "places"], ["items"], axis=1),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "ranking",
            [value(name, TensorProto.INT32, ["batch", f"{name}_n"]) for name in ("history", "candidates")],
            [
                value("scores", TensorProto.FLOAT, ["batch", "candidates_n"]),
                value("items", TensorProto.INT32, ["batch", "k"]),
                value("best", TensorProto.FLOAT, ["batch", "k"]),
            ],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="inference-gateway",
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def factorise(rows: NDArray[Any], columns: NDArray[Any], shape: tuple[int, int], size: int = 32) -> NDArray[np.float32]:
    """A vector for each item, [items, size], from who liked what: alternating least squares over implicit feedback.

    rows, columns: user and item of each liking, each pair once. shape: users and items.
    source: Hu, Koren, Volinsky, "Collaborative Filtering for Implicit Feedback Datasets" (2008); confidence 1 + 20.
    """
    random = np.random.default_rng(0)
    sides = [random.normal(0, 0.1, (count, size)) for count in shape]
    likes = np.zeros(shape, np.bool_)
    likes[rows, columns] = True
    for _ in range(12):
        for side, matrix in ((0, likes), (1, likes.T)):
            other = sides[1 - side]
            common = other.T @ other + 10.0 * np.eye(size)
            for row, liked in enumerate(matrix):
                found = other[liked]
                sides[side][row] = np.linalg.solve(common + 20 * found.T @ found, 21 * found.sum(0))
    return sides[1].astype(np.float32)


def most_liked(columns: NDArray[Any], items: int) -> NDArray[Any]:
    """How often each item was liked: the baseline that a recommender has to beat."""
    return np.bincount(columns, minlength=items)
