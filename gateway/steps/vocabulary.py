"""steps (pure): the vocabulary of a text-to-text model: texts → numbers for its encoder, its decoder's → texts.

Uses the standard library alone and nothing of this package: the programs of models that run inside Triton get a copy
of this file beside them (`gateway.models.text_to_text`), so that both sides read and write texts alike.

A text is split into parts that are decoded one after another: a sentence is one part, a name has one for each of its
units. source of the rules: cn2en 0.0.118, `model.py`: `normalize`, `tensorsFromSentence`, `Model.translate`;
arabic-name-romanizer 0.2.0, `normalize.py`: `normalize_arabic`, `split_units`; `api.py`: `unit_roles`; `vocab.py`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

_MOST_BYTES_PER_TOKEN: Final = 64
"""A longer text can't be within its limit of words unless nearly all of it is unknown or left out."""

_MOST_SHOWN: Final = 16  # unknown words that are named to a caller


class BadText(ValueError):
    """A text that can't be given to the model; says why, and what would be right."""


class BadVocabulary(ValueError):
    """The vocabulary's file is not one."""


@dataclass(frozen=True)
class Encoded:
    """A text as numbers.

    parts:    for each part the numbers of its words, with what the model expects around them.
    unknown:  words of the text that the model does not know, each once and at most 16 of them. They were left out, or
              stand for any word, as the model has it.
    """

    parts: tuple[tuple[int, ...], ...]
    unknown: tuple[str, ...]


class Vocabulary:
    """What a vocabulary's JSON file says.

    split:        how texts are split: one of `SPLITS`.
    source:       word → its number for the encoder.
    target:       the texts of the decoder's numbers; "" for those that write nothing.
    start, end:   the number that the decoder begins with, and the one with which it says that a part is done.
    source_end:   the number after the words of a part.
    unknown_word: the number that stands for words that are not known; None: they are left out.
    most_words:   of one text, known or not.
    most_tokens:  that the decoder may make of one part.
    join:         what stands between two words of the answer.
    forbidden, forbidden_first: numbers that the decoder may not make; and those that may not be a part's first.
    """

    def __init__(self, file: bytes) -> None:
        """:raises BadVocabulary: if the file is none."""
        try:
            told = json.loads(file)
            self.split: str = told["split"]
            self.source: Mapping[str, int] = told["source"]
            self.target: Sequence[str] = told["target"]
            self.start, self.end, self.source_end = int(told["start"]), int(told["end"]), int(told["source_end"])
            self.unknown_word: int | None = told["unknown_word"]
            self.most_words, self.most_tokens = int(told["most_words"]), int(told["most_tokens"])
            self.join: str = told["join"]
            self.forbidden: Sequence[int] = told["forbidden"]
            self.forbidden_first: Sequence[int] = told["forbidden_first"]
            self._split = SPLITS[self.split]
        except (ValueError, KeyError, TypeError) as error:
            raise BadVocabulary(f"it is no vocabulary ({type(error).__name__}: {error})") from error

    def encode(self, data: bytes) -> Encoded:
        """:raises BadText: if the text is not UTF-8, empty, too long, or has no word that is known."""
        text = self._read(data)
        parts = self._split(text)
        count = sum(len(part.words) for part in parts)
        if not count:
            raise BadText("the text is empty; send one with at least one word")
        if count > self.most_words:
            raise BadText(f"the text has {count} words or characters; at most {self.most_words} are allowed")
        unknown = dict.fromkeys(word for part in parts for word in part.words if word not in self.source)
        if all(word in unknown for part in parts for word in part.words):
            shown = ", ".join(repr(word[:16]) for word in list(unknown)[:3])
            raise BadText(f"the text has no word that the model knows ({shown}); is it in the model's language?")
        return Encoded(tuple(map(self._numbers, parts)), tuple(unknown)[:_MOST_SHOWN])

    def _read(self, data: bytes) -> str:
        if len(data) > self.most_words * _MOST_BYTES_PER_TOKEN:
            most = self.most_words * _MOST_BYTES_PER_TOKEN
            raise BadText(f"the text has {len(data)} bytes; at most {most} are allowed")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise BadText(f"the text is not UTF-8 (byte {error.start})") from None

    def _numbers(self, part: Part) -> tuple[int, ...]:
        known = (self.source.get(word, self.unknown_word) for word in (*part.before, *part.words))
        return (*(number for number in known if number is not None), self.source_end)

    def piece(self, token: int, *, begins_part: bool, begins_text: bool) -> str:
        """What a number adds to the answer, its separator included."""
        word = self.target[token] if 0 <= token < len(self.target) else ""
        if not word or begins_text:
            return word
        return (" " if begins_part else self.join) + word

    def decode(self, parts: Iterable[Sequence[int]]) -> tuple[str, bool]:
        """The answer's text; and does every part of it come to its end? parts: numbers of the decoder."""
        text, is_complete = "", True
        for numbers in parts:
            begins_part = True
            for number in numbers:
                if number == self.end:
                    break
                piece = self.piece(number, begins_part=begins_part, begins_text=not text)
                begins_part = begins_part and not piece
                text += piece
            else:
                is_complete = False
        return text, is_complete


# How texts are split


@dataclass(frozen=True)
class Part:
    """words: of the text. before: what the model is told in front of them."""

    words: tuple[str, ...]
    before: tuple[str, ...] = ()


_LATIN: Final = frozenset("abcdefghijklmnopqrstuvwxyz'\" ")


def _chinese(text: str) -> list[Part]:
    """One part of characters; what is written in Latin letters are words."""
    spaced = "".join(c if c in _LATIN else f" {c} " for c in text.lower().strip())
    words = tuple(word for word in spaced.split(" ") if word and not word.isspace())
    return [Part(words)]


_PARTICLES: Final = frozenset(["عبد", "أبو", "أبي", "ابو", "ابي", "بن", "ابن", "بنت", "آل", "ذو", "ذي"])
"""They form a unit with what follows."""

_SUFFIXES: Final = frozenset(("الله", "الدين"))
"""They belong to the unit before them."""

_LEFT_OUT: Final = re.compile("[\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0640\u200b-\u200f\u061c\ufeff'‘’ʼ`´]")
"""Vowel signs, the stretching sign, invisible signs, apostrophes."""

_SEPARATES: Final = re.compile(r"""[\s،؛؟,.;:!?"()\[\]{}/\\_\-‐‑‒–—«»“”]+""")
_ALIKE: Final = str.maketrans("کیہٱ", "كيها")


def _arabic_name(text: str) -> list[Part]:
    """A part of characters for each unit of a name; what stands before them is the unit's role."""
    units = _units(_SEPARATES.sub(" ", _LEFT_OUT.sub("", unicodedata.normalize("NFKC", text)).translate(_ALIKE)))
    last = "SURNAME" if len(units) > 1 else "UNKNOWN"
    roles = [*("GIVEN" for _ in units[1:]), last]
    return [Part(tuple(unit), ("<UNK_COUNTRY>", f"<ROLE_{role}>")) for unit, role in zip(units, roles, strict=False)]


def _units(text: str) -> list[str]:
    tokens = []
    for token in text.split():
        is_attached = token.startswith("عبدال") and len(token) >= 7
        tokens += ["عبد", token[3:]] if is_attached else [token]
    units = []
    i = 0
    while i < len(tokens):
        end = i
        while tokens[end] in _PARTICLES and end + 1 < len(tokens):
            end += 1
        end += 1
        while end < len(tokens) and tokens[end] in _SUFFIXES:
            end += 1
        units.append(" ".join(tokens[i:end]))
        i = end
    return units


SPLITS: Final[Mapping[str, Callable[[str], list[Part]]]] = {"chinese": _chinese, "arabic-name": _arabic_name}
