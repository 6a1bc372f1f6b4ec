"""What is heard of a caller who speaks, without any model: the detector's answers are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.speech import Conversation, Detect, Ended, Heard, Recognise, SpeechEnded, SpeechStarted, WrongAudio
from gateway.speech.conversation import (
    AFTER,
    BEFORE,
    BEGINS,
    ENDS,
    LONGEST,
    LONGEST_CONVERSATION,
    MOST_AT_ONCE,
    SILENCE,
    WINDOW,
)

BYTES = 2 * WINDOW
LOUD, QUIET, BETWEEN = 0.9, 0.1, (BEGINS + ENDS) / 2


def hear(pieces: Iterable[bytes], speech: Sequence[float]) -> list[object]:
    """All that is told and asked, but for windows. speech: the detector's answers; the last one goes on."""
    conversation, answers, steps = Conversation(), iter(speech), []

    def run() -> None:
        while (step := conversation.next_step()) is not None:
            if isinstance(step, Detect):
                conversation.detected(next(answers, speech[-1]))
                continue
            steps.append(step)
            if isinstance(step, Recognise):
                conversation.recognised(f"{len(step.audio)} bytes", 0.5)

    for piece in pieces:
        conversation.take(piece)
        run()
    conversation.end()
    run()
    assert not conversation.is_open_at_detector
    return steps


def windows_of(pieces: Iterable[bytes]) -> list[Detect]:
    conversation, windows = Conversation(), []
    for piece in (*pieces, None):
        if piece is None:
            conversation.end()
        else:
            conversation.take(piece)
        while (step := conversation.next_step()) is not None:
            if isinstance(step, Detect):
                windows.append(step)
                conversation.detected(0.0)
    return windows


def cut(audio: bytes, at: Iterable[int]) -> list[bytes]:
    borders = [0, *sorted(at), len(audio)]
    return [audio[start:stop] for start, stop in pairwise(borders)]


audios = st.integers(0, 40 * WINDOW).map(lambda samples: bytes(i % 251 for i in range(2 * samples)))
probabilities = st.lists(st.sampled_from([LOUD, QUIET, BETWEEN]), min_size=1, max_size=60)


@given(audio=audios, speech=probabilities, data=st.data())
def test_any_pieces_of_the_same_audio_give_the_same_events(
    audio: bytes, speech: list[float], data: st.DataObject
) -> None:
    pieces = cut(audio, data.draw(st.lists(st.integers(0, len(audio)), max_size=8)))
    assert hear(pieces, speech) == hear([audio], speech)
    assert windows_of(pieces) == windows_of([audio])


@given(audio=audios)
def test_windows_are_the_whole_audio_once_and_then_silence(audio: bytes) -> None:
    windows = windows_of([audio])
    heard = b"".join(window.window for window in windows)
    assert heard[: len(audio)] == audio
    assert set(heard[len(audio) :]) <= {0}
    assert all(len(window.window) == BYTES for window in windows)
    assert [window.is_first for window in windows] == [number == 0 for number in range(len(windows))]
    assert [window.is_last for window in windows] == [number == len(windows) - 1 for number in range(len(windows))]


@given(audio=audios, speech=probabilities)
def test_events_come_in_their_order_and_times_do_not_run_back(audio: bytes, speech: list[float]) -> None:
    *utterances, ended = hear([audio], speech)
    assert isinstance(ended, Ended)
    assert ended == Ended(len(audio) // 2, len(utterances) // 4)
    kinds = (SpeechStarted, SpeechEnded, Recognise, Heard)
    assert [type(step) for step in utterances] == [*kinds] * ended.utterances
    times = [step.at for step in utterances if isinstance(step, SpeechStarted | SpeechEnded)]
    assert times == sorted(times)
    assert all(0 <= at <= len(audio) // 2 for at in times)


def vad_iterator(speech: Sequence[float], min_silence: int) -> list[tuple[str, int]]:
    """`VADIterator` of silero_vad 6.2.3 word for word, without its padding: it judges ours."""
    triggered, temp_end, current, found = False, 0, 0, []
    for speech_prob in speech:
        current += WINDOW
        if speech_prob >= BEGINS and temp_end:
            temp_end = 0
        if speech_prob >= BEGINS and not triggered:
            triggered = True
            found.append(("start", max(0, current - WINDOW)))
            continue
        if speech_prob < BEGINS - 0.15 and triggered:
            if not temp_end:
                temp_end = current
            if current - temp_end < min_silence:
                continue
            found.append(("end", temp_end - WINDOW))
            temp_end, triggered = 0, False
    return found


@given(speech=probabilities)
def test_speech_begins_and_ends_where_the_packages_own_iterator_says(speech: list[float]) -> None:
    steps = hear([bytes(BYTES * len(speech))], [*speech, QUIET])
    ours = [("start" if isinstance(step, SpeechStarted) else "end", step.at) for step in steps
            if isinstance(step, SpeechStarted | SpeechEnded)]  # fmt: skip
    theirs = vad_iterator(speech, (SILENCE - 1) * WINDOW)
    assert ours[: len(theirs)] == theirs


def test_a_little_of_the_silence_around_an_utterance_is_read_too() -> None:
    steps = hear([bytes(BYTES * 60)], [*[QUIET] * 20, *[LOUD] * 5, QUIET])
    (asked,) = [step for step in steps if isinstance(step, Recognise)]
    assert len(asked.audio) == BYTES * (BEFORE + 5 + AFTER)


@pytest.mark.parametrize(("loud", "cuts"), [(LONGEST - 1, 0), (LONGEST, 1), (LONGEST + 1, 1), (2 * LONGEST, 2)])
def test_an_utterance_that_does_not_end_is_cut(loud: int, cuts: int) -> None:
    steps = hear([bytes(BYTES * loud)], [LOUD])
    assert [step.is_cut for step in steps if isinstance(step, SpeechEnded)].count(True) == cuts
    assert all(len(step.audio) <= BYTES * LONGEST for step in steps if isinstance(step, Recognise))


def test_what_was_heard_of_a_cut_utterance_says_so() -> None:
    steps = hear([bytes(BYTES * (LONGEST + 40))], [*[LOUD] * (LONGEST + 5), QUIET])
    assert [step.is_cut for step in steps if isinstance(step, Heard)] == [True, False]


def test_no_audio_at_all_is_a_conversation_without_utterances() -> None:
    assert hear([], [QUIET]) == [Ended(0, 0)]
    assert hear([b"", b""], [QUIET]) == [Ended(0, 0)]


def test_an_hour_is_heard_and_no_more() -> None:
    conversation = Conversation()
    for _ in range(2 * LONGEST_CONVERSATION // 1_000_000):
        conversation.take(bytes(1_000_000))
    conversation.take(bytes(2 * LONGEST_CONVERSATION % 1_000_000))
    with pytest.raises(WrongAudio, match="longer than an hour"):
        conversation.take(b"x")


def test_a_piece_has_at_most_a_mebibyte() -> None:
    Conversation().take(bytes(MOST_AT_ONCE))
    with pytest.raises(WrongAudio, match="has 1048577 bytes of audio; send at most 1048576"):
        Conversation().take(bytes(MOST_AT_ONCE + 1))


def test_audio_after_the_end_is_refused() -> None:
    conversation = Conversation()
    conversation.end()
    with pytest.raises(WrongAudio, match="after `end`"):
        conversation.take(bytes(2))


def test_half_a_sample_at_the_end_is_refused() -> None:
    conversation = Conversation()
    conversation.take(bytes(BYTES + 1))
    with pytest.raises(WrongAudio, match="two bytes for each"):
        conversation.end()


@pytest.mark.parametrize(
    ("begin", "kind"), [(b"RIFF", "WAV"), (b"OggS", "Ogg"), (b"fLaC", "FLAC"), (b"ID3\x03", "MP3")]
)
@pytest.mark.parametrize("size", [1, 3, 44])
def test_a_file_is_no_audio_in_whatever_pieces_it_comes(begin: bytes, kind: str, size: int) -> None:
    file, conversation = begin + bytes(40), Conversation()

    def send() -> None:
        for at in range(0, len(file), size):
            conversation.take(file[at : at + size])

    with pytest.raises(WrongAudio, match=f"{kind} file"):
        send()
