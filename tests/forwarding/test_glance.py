"""What a glance at two small answers says is what a thorough comparison says, and it says nothing of others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from gateway.experiments.compare import Classification, Comparison, Ranking, Tensors, Texts
from gateway.forwarding.shadowing import Compared, Pair, compare
from gateway.forwarding.shadowing.glance import Glance
from gateway.steps import datatype_of
from gateway.v2.raw import to_raw

NAN, INFINITY = float("nan"), float("inf")
COMPARISONS = (
    Tensors(), Tensors(0.0, 0.0), Tensors(0.0, 0.0, 1.0), Tensors(0.5, 0.0, 0.9), Tensors(INFINITY, 0.0),
    Classification(score=0.1),
)  # fmt: skip
KINDS = {"FP32": np.float32, "FP64": np.float64, "FP16": np.float16, "INT32": np.int32, "BOOL": np.bool_}


def answer(*outputs: Any, model: str = "a", kind: str = "") -> bytes:
    """outputs: arrays, named by their place. kind: their datatype, if not the array's own."""
    message = pb.ModelInferResponse(model_name=model, model_version="1")
    for number, array in enumerate(outputs):
        datatype = kind or datatype_of(array)
        message.outputs.add(name=f"y{number}", datatype=datatype, shape=array.shape)
        message.raw_output_contents.append(to_raw(datatype, array))
    return bytes(message.SerializeToString())


def floats(*values: Any) -> Any:
    return np.array([values], np.float32)


def glance(one: bytes, other: bytes, comparison: Comparison) -> Compared | None:
    return Glance().maybe_compare(one, other, comparison)


def thorough(one: bytes, other: bytes, comparison: Comparison) -> Compared:
    return compare(Pair("m", "a", "b", "", b"", one, other), comparison)


NUMBER = st.sampled_from([0.0, -0.0, 1.0, 1.00001, -1.0, 1.1, 3e38, 1e-45, NAN, INFINITY, 255.0])
VALUES = st.lists(NUMBER, min_size=0, max_size=5)


@pytest.mark.filterwarnings("ignore")  # of numbers that an integer has not
@given(
    st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=3),
    st.sampled_from(list(KINDS)),
    st.booleans(),
    st.sampled_from(COMPARISONS),
)
def test_what_it_says_is_what_a_thorough_look_says(
    pairs: list[tuple[list[float], list[float]]], kind: str, same: bool, comparison: Comparison
) -> None:
    one = answer(*(np.array([a]).astype(KINDS[kind]) for a, _ in pairs))
    other = answer(*(np.array([a if same else b]).astype(KINDS[kind]) for a, b in pairs), model="b")
    seen, found = glance(one, other, comparison), thorough(one, other, comparison)
    if seen is None:
        return
    assert seen.agreement is not None
    assert found.agreement is not None
    assert (seen.agreement.agrees, found.agreement.agrees, found.wrong, found.wrong_here) == (True, True, [], [])
    assert dict(seen.agreement.measures) == pytest.approx(dict(found.agreement.measures), rel=1e-9, abs=1e-12)


SEEN = {
    "equal numbers": (answer(floats(1, 2)), answer(floats(1, 2), model="b"), Tensors()),
    "near numbers": (answer(floats(1, 2)), answer(floats(1, 2.0001)), Tensors()),
    "equal FP16": (answer(np.ones(300, np.float16)), answer(np.ones(300, np.float16)), Tensors()),
    "equal BF16": (answer(floats(1, 2), kind="BF16"), answer(floats(1, 2), kind="BF16"), Tensors()),
    "equal whole numbers": (answer(np.arange(1000)), answer(np.arange(1000)), Tensors()),
    "two outputs": (answer(floats(1), np.arange(3)), answer(floats(1.0001), np.arange(3)), Tensors()),
    "equal scores": (answer(floats(*range(999))), answer(floats(*range(999))), Classification()),
}


@pytest.mark.parametrize(("one", "other", "comparison"), SEEN.values(), ids=SEEN)
def test_small_answers_that_agree_are_seen(one: bytes, other: bytes, comparison: Comparison) -> None:
    seen = glance(one, other, comparison)
    assert seen is not None
    assert seen.agreement is not None
    assert seen.agreement.agrees
    found = thorough(one, other, comparison).agreement
    assert found is not None
    assert dict(seen.agreement.measures) == pytest.approx(dict(found.measures), abs=1e-9)


def typed() -> bytes:
    message = pb.ModelInferResponse.FromString(answer(floats(1)))
    message.outputs[0].contents.fp32_contents.append(1.0)
    return bytes(message.SerializeToString())


def twice() -> bytes:
    message = pb.ModelInferResponse.FromString(answer(floats(1)))
    message.MergeFrom(message)
    return bytes(message.SerializeToString())


def resized(shape: list[int]) -> bytes:
    message = pb.ModelInferResponse.FromString(answer(floats(1)))
    message.outputs[0].shape[:] = shape
    return bytes(message.SerializeToString())


OTHERS = {
    "far apart": (answer(floats(1)), answer(floats(2)), Tensors()),
    "equal NaN": (answer(floats(NAN)), answer(floats(NAN)), Tensors()),
    "equal NaN of 16 bits": (answer(floats(NAN), kind="BF16"), answer(floats(NAN), kind="BF16"), Tensors()),
    "equal infinity of 64 bits": (answer(np.array([INFINITY])), answer(np.array([INFINITY])), Tensors()),
    "another shape": (answer(floats(1, 2)), answer(floats(1, 2).T), Tensors()),
    "another name": (answer(floats(1)), answer(floats(1)).replace(b"y0", b"z0"), Tensors()),
    "no outputs": (answer(), answer(), Tensors()),
    "texts": (answer(np.array([b"a"], object)), answer(np.array([b"a"], object)), Tensors()),
    "not its size": (resized([1, 2]), resized([1, 2]), Tensors()),
    "no such shape": (resized([-1]), resized([-1]), Tensors()),
    "contents given twice": (typed(), typed(), Tensors()),
    "an output given twice": (twice(), twice(), Tensors()),
    "no message": (b"\xff\xff", b"\xff\xff", Tensors()),
    "whole numbers as scores": (answer(np.arange(3)), answer(np.arange(3)), Classification()),
    "another output's scores": (answer(floats(1)), answer(floats(1)), Classification("z")),
    "many bytes": (answer(np.ones(5000, np.float32)), answer(np.ones(5000, np.float32)), Tensors()),
    "a text's distance": (answer(floats(1)), answer(floats(1)), Texts()),
    "a ranking": (answer(floats(1)), answer(floats(1)), Ranking()),
}


@pytest.mark.parametrize(("one", "other", "comparison"), OTHERS.values(), ids=OTHERS)
def test_of_others_nothing_is_said(one: bytes, other: bytes, comparison: Comparison) -> None:
    assert glance(one, other, comparison) is None
