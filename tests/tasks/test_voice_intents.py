"""What the words of a command mean; every sentence of the grammar has a meaning."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.speech.intents import Intent, intent_of, number_of

GRAMMAR = Path(__file__).parents[2] / "model_repository" / "voice_commands" / "commands.gram"

MEANT: list[tuple[str, str, dict[str, float | str]]] = [
    ("set a timer for ten minutes", "timer.set", {"seconds": 600}),
    ("Please set the  timer for twenty five seconds please", "timer.set", {"seconds": 25}),
    ("start a timer for one hour and thirty minutes", "timer.set", {"seconds": 5400}),
    ("set a timer for half an hour", "timer.set", {"seconds": 1800}),
    ("set a timer for two and a half hours", "timer.set", {"seconds": 9000}),
    ("set a timer for an hour and a minute", "timer.set", {"seconds": 3660}),
    ("set a timer for one hundred minutes", "timer.set", {"seconds": 6000}),
    ("cancel my timer", "timer.cancel", {}),
    ("set an alarm for seven", "alarm.set", {"hour": 7, "minute": 0}),
    ("set an alarm for seven o'clock", "alarm.set", {"hour": 7, "minute": 0}),
    ("set the alarm for twelve fifty five p m", "alarm.set", {"hour": 12, "minute": 55, "half": "pm"}),
    ("stop the alarm", "alarm.cancel", {}),
    ("turn on the lights in the kitchen", "lights.on", {"room": "kitchen"}),
    ("turn off the light", "lights.off", {}),
    ("set the volume to forty percent", "volume.set", {"percent": 40}),
    ("set the volume to five", "volume.set", {"percent": 5}),
    ("turn it down", "volume.down", {}),
    ("volume up", "volume.up", {}),
    ("play some music", "music.play", {}),
    ("next song", "music.next", {}),
    ("what time is it", "time.tell", {}),
]

NOTHING = [
    "",
    "please",
    "set a timer for",
    "set a timer for twenty five",  # seconds, or minutes?
    "set a timer for one hour and thirty",
    "set a timer for zero seconds",
    "set a timer for two hours and two hours",
    "set a timer for ten minutes and one hour",
    "set a timer for twenty eleven minutes",
    "set an alarm for thirteen",
    "set an alarm for seven sixty five",
    "set an alarm for seven five",
    "turn on the lights in the",
    "turn on the lights in the garden",
    "what time",
    "stop",
    "do not set a timer for ten minutes",
    "set a timer for ten minutes never mind",
]


@pytest.mark.parametrize(("text", "name", "slots"), MEANT, ids=[text for text, _, _ in MEANT])
def test_a_command_has_its_meaning(text: str, name: str, slots: dict[str, float | str]) -> None:
    assert intent_of(text) == Intent(name, slots)


@pytest.mark.parametrize("text", NOTHING)
def test_what_is_no_whole_command_means_nothing(text: str) -> None:
    assert intent_of(text) == Intent()


def words_of(number: int) -> str:
    small = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    small_words = [*small.split(), "seventeen", "eighteen", "nineteen"]
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    if number < 20:
        return small_words[number]
    ten = tens[number // 10 - 2]
    return ten if number % 10 == 0 else f"{ten} {small_words[number % 10]}"


@given(st.integers(0, 99))
def test_a_number_that_is_said_is_understood(number: int) -> None:
    assert number_of(words_of(number)) == number


@given(st.integers(1, 99), st.integers(1, 59), st.integers(1, 59))
def test_a_timer_lasts_as_long_as_was_said(hours: int, minutes: int, seconds: int) -> None:
    said = f"{words_of(hours)} hours and {words_of(minutes)} minutes and {words_of(seconds)} seconds"
    assert intent_of(f"set a timer for {said}") == Intent(
        "timer.set", {"seconds": hours * 3600 + minutes * 60 + seconds}
    )


@given(st.text())
def test_any_text_at_all_has_an_answer(text: str) -> None:
    assert isinstance(intent_of(text), Intent)


# The grammar


def rules() -> dict[str, str]:
    text = re.sub(r"/\*.*?\*/", "", GRAMMAR.read_text(), flags=re.S)
    return dict(re.findall(r"<(\w+)> = (.+?);", text))


def sentences(expression: str) -> st.SearchStrategy[str]:
    """Any sentence of a JSGF expression: words, <rules>, (groups), [options] and |."""
    tokens = re.findall(r"[()\[\]|]|<\w+>|[\w']+", expression)

    def alternatives(at: int) -> tuple[st.SearchStrategy[str], int]:
        options = []
        while True:
            parts: list[st.SearchStrategy[str]] = []
            while at < len(tokens) and tokens[at] not in ("|", ")", "]"):
                part, at = item(at)
                parts.append(part)
            options.append(st.tuples(*parts).map(" ".join))
            if at >= len(tokens) or tokens[at] != "|":
                return st.one_of(options), at
            at += 1

    def item(at: int) -> tuple[st.SearchStrategy[str], int]:
        token = tokens[at]
        if token in ("(", "["):
            inner, at = alternatives(at + 1)
            return (inner if token == "(" else st.one_of(st.just(""), inner)), at + 1
        if token.startswith("<"):
            return sentences(rules()[token[1:-1]]), at + 1
        return st.just(token), at + 1

    return alternatives(0)[0]


@given(sentences(rules()["command"]))
def test_every_sentence_that_the_recogniser_can_hear_means_something_or_contradicts_itself(sentence: str) -> None:
    """Two amounts in the wrong order are a sentence of the grammar, as it can't say what a right order is."""
    text = " ".join(sentence.split())
    units = [["second", "minute", "hour"].index(unit) for unit in re.findall(r"\b(second|minute|hour)s? ?", text)]
    if "half" not in text and (units != sorted(units, reverse=True) or len(set(units)) != len(units)):
        assert intent_of(text) == Intent()
    else:
        assert intent_of(text).name, text
