"""Pure: what the words of a command mean.

Whole sentences only: of "set a timer for twenty five" nobody knows whether minutes or seconds would have followed, so
it means nothing. The sentences are those of `model_repository/voice_commands/commands.gram`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

Value = float | str


@dataclass(frozen=True)
class Intent:
    """What is wanted. name: "" if the words are no command. slots: the unit of a number is in the slot's name."""

    name: str = ""
    slots: Mapping[str, Value] = field(default_factory=dict)


NONE: Final = Intent()

_SMALL: Final = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS: Final = dict(
    zip(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], range(20, 100, 10), strict=True)
)
_SECONDS: Final = {"second": 1, "seconds": 1, "minute": 60, "minutes": 60, "hour": 3600, "hours": 3600}
_LOUDEST: Final = 100


def intent_of(text: str) -> Intent:
    """The intent of a recognised text. Case, spaces and a "please" at either end do not matter."""
    words = " ".join(text.lower().split())
    words = words.removeprefix("please ").removesuffix(" please")
    for pattern, make in _COMMANDS:
        found = re.fullmatch(pattern, words)
        if found is not None:
            return make(found) or NONE
    return NONE


def number_of(words: str) -> int | None:
    """The number from 0 to 100 that the words say, None if they say none."""
    parts = words.split()
    if parts in (["one", "hundred"], ["a", "hundred"]):
        return 100
    if len(parts) == 1:
        return _SMALL.index(parts[0]) if parts[0] in _SMALL else _TENS.get(parts[0])
    if len(parts) == 2 and parts[0] in _TENS and parts[1] in _SMALL[1:10]:
        return _TENS[parts[0]] + _SMALL.index(parts[1])
    return None


def seconds_of(words: str) -> float | None:
    """The duration that the words say, None if they say none, or one of no length."""
    if words == "half an hour":
        return 1800.0
    half = re.fullmatch(r"(.+) and a half (minutes|hours)", words)
    if half is not None:
        number = number_of(half[1])
        return None if number is None else (number + 0.5) * _SECONDS[half[2]]
    amounts = [_amount(part) for part in re.split(r" and ", words)]
    units = [amount[1] for amount in amounts if amount is not None]
    # "ten minutes and two hours" and "one hour and two hours" are more likely misheard than meant.
    if len(units) != len(amounts) or sorted(set(units), reverse=True) != units:
        return None
    return sum((number * unit for number, unit in filter(None, amounts)), 0.0) or None


def _amount(words: str) -> tuple[int, int] | None:
    number, _, unit = words.rpartition(" ")
    count = 1 if number in ("a", "an") else number_of(number)
    return None if count is None or unit not in _SECONDS else (count, _SECONDS[unit])


def _timer(found: re.Match[str]) -> Intent | None:
    seconds = seconds_of(found[1])
    return None if seconds is None else Intent("timer.set", {"seconds": seconds})


def _alarm(found: re.Match[str]) -> Intent | None:
    hour = number_of(found[1])
    on_the_hour = found[2] in (None, "o'clock")
    minute = 0 if on_the_hour else number_of(found[2])
    if hour is None or minute is None or not (on_the_hour or 10 <= minute <= 59):  # "seven five" is nothing
        return None
    half: dict[str, Value] = {"half": found[3].replace(" ", "")} if found[3] else {}
    return Intent("alarm.set", {"hour": float(hour), "minute": float(minute), **half})


def _lights(found: re.Match[str]) -> Intent:
    room = {"room": found[2]} if found[2] else {}
    return Intent(f"lights.{found[1]}", room)


def _volume(found: re.Match[str]) -> Intent | None:
    percent = number_of(found[1])
    return None if percent is None or percent > _LOUDEST else Intent("volume.set", {"percent": float(percent)})


def _named(name: str) -> Callable[[re.Match[str]], Intent]:
    return lambda found: Intent(name.format(*found.groups()))


_HOUR: Final = "|".join(_SMALL[1:13])
_COMMANDS: Final[tuple[tuple[str, Callable[[re.Match[str]], Intent | None]], ...]] = (
    (r"(?:set|start) (?:a|the) timer for (.+)", _timer),
    (r"(?:stop|cancel) (?:the|my) timer", _named("timer.cancel")),
    (rf"set (?:an|the) alarm for ({_HOUR})(?: ((?!a m|p m).+?))?(?: (a m|p m))?", _alarm),
    (r"(?:stop|cancel) (?:the|my) alarm", _named("alarm.cancel")),
    (r"turn (on|off) the lights?(?: in the (kitchen|bedroom|bathroom|office|hall))?", _lights),
    (r"set the volume to (.+?)(?: percent)?", _volume),
    (r"(?:volume|turn it) (up|down)", _named("volume.{}")),
    (r"(play|pause|stop) (?:(?:some|the) )?music", _named("music.{}")),
    (r"(next|previous) song", _named("music.{}")),
    (r"what time is it", _named("time.tell")),
)
