"""From scores to labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gateway.steps import StepError, WrongAnswer
from gateway.steps.scores import Softmax, SoftmaxParams, TopK, TopKParams, best_of, softmax

LABELS = "ant\nbee\ncat\ndög\n\n".encode()


def top(scores: Any, labels: bytes | None = LABELS, **params: Any) -> dict[str, list[list[Any]]]:
    step = TopK(TopKParams(labels="labels.txt" if labels else None, **params), lambda path: labels or b"")
    return {name: array.tolist() for name, array in step({"scores": np.array(scores, np.float32)}).items()}


@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(0, 4), st.integers(1, 9)), elements=st.floats(-(2.0**127), 2.0**127, width=32)
    )
)
def test_probabilities_of_a_row_add_up_to_one(scores: Any) -> None:
    made = softmax(scores)
    assert made.dtype == np.float32
    assert np.allclose(made.sum(axis=1), 1)
    assert np.array_equal(made, Softmax(SoftmaxParams(), lambda path: b"")({"scores": scores})["scores"])


def test_the_best_labels_come_first() -> None:
    made = top([[0.1, 0.4, 0.2, 0.3], [9, 8, 7, 6]], k=2)
    assert made["label"] == [[b"bee", "dög".encode()], [b"ant", b"bee"]]
    assert made["index"] == [[1, 3], [0, 1]]
    assert made["score"] == [pytest.approx([0.4, 0.3]), [9, 8]]


def test_of_equal_scores_the_lower_class_comes_first() -> None:
    assert top([[1, 2, 2, 1]], k=4)["index"] == [[1, 2, 0, 3]]


def test_there_are_never_more_labels_than_classes() -> None:
    assert top([[1, 2, 3, 4]], k=10)["index"] == [[3, 2, 1, 0]]


def test_what_is_no_number_comes_last() -> None:
    assert top([[1, float("nan"), 3, 2]], k=4)["index"] == [[2, 3, 0, 1]]


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(0, 3), st.integers(1, 40)),
        elements=st.sampled_from([0.0, -0.0, 1.0, 2.0, -3.5, float("inf"), -float("inf"), float("nan")]),
    ),
    st.integers(1, 45),
)
def test_the_best_are_those_of_a_whole_sort(scores: Any, k: int) -> None:
    assert np.array_equal(best_of(scores, k), np.argsort(-scores, axis=1, kind="stable")[:, :k])


def test_only_small_answers_are_not_worth_a_thread() -> None:
    step = TopK(TopKParams(), lambda path: b"")
    assert step.is_brief({"scores": np.zeros((4, 1024), np.float32)})
    assert not step.is_brief({"scores": np.zeros((4, 1025), np.float32)})


def test_no_rows_give_no_rows() -> None:
    assert top(np.empty((0, 4)), k=2) == {"label": [], "score": [], "index": []}


def test_softmax_changes_scores_and_not_their_order() -> None:
    made = top([[0, np.log(3), -1000, -1000]], k=2, softmax=True)
    assert made["index"] == [[1, 0]]
    assert made["score"] == [pytest.approx([0.75, 0.25])]


def test_without_a_file_a_label_is_the_number_of_its_class() -> None:
    assert top([[1, 3, 2]], labels=None, k=2)["label"] == [[b"1", b"2"]]


def test_an_unsure_answer_is_named_as_such() -> None:
    made = top([[0.02, 0.03, 0, 0], [0.05, 0.9, 0, 0]], k=2, undetermined_below=0.05, undetermined="und")
    assert made["label"] == [[b"und", b"ant"], [b"bee", b"ant"]]
    assert made["index"] == [[-1, 0], [1, 0]]
    assert made["score"] == [pytest.approx([0.03, 0.02]), pytest.approx([0.9, 0.05])]


def test_a_file_of_labels_for_another_model_is_noticed() -> None:
    with pytest.raises(WrongAnswer, match="has 3 classes, the file of labels has 4"):
        top([[1, 2, 3]])


@pytest.mark.parametrize(
    ("content", "wrong"),
    [(b"\n \n", "'labels.txt' has no labels"), (b"\xff", "'labels.txt' is not UTF-8 text (byte 0)")],
)
def test_a_file_without_labels_is_refused(content: bytes, wrong: str) -> None:
    with pytest.raises(StepError) as caught:
        TopK(TopKParams(labels="labels.txt"), lambda path: content)
    assert (caught.value.parameter, caught.value.wrong) == ("labels", wrong)
