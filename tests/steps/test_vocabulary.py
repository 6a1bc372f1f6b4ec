"""A vocabulary reads texts and writes them; whatever bytes come, it refuses them in words or gives numbers it knows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.steps.step import BadTensor, StepError
from gateway.steps.translation import PLACES, TextTokens, TokenText, VocabularyParams
from gateway.steps.vocabulary import BadText, BadVocabulary, Vocabulary

TOLD: dict[str, Any] = {
    "split": "chinese",
    "source": {"你": 2, "好": 3, "ok": 4},
    "target": ["", "", "hello", "you", "."],
    "start": 0,
    "end": 1,
    "source_end": 1,
    "unknown_word": None,
    "most_words": 6,
    "most_tokens": 8,
    "join": " ",
    "forbidden": [],
    "forbidden_first": [],
}


def vocabulary(**changes: Any) -> Vocabulary:
    return Vocabulary(json.dumps(TOLD | changes).encode())


ARABIC = vocabulary(
    split="arabic-name", join="", most_words=40, unknown_word=9, source={"<UNK_COUNTRY>": 5, "<ROLE_GIVEN>": 6, "ب": 7}
)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("你好", [2, 3, 1]), ("OK你", [4, 2, 1]), (" 你\n好 ", [2, 3, 1]), ("你。好", [2, 3, 1])],
)
def test_a_sentence_is_one_part_of_characters_and_latin_words(text: str, numbers: list[int]) -> None:
    assert vocabulary().encode(text.encode()).parts == (tuple(numbers),)


def test_unknown_words_are_named_once_and_left_out_or_stand_for_any_word() -> None:
    assert vocabulary().encode("你。好。".encode()).unknown == ("。",)
    encoded = ARABIC.encode("بتت".encode())
    assert encoded.unknown == ("ت",)
    assert encoded.parts == ((5, 9, 7, 9, 9, 1),)  # the role of a single unit is not in this vocabulary


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("محمد صلاح", 2),
        ("عبد الرحمن", 1),
        ("عبدالرحمن", 1),
        ("سيف الدين", 1),
        ("بن عبد العزيز", 1),
        ("فاطمة، الزهراء", 2),
        ("بن", 1),
    ],
)
def test_a_name_has_a_part_for_each_unit(name: str, units: int) -> None:
    known = dict.fromkeys(name, 7)
    assert len(vocabulary(split="arabic-name", most_words=40, source=known).encode(name.encode()).parts) == units


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (b"", "is empty"),
        (b" \r\n\xc2\xa0", "is empty"),
        (b"\xff", "not UTF-8"),
        ("好".encode() * 7, "7 words or characters; at most 6"),
        (b" " * 1000, "1000 bytes; at most 384"),
        ("龘".encode(), "no word that the model knows"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_in_words(data: bytes, wrong: str) -> None:
    with pytest.raises(BadText, match=wrong):
        vocabulary().encode(data)


@pytest.mark.parametrize("told", [b"", b"[]", b"{}", json.dumps(TOLD | {"split": "klingon"}).encode()])
def test_a_file_that_is_no_vocabulary_is_refused(told: bytes) -> None:
    with pytest.raises(BadVocabulary):
        Vocabulary(told)


@given(data=st.binary(max_size=60) | st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")))
@pytest.mark.parametrize("words", [vocabulary(), ARABIC], ids=["chinese", "arabic"])
def test_any_bytes_become_known_numbers_or_are_refused(words: Vocabulary, data: bytes) -> None:
    try:
        encoded = words.encode(data)
    except BadText:
        return
    known = {*words.source.values(), words.source_end, words.unknown_word}
    assert encoded.parts
    assert all(set(part) <= known and part[-1] == words.source_end for part in encoded.parts)


@given(parts=st.lists(st.lists(st.integers(-1, 6), max_size=8), max_size=3))
def test_the_pieces_put_together_are_the_text(parts: list[list[int]]) -> None:
    words, text = vocabulary(), ""
    for numbers in parts:
        begins_part = True
        for number in numbers[: numbers.index(1)] if 1 in numbers else numbers:
            piece = words.piece(number, begins_part=begins_part, begins_text=not text)
            begins_part = begins_part and not piece
            text += piece
    assert words.decode(parts) == (text, all(1 in numbers for numbers in parts))


def read(_path: str) -> bytes:
    return json.dumps(TOLD).encode()


def test_the_step_fills_rows_up_so_that_texts_of_nearby_lengths_have_one_shape() -> None:
    step = TextTokens(VocabularyParams(vocabulary="v"), read)
    made = step({"text": np.array([["你好".encode()], ["你。".encode()]], np.object_)})
    assert made["tokens"].tolist() == [[[2, 3, 1, *[-1] * (PLACES - 3)]], [[2, 1, *[-1] * (PLACES - 2)]]]
    assert made["unknown"].tolist() == [[b""], ["。".encode()]]
    assert step({"text": np.empty((0, 1), np.object_)})["tokens"].shape == (0, 1, PLACES)


def test_the_step_names_the_row_that_it_refuses() -> None:
    step = TextTokens(VocabularyParams(vocabulary="v"), read)
    with pytest.raises(BadTensor, match="'text', row 1: the text is empty"):
        step({"text": np.array([["你".encode()], [b""]], np.object_)})


def test_an_answer_that_was_cut_is_not_complete() -> None:
    step = TokenText(VocabularyParams(vocabulary="v"), read)
    made = step({"words": np.array([[[2, 3, 1, 1]], [[2, 3, 3, 3]]], np.int32)})
    assert made["text"].ravel().tolist() == [b"hello you", b"hello you you you"]
    assert made["complete"].ravel().tolist() == [True, False]


def test_a_vocabulary_that_is_not_built_is_a_finding() -> None:
    def missing(_path: str) -> bytes:
        raise FileNotFoundError(2, "No such file")

    with pytest.raises(StepError, match="cannot read 'v'"):
        TextTokens(VocabularyParams(vocabulary="v"), missing)
