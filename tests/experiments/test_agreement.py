"""Do two answers agree? Each task by its own measure, also for broken answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.experiments.compare import (
    CannotCompare,
    Classification,
    Detections,
    Ranking,
    Tensors,
    Texts,
    _distance,
    non_finite,
)


def floats(*values: object) -> np.ndarray:
    return np.array(values, np.float32)


class TestTensors:
    def test_near_values_agree_and_the_largest_differences_are_told(self) -> None:
        found = Tensors(absolute=0.01, relative=0.1)({"y": floats(1, 2, 0)}, {"y": floats(1.05, 2, 0.005)})
        assert found.agrees
        assert found.measures["absolute"] == pytest.approx(0.05, rel=1e-4)
        assert found.measures["relative"] == pytest.approx(0.05, rel=1e-4)

    def test_a_difference_names_its_output(self) -> None:
        found = Tensors()({"x": floats(1), "y": floats(1, 2)}, {"x": floats(1), "y": floats(1, 3)})
        assert not found.agrees
        assert found.why == "output 'y' differs in 1 of 2 elements"

    def test_nan_equals_nan_only(self) -> None:
        nan = floats(np.nan, np.inf)
        assert Tensors()({"y": nan}, {"y": nan}).agrees
        assert not Tensors(absolute=1e30)({"y": floats(1, 2)}, {"y": nan}).agrees
        assert not Tensors(absolute=1e30)({"y": nan}, {"y": floats(1, 2)}).agrees
        assert non_finite({"y": nan, "z": floats(1)}) == ["y"]

    def test_another_shape_differs_and_a_lacking_output_cannot_be_compared(self) -> None:
        assert "shape [2] and not [1]" in Tensors()({"y": floats(1)}, {"y": floats(1, 1)}).why
        with pytest.raises(CannotCompare, match="lacks output 'y'; it has z"):
            Tensors()({"y": floats(1)}, {"z": floats(1)})

    def test_half_precision_does_not_overflow(self) -> None:
        found = Tensors(absolute=1e6)({"y": np.array([60000], np.float16)}, {"y": np.array([-60000], np.float16)})
        assert found.agrees
        assert found.measures["absolute"] == pytest.approx(120_000, rel=1e-3)

    def test_what_is_equal_reaches_a_cosine_of_one(self) -> None:
        """Whose rounding makes it a little less."""
        y = floats(0.0, 0.6097578, -1.1726854, 1.0093691)
        assert Tensors(cosine=1.0)({"y": y}, {"y": y.copy()}).agrees

    def test_whole_numbers_of_64_bits_that_a_float_can_t_tell_apart_differ(self) -> None:
        one, other = np.array([2**53]), np.array([2**53 + 1])
        found = Tensors(0.0, 0.0)({"y": one}, {"y": other})
        assert not found.agrees
        assert found.measures["absolute"] == 1.0
        assert Tensors(0.0, 0.0)({"y": other}, {"y": other.copy()}).agrees
        assert Tensors(1.0, 0.0)({"y": one}, {"y": other}).agrees

    def test_directions_may_count_in_place_of_values(self) -> None:
        rule = Tensors(absolute=1e9, cosine=0.99)
        assert rule({"y": floats(1, 2)}, {"y": floats(2, 4)}).agrees
        assert not rule({"y": floats(1, 2)}, {"y": floats(2, -1)}).agrees
        assert not rule({"y": floats(1, 2)}, {"y": floats(0, 0)}).agrees

    def test_large_whole_numbers_and_empty_outputs(self) -> None:
        assert Tensors()({"y": floats()}, {"y": floats()}).agrees
        assert not Tensors(0, 0)({"y": np.array([b"a"], object)}, {"y": np.array([b"b"], object)}).agrees


class TestClassification:
    def test_the_best_class_counts(self) -> None:
        a, b = floats([0.1, 0.7, 0.2], [0.5, 0.3, 0.2]), floats([0.2, 0.6, 0.2], [0.3, 0.5, 0.2])
        found = Classification(top=2)({"p": a}, {"p": b})
        assert not found.agrees
        assert found.measures["top1"] == 0.5
        assert found.measures["topk"] == 0.75

    def test_scores_may_count_too(self) -> None:
        a, b = {"p": floats([0.1, 0.9])}, {"p": floats([0.2, 0.8])}
        assert Classification(score=0.2)(a, b).agrees
        assert not Classification(score=0.05)(a, b).agrees

    def test_nan_is_no_best_class(self) -> None:
        assert not Classification()({"p": floats([0.1, 0.9])}, {"p": floats([np.nan, np.nan])}).agrees

    def test_which_output_must_be_clear(self) -> None:
        two = {"p": floats([1, 2]), "q": floats([1, 2])}
        with pytest.raises(CannotCompare, match="say which: p, q"):
            Classification()(two, two)
        with pytest.raises(CannotCompare, match="has no scores"):
            Classification("n")({"n": np.array([1])}, {"n": np.array([1])})


def texts(*values: str) -> dict[str, np.ndarray]:
    return {"t": np.array([value.encode() for value in values], object)}


def slow_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for at, x in enumerate(a):
        following = [at + 1]
        for to, y in enumerate(b):
            following.append(min(row[to + 1] + 1, following[-1] + 1, row[to] + (x != y)))
        row = following
    return row[-1]


class TestTexts:
    @given(st.text("abc", max_size=12), st.text("abc", max_size=12))
    def test_the_edit_distance_is_the_textbooks(self, a: str, b: str) -> None:
        assert _distance(a, b) * max(len(a), len(b), 1) == pytest.approx(slow_distance(a, b))

    def test_long_texts_differ_by_their_ends_too(self) -> None:
        assert not Texts()(texts("a" * 3000), texts("a" * 3000 + "b")).agrees

    def test_a_share_of_the_characters_may_differ(self) -> None:
        assert Texts(distance=0.25)(texts("abcd", "x"), texts("abce", "x")).agrees
        found = Texts(distance=0.2)(texts("abcd", "x"), texts("abce", "x"))
        assert not found.agrees
        assert found.measures == {"equal": 0.5, "distance": 0.25}


class TestDetections:
    rule = Detections("b", "s", "c")

    @staticmethod
    def found(*boxes: tuple[float, float, float, float, float, int]) -> dict[str, np.ndarray]:
        rows = np.array(boxes, np.float32).reshape(-1, 6)
        return {"b": rows[None, :, :4], "s": rows[None, :, 4], "c": rows[None, :, 5].astype(np.int64)}

    def test_order_and_small_shifts_do_not_matter(self) -> None:
        a = self.found((0, 0, 10, 10, 0.9, 1), (20, 20, 30, 30, 0.8, 2))
        b = self.found((20, 20, 30, 31, 0.9, 2), (0, 1, 10, 10, 0.8, 1))
        assert self.rule(a, b).agrees

    def test_another_class_or_a_missing_box_differs(self) -> None:
        a = self.found((0, 0, 10, 10, 0.9, 1))
        assert not self.rule(a, self.found((0, 0, 10, 10, 0.9, 2))).agrees
        assert not self.rule(a, self.found()).agrees
        assert self.rule(a, self.found((0, 0, 10, 10, 0.9, 1), (5, 5, 6, 6, 0.1, 1))).agrees
        assert self.rule(self.found(), self.found()).agrees


class TestRanking:
    def test_scores(self) -> None:
        a = {"r": floats([3, 2, 1, 0])}
        assert Ranking(top=2)(a, {"r": floats([30, 20, 0, 10])}).agrees
        found = Ranking(top=2)(a, {"r": floats([0, 1, 2, 3])})
        assert not found.agrees
        assert found.measures == {"overlap": 0.0, "tau": -1.0}

    def test_ids_in_order(self) -> None:
        a, b = {"r": np.array([[5, 6, 7, 8]])}, {"r": np.array([[6, 5, 7, 9]])}
        found = Ranking(top=3)(a, b)
        assert found.agrees
        assert found.measures["tau"] == pytest.approx(1 / 3)

    @given(st.lists(st.integers(0, 4), min_size=2, max_size=7), st.randoms())
    def test_tau_is_the_textbooks(self, a: list[int], random: object) -> None:
        b = list(a)
        random.shuffle(b)  # type: ignore[attr-defined]
        pairs = list(itertools.combinations(range(len(a)), 2))
        x = [np.sign(a[i] - a[j]) for i, j in pairs]
        y = [np.sign(b[i] - b[j]) for i, j in pairs]
        untied = (sum(v != 0 for v in x) * sum(v != 0 for v in y)) ** 0.5
        expected = sum(u * v for u, v in zip(x, y, strict=True)) / untied if untied else 1.0
        measured = Ranking(tau=-1)({"r": floats(a)}, {"r": floats(b)}).measures["tau"]
        assert measured == pytest.approx(expected)
