"""Sans-IO: audio goes in, what to ask of models and what to tell the caller comes out.

Whoever drives it asks `next_step` until that is None, does what each step says, and gives back the answers; None means
that more audio is wanted, or that all is over. One thing is asked at a time, so the order of events does not depend on
how fast models answer, and windows are cut at multiples of their length, so it does not depend on the pieces in which
audio comes.

The rules for where speech begins and ends are those of silero-vad's `VADIterator`: it begins with a window at or above
`BEGINS`, and ends where `SILENCE` windows have followed each other of which none was at or above `BEGINS` again, the
first of them below `ENDS`. source: silero_vad 6.2.3, `utils_vad.py`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

RATE: Final = 16_000
"""Samples per second."""

SAMPLE: Final = 2
"""Bytes of a sample."""

WINDOW: Final = 512
"""Samples that the detector hears at once: 32 ms."""

BEGINS: Final = 0.5
ENDS: Final = 0.35
"""Probabilities of speech. source: `threshold` and `threshold - 0.15` of `VADIterator`."""

SILENCE: Final = 15
"""Windows without speech that end an utterance: 480 ms, as people pause within a command for less."""

BEFORE: Final = 10
"""Windows before the first one with speech that are read too: a soft beginning is no speech yet."""

AFTER: Final = 5
"""Windows of the silence after it that are read; the others would cost time and say nothing."""

LONGEST: Final = 469
"""Windows of the longest utterance: 15 s. A command is shorter, and this is what a caller may make us keep."""

LONGEST_CONVERSATION: Final = 60 * 60 * RATE
"""Samples of the longest conversation: an hour."""

MOST_AT_ONCE: Final = 1 << 20
"""Bytes of one piece, 32 s: with what waits to be heard this bounds what a conversation keeps."""

_BYTES: Final = WINDOW * SAMPLE

_FILES: Final = {b"RIFF": "WAV", b"OggS": "Ogg", b"fLaC": "FLAC", b"ID3\x03": "MP3", b"ID3\x04": "MP3"}
_MAGIC: Final = 4  # bytes of each


class WrongAudio(ValueError):
    """The audio can't be heard; the text says what would be right."""


# Steps


@dataclass(frozen=True)
class Detect:
    """Ask the detector about a window, and give its answer to `detected`."""

    window: bytes
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class Recognise:
    """Ask the recogniser for the words, and say `recognised`. is_cut: it is only the beginning of what is said."""

    audio: bytes
    is_cut: bool


@dataclass(frozen=True)
class SpeechStarted:
    """Tell the caller. at: samples since the beginning of the audio."""

    at: int


@dataclass(frozen=True)
class SpeechEnded:
    """Tell the caller. at: samples since the beginning of the audio."""

    at: int
    is_cut: bool


@dataclass(frozen=True)
class Heard:
    """Tell the caller which words were read, and what they mean. is_cut: as in `Recognise`."""

    text: str
    score: float
    is_cut: bool


@dataclass(frozen=True)
class Ended:
    """Tell the caller that all audio was heard. samples: of all audio."""

    samples: int
    utterances: int


Event = SpeechStarted | SpeechEnded | Heard | Ended
Step = Detect | Recognise | Event


class Conversation:
    """One caller's audio."""

    def __init__(self) -> None:
        self._unheard = bytearray()
        self._steps: deque[Step] = deque()
        self._asked: Step | None = None  # whose answer is awaited
        self._recent: deque[bytes] = deque(maxlen=BEFORE)  # windows before speech
        self._spoken: list[bytes] | None = None  # windows of the utterance that is under way
        self._quiet_since: int | None = None  # number of the window that was the first without speech
        self._windows = 0  # that were sent to the detector
        self._bytes_in = 0  # of all audio
        self._utterances = 0
        self._no_more = False
        self._is_over = False  # has the detector heard the last window?
        self._has_ended = False  # has the caller been told so?

    @property
    def is_open_at_detector(self) -> bool:
        """Has the detector heard a first window, and no last one?"""
        return self._windows > 0 and not self._is_over

    # What comes in

    def take(self, audio: bytes) -> None:
        """raises: WrongAudio"""
        if self._no_more:
            raise WrongAudio("audio came after `end`; begin another conversation for it")
        if len(audio) > MOST_AT_ONCE:
            raise WrongAudio(
                f"a message has {len(audio)} bytes of audio; send at most {MOST_AT_ONCE} at once, which is 32 s"
            )
        began = self._bytes_in
        self._bytes_in += len(audio)
        if self._bytes_in > LONGEST_CONVERSATION * SAMPLE:
            raise WrongAudio("audio is longer than an hour; begin another conversation for what follows")
        self._unheard += audio
        if began < _MAGIC <= self._bytes_in and (kind := _FILES.get(bytes(self._unheard[:_MAGIC]))):
            raise WrongAudio(f"audio begins as a {kind} file does; send its samples alone, as PCM16 at 16000 Hz")

    def end(self) -> None:
        """No more audio will come. raises: WrongAudio"""
        if self._bytes_in % SAMPLE:
            raise WrongAudio(
                "audio ends within a sample: PCM16 has two bytes for each, and an odd number of bytes came"
            )
        self._no_more = True

    def detected(self, speech: float) -> None:
        """The detector's answer. speech: the probability, in [0, 1]."""
        asked = self._asked
        assert isinstance(asked, Detect)  # noqa: S101  # whoever drives it answers what was asked
        self._asked = None
        if self._spoken is None:
            self._heard_before_speech(asked.window, speech)
        else:
            self._heard_in_speech(self._spoken, asked, speech)
        if asked.is_last:
            if self._spoken is not None:
                self._finish(min(self._windows * WINDOW, self._bytes_in // SAMPLE), is_cut=False)
            self._is_over = True

    def recognised(self, text: str, score: float) -> None:
        """The recogniser's answer."""
        asked = self._asked
        assert isinstance(asked, Recognise)  # noqa: S101
        self._asked = None
        self._steps.appendleft(Heard(text, score, asked.is_cut))

    # What goes out

    def next_step(self) -> Step | None:
        """What to do next. None: more audio is wanted, an answer is awaited, or all is over."""
        if self._asked is not None:
            return None
        if self._steps:
            step = self._steps.popleft()
            if isinstance(step, Recognise):
                self._asked = step
            return step
        window = self._maybe_window()
        if window is not None:
            self._asked = window
        return window or self._maybe_ended()

    def _maybe_window(self) -> Detect | None:
        is_last = self._no_more and len(self._unheard) < _BYTES
        if self._is_over or (len(self._unheard) < _BYTES and not is_last):
            return None
        if is_last and not self._bytes_in:
            self._is_over = True
            return None
        window = bytes(self._unheard[:_BYTES]).ljust(_BYTES, b"\0")  # the end is filled with silence
        del self._unheard[:_BYTES]
        self._windows += 1
        return Detect(window, self._windows == 1, is_last)

    def _maybe_ended(self) -> Ended | None:
        if not self._is_over or self._has_ended:
            return None
        self._has_ended = True
        return Ended(self._bytes_in // SAMPLE, self._utterances)

    # Where speech is

    def _heard_before_speech(self, window: bytes, speech: float) -> None:
        if speech < BEGINS:
            self._recent.append(window)
            return
        self._spoken = [*self._recent, window]
        self._recent.clear()
        self._quiet_since = None
        self._steps.append(SpeechStarted((self._windows - 1) * WINDOW))

    def _heard_in_speech(self, spoken: list[bytes], asked: Detect, speech: float) -> None:
        spoken.append(asked.window)
        if speech >= BEGINS:
            self._quiet_since = None
        elif speech < ENDS and self._quiet_since is None:
            self._quiet_since = self._windows - 1
        if self._quiet_since is not None and self._windows - self._quiet_since >= SILENCE:
            del spoken[AFTER - SILENCE :]
            self._finish(self._quiet_since * WINDOW, is_cut=False)
        elif len(spoken) >= LONGEST and not asked.is_last:
            self._finish(self._windows * WINDOW, is_cut=True)

    def _finish(self, at: int, *, is_cut: bool) -> None:
        assert self._spoken is not None  # noqa: S101
        self._steps.append(SpeechEnded(at, is_cut))
        self._steps.append(Recognise(b"".join(self._spoken), is_cut))
        self._utterances += 1
        self._spoken = self._quiet_since = None
