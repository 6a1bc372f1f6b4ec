"""Regions of a map become straightened lines, answers of a model become text, and regions come in reading order."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from gateway.steps import StepError, WrongAnswer
from gateway.steps.reading.lines import LinePixels, LinePixelsParams, TurnedLine, TurnedLineParams, straightened
from gateway.steps.reading.page import PagePixels, PagePixelsParams
from gateway.steps.reading.regions import Rules, text_boxes
from gateway.steps.reading.text import CtcText, CtcTextParams, ReadingOrder, ReadingOrderParams, reading_order


def rectangle(x: float, y: float, width: float, height: float, angle: float = 0.0) -> Any:
    """Corners from the top left clockwise. x, y: the middle. angle: in degrees, clockwise."""
    half = np.array([(-width, -height), (width, -height), (width, height), (-width, height)]) / 2
    turn = np.radians(angle)
    return half @ np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))]) + (x, y)


def drawn(*boxes: Any, size: tuple[int, int] = (400, 300), chance: float = 0.9) -> Any:
    """A map with these regions in it."""
    picture = Image.new("L", size)
    for box in boxes:
        ImageDraw.Draw(picture).polygon([tuple(corner) for corner in box.tolist()], 255)
    return np.asarray(picture, np.float32) / 255 * np.float32(chance)


def found(chances: Any, width: int = 400, height: int = 300, **rules: Any) -> list[Any]:
    return list(text_boxes(chances, width, height, Rules(**rules)))


@settings(deadline=None, max_examples=60)
@given(
    angle=st.floats(-40, 40),
    width=st.integers(60, 150),
    height=st.integers(12, 25),
)
def test_a_region_is_found_with_its_angle_and_widened(angle: float, width: int, height: int) -> None:
    """By area × 1.6 / perimeter on every side.

    Drawing, thickening, the cut to whole pixels and their widening move a corner by up to six pixels: 5.8 of 12,000.
    """
    (box,) = found(drawn(rectangle(200, 150, width, height, angle)))
    grow = 2 * 1.6 * width * height / (2 * (width + height))
    expected = rectangle(200, 150, width + grow, height + grow, angle)
    assert np.abs(box - expected).max() < 7


@pytest.mark.parametrize(("size", "seen"), [((1400, 1000), (928, 640)), ((300, 200), (864, 576))])
def test_the_detector_sees_no_more_pixels_than_it_may_and_the_page_stays_as_it_is(
    size: tuple[int, int], seen: tuple[int, int]
) -> None:
    encoded = io.BytesIO()
    Image.new("RGB", size, "white").save(encoded, "PNG")
    page = np.empty((1, 1), np.object_)
    page[0, 0] = encoded.getvalue()
    step = PagePixels(PagePixelsParams(least_short_side=576, most_seen=600_000), lambda _: b"")
    made = step({"page": page})
    assert made["page"].shape == (1, size[1], size[0], 3)
    assert made["pixels"].shape == (1, 3, seen[1], seen[0])
    assert made["frame"].tolist() == [[1, 1, 0, *size]]


def test_regions_are_told_apart_and_corners_count_as_touching() -> None:
    apart = drawn(rectangle(100, 50, 80, 20), rectangle(100, 150, 80, 20))
    assert len(found(apart)) == 2
    diagonal = np.zeros((300, 400), np.float32)
    diagonal[100:120, 100:150] = diagonal[120:140, 150:200] = 0.9
    assert len(found(diagonal, least_score=0.2)) == 1


def test_a_region_of_any_form_is_one() -> None:
    """A comb, whose parts meet at its very end: the last rows join what looked like many regions."""
    comb = np.zeros((300, 400), np.float32)
    comb[100:150, 100:300:4] = comb[150:152, 100:298] = 0.9
    assert len(found(comb, least_score=0.1)) == 1


@pytest.mark.parametrize(
    ("chances", "rules"),
    [
        (np.zeros((300, 400), np.float32), {}),
        (drawn(rectangle(200, 150, 100, 20), chance=0.25), {}),
        (drawn(rectangle(200, 150, 100, 20), chance=0.4), {}),
        (drawn(rectangle(200, 150, 1, 1)), {}),
    ],
    ids=["nothing", "below the threshold", "a faint region", "a dot"],
)
def test_what_is_no_text_is_no_region(chances: Any, rules: dict[str, Any]) -> None:
    assert found(chances, **rules) == []


def test_boxes_are_in_pixels_of_the_page_and_stay_on_it() -> None:
    box = np.array(found(drawn(rectangle(60, 40, 119, 79)), 800, 900)[0])
    assert box.min() >= 0
    assert (box <= (799, 899)).all()
    assert box[2] == pytest.approx([2 * (119.5 + 38), 3 * (79.5 + 38)], abs=12)


def test_only_so_many_candidates_are_looked_at_the_largest_first() -> None:
    boxes = [rectangle(200, 20 + 40 * number, 100 + 20 * number, 16) for number in range(6)]
    widths = [box[1, 0] - box[0, 0] for box in found(drawn(*boxes), candidates=2)]
    assert len(widths) == 2
    assert min(widths) > 180


def test_a_slanted_line_is_straightened() -> None:
    page = Image.new("RGB", (400, 300), "white")
    box = rectangle(200, 150, 200, 40, 20)
    ImageDraw.Draw(page).polygon([tuple(corner) for corner in box.tolist()], "black")
    line = np.asarray(straightened(page, box))
    assert np.abs(np.array(line.shape) - (40, 200, 3)).max() <= 1
    assert line[2:-2, 2:-2].max() < 30


def test_a_standing_line_is_laid_down() -> None:
    page = Image.new("RGB", (400, 300), "white")
    ImageDraw.Draw(page).rectangle((100, 50, 140, 100), "red")
    line = np.asarray(straightened(page, rectangle(120, 150, 40, 200)))
    assert line.shape == (40, 200, 3)
    assert line[20, 5].tolist() == [255, 0, 0], "what was above is on the left"
    assert line[20, 195].tolist() == [255, 255, 255]


def test_a_line_is_padded_to_its_class_of_widths() -> None:
    step = LinePixels(LinePixelsParams(least_width=100, round_to=32), lambda _: b"")
    for width, padded in ((1, 100), (100, 100), (101, 132), (132, 132), (133, 164)):
        line = np.full((1, 48, width, 3), (255, 0, 0), np.uint8)
        pixels = step({"line": line})["pixels"]
        assert pixels.shape == (1, 3, 48, padded)
        assert pixels[0, :, 0, 0].tolist() == [-1, -1, 1], "blue, green, red"
        assert not pixels[0, :, :, width:].any()


def test_only_a_line_that_is_surely_upside_down_is_turned() -> None:
    step = TurnedLine(TurnedLineParams(), lambda _: b"")
    lines = np.arange(3 * 2 * 4 * 3, dtype=np.uint8).reshape(3, 2, 4, 3)
    direction = np.array([[0.05, 0.95], [0.2, 0.8], [0.99, 0.01]], np.float32)
    turned = step({"line": lines, "direction": direction})["line"]
    assert (turned[0] == lines[0, ::-1, ::-1]).all()
    assert (turned[1:] == lines[1:]).all()


def ctc(*index: list[int], chance: float = 0.5) -> dict[str, Any]:
    step = CtcText(CtcTextParams(alphabet="a"), lambda _: "a\nb\n\u3000\n".encode())
    places = np.array(index, np.int32)
    return step({"index": places, "chance": np.full(places.shape, chance, np.float32)})


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ([1, 1, 2], "ab"),
        ([1, 0, 1, 1, 0], "aa"),
        ([0, 0, 0, 0], ""),
        ([2, 4, 4, 1, 3], "b a\u3000"),
        ([], ""),
    ],
    ids=["repeated", "a blank between", "blanks", "spaces", "no places"],
)
def test_what_is_repeated_counts_once_and_blanks_go(index: list[int], text: str) -> None:
    made = ctc(index)
    assert made["text"].tolist() == [text.encode()]
    assert made["score"].tolist() == [0.5 if text else 0.0]


def test_a_class_that_the_alphabet_lacks_is_the_models_fault() -> None:
    with pytest.raises(WrongAnswer, match="has 5; the alphabet has 5 classes"):
        ctc([1, 5])


def test_an_alphabet_with_a_hole_is_refused() -> None:
    with pytest.raises(StepError, match="no character on line 2"):
        CtcText(CtcTextParams(alphabet="a"), lambda _: b"a\n\nb\n")


@pytest.mark.parametrize("slant", [-8.0, 0.0, 8.0])
def test_lines_are_read_along_the_slant_of_the_page(slant: float) -> None:
    """Three lines of three parts each, of which the later stand lower or higher on the page than other lines' parts."""
    turn = np.radians(slant)
    matrix = np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))])
    boxes = np.array(
        [rectangle(200 * part + 100, 60 * line + 30, 180, 30) @ matrix for line in range(3) for part in range(3)]
    )
    shuffled = np.random.default_rng(1).permutation(9)
    assert shuffled[reading_order(boxes[shuffled])].tolist() == list(range(9))


def test_lines_that_were_hardly_read_are_left_out_row_by_row() -> None:
    box = np.stack([rectangle(100, 50 + 50 * number, 100, 20) for number in range(3)]).astype(np.float32)
    step = ReadingOrder(ReadingOrderParams(), lambda _: b"")
    made = step(
        {
            "text": np.array([[b"three", b"two", b"one"], [b" ", b"faint", b""]], np.object_),
            "score": np.array([[0.9, 0.8, 0.7], [0.9, 0.4, 0.0]], np.float32),
            "box": np.stack([box[::-1], box]),
            "lines": np.array([[3], [2]], np.int32),
        }
    )
    assert made["lines"].tolist() == [[3], [0]]
    assert made["text"].tolist() == [[b"one", b"two", b"three"], [b"", b"", b""]]
    assert made["score"][0].tolist() == pytest.approx([0.7, 0.8, 0.9])
