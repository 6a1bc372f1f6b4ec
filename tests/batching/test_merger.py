"""Who leaves when, and with whom."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.batching import Batch, Layout, MergeLimits, Merger, Window
from gateway.rpc.metadata import Fields
from gateway.v2.layout import Part
from gateway.v2.peek import Head


def layout(rows: int, signature: bytes = b"s") -> Layout:
    return Layout(signature, rows, (Part("x", 4, 1),), 0x3A, pb.ModelInferRequest())


@dataclass(eq=False)
class Request:
    name: str
    caller: Hashable = "a"
    layout: Layout = field(default_factory=lambda: layout(1))
    head: Head = field(default_factory=lambda: Head("m", "", "", True, [], 0, 0, None, []))
    spans: Sequence[tuple[int, int]] = ()
    body: bytes = b""
    is_over: bool = False
    carried: Fields = ()

    def __repr__(self) -> str:
        return self.name


class Wire:
    """Remembers what was sent, and lets time pass by hand."""

    def __init__(self, rows: int = 8, size: int = 1000, in_flight: int = 1, delay: float = 0.0) -> None:
        self.sent: list[Batch[Request]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.turns: list[Callable[[], None]] = []
        limits = MergeLimits(rows, size, in_flight, delay)
        self.merger: Merger[Request] = Merger(
            limits,
            0.0,
            self.sent.append,
            lambda seconds, callback: self.timers.append((seconds, callback)),
            self.turns.append,
        )

    @property
    def names(self) -> list[list[str]]:
        return [[member.name for member in batch.members] for batch in self.sent]

    def turn(self) -> None:
        """The loop's next turn."""
        turns = self.turns[:]
        self.turns.clear()
        for callback in turns:
            callback()

    def answer(self, number: int = -1) -> None:
        """A batch comes back, and for some turns nothing else."""
        self.merger.ended(self.sent[number], 0.0)
        while self.turns:
            self.turn()


def test_with_nothing_in_flight_a_request_leaves_at_once() -> None:
    wire = Wire()
    wire.merger.submit(Request("1"))
    assert wire.names == [["1"]]


def test_what_arrives_meanwhile_leaves_together_when_the_answer_comes() -> None:
    wire = Wire()
    for name in "1234":
        wire.merger.submit(Request(name))
    assert wire.names == [["1"]]
    wire.answer()
    assert wire.names == [["1"], ["2", "3", "4"]]


def test_a_batch_has_at_most_the_rows_allowed() -> None:
    wire = Wire(rows=4)
    wire.merger.submit(Request("first"))
    for name in "123":
        wire.merger.submit(Request(name, layout=layout(2)))
    wire.answer()
    assert wire.names[1:] == [["1", "2"]]


def test_a_batch_has_at_most_the_bytes_allowed() -> None:
    wire = Wire(size=100)
    wire.merger.submit(Request("first"))
    for name in "123":
        wire.merger.submit(Request(name, body=b"x" * 50))
    wire.answer()
    assert wire.names[1:] == [["1", "2"]]


def test_different_signatures_never_share_a_batch() -> None:
    wire = Wire()
    wire.merger.submit(Request("first"))
    wire.merger.submit(Request("a1", "a"))
    wire.merger.submit(Request("b1", "b", layout(1, b"other")))
    wire.merger.submit(Request("c1", "c"))
    wire.answer()
    wire.answer()
    assert wire.names[1:] == [["a1", "c1"], ["b1"]]


def test_requests_with_other_metadata_never_share_a_batch() -> None:
    wire = Wire()
    wire.merger.submit(Request("first"))
    for caller, tenant in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        wire.merger.submit(Request(caller, caller, carried=((b"x-tenant", tenant),)))
    wire.answer()
    wire.answer()
    assert wire.names[1:] == [["a", "c"], ["b"]]


def test_requests_that_have_no_likes_wait_for_each_other_no_longer_than_unmerged_ones() -> None:
    """Else one caller with metadata of its own for each call would be served one by one, and hold up the others."""
    wire = Wire()
    wire.merger.submit(Request("first"))
    for number in range(100):
        wire.merger.submit(Request(f"{number}", number, carried=((b"x-session", b"%d" % number),)))
    wire.answer(0)
    assert len(wire.sent) == 101
    for number in range(1, 101):
        wire.answer(number)
    assert wire.merger.in_flight == 0


def test_one_turn_of_the_loop_sends_a_bounded_number_of_batches() -> None:
    wire = Wire(rows=2)
    wire.merger.submit(Request("first"))
    for number in range(1000):
        wire.merger.submit(Request(f"{number}", number, carried=((b"x-session", b"%d" % number),)))
    wire.merger.ended(wire.sent[0], 0.0)
    before = len(wire.sent)
    most = 0
    while wire.turns:
        wire.turn()
        most = max(most, len(wire.sent) - before)
        before = len(wire.sent)
    assert before == 1001
    assert most <= 16


def test_a_caller_that_was_passed_over_is_first_in_the_next_batch() -> None:
    wire = Wire(rows=2)
    wire.merger.submit(Request("first"))
    for number in range(6):
        wire.merger.submit(Request(f"a{number}", "a"))
    wire.merger.submit(Request("b", "b", layout(1, b"other")))
    wire.answer()
    wire.answer()
    assert wire.names[2] == ["b"]


def test_callers_take_turns() -> None:
    wire = Wire(rows=4)
    wire.merger.submit(Request("first"))
    for number in range(100):
        wire.merger.submit(Request(f"a{number}", "a"))
    wire.merger.submit(Request("b", "b"))
    wire.merger.submit(Request("c", "c"))
    wire.answer()
    assert wire.names[1] == ["a0", "b", "c", "a1"]


def test_a_request_whose_caller_has_gone_is_not_sent() -> None:
    wire = Wire()
    wire.merger.submit(Request("first"))
    gone, there = Request("gone"), Request("there")
    wire.merger.submit(gone)
    wire.merger.submit(there)
    gone.is_over = True
    wire.answer()
    assert wire.names[1:] == [["there"]]
    wire.answer()
    assert wire.merger.in_flight == 0


def test_with_a_delay_a_request_waits_for_company_but_not_longer() -> None:
    wire = Wire(delay=0.002)
    wire.merger.submit(Request("1"))
    wire.merger.submit(Request("2"))
    assert wire.sent == []
    [(seconds, ring)] = wire.timers
    assert seconds == 0.002
    ring()
    assert wire.names == [["1", "2"]]


def test_a_full_batch_does_not_wait_for_its_delay() -> None:
    wire = Wire(rows=2, delay=5.0)
    wire.merger.submit(Request("1"))
    wire.merger.submit(Request("2"))
    assert wire.names == [["1", "2"]]


def test_what_waits_at_the_end_is_given_back() -> None:
    wire = Wire()
    for name in "123":
        wire.merger.submit(Request(name))
    assert [member.name for member in wire.merger.abandon()] == ["2", "3"]


def test_what_is_at_the_door_when_a_batch_comes_back_goes_along() -> None:
    wire = Wire()
    for name in "123":
        wire.merger.submit(Request(name))
    wire.merger.ended(wire.sent[0], 0.0)
    for name in "45":
        wire.turn()
        wire.merger.submit(Request(name))
    assert wire.names == [["1"]]
    while wire.turns:
        wire.turn()
    assert wire.names == [["1"], ["2", "3", "4", "5"]]


def test_a_full_batch_waits_for_nobody_and_one_that_fills_slowly_not_for_ever() -> None:
    wire = Wire(rows=2)
    for name in "1234":
        wire.merger.submit(Request(name))
    wire.merger.ended(wire.sent[0], 0.0)
    assert wire.names == [["1"], ["2", "3"]]
    slow = Wire(rows=100)
    slow.merger.submit(Request("1"))
    slow.merger.submit(Request("2"))
    slow.merger.ended(slow.sent[0], 0.0)
    turns = 0
    while slow.turns:
        slow.turn()
        slow.merger.submit(Request("more"))
        turns += 1
    assert turns == 10
    assert len(slow.sent) == 2


def feed(window: Window, rate_of: Callable[[int], float], seconds: float, start: float = 0.0) -> float:
    """Let time pass with batches of 10 rows at the throughput that a number in flight gives."""
    now = start
    while now < start + seconds:
        now += 10 / rate_of(window.allowed)
        window.ended(10, True, now)
    return now


def test_the_window_grows_while_throughput_does() -> None:
    window = Window(8, 0.0)
    feed(window, lambda allowed: 1000 * min(allowed, 3), 60)
    assert window.allowed in (3, 4)  # 3 is best, and 4 may be on trial just now


def test_the_window_stays_at_one_where_more_gains_nothing() -> None:
    window = Window(8, 0.0)
    now = feed(window, lambda allowed: 1000.0, 1)
    ones = sum(window.allowed == 1 for _ in range(200) if (now := feed(window, lambda _: 1000.0, 0.3, now)))
    assert ones > 180


def test_the_window_shrinks_again_when_the_model_gets_cheaper() -> None:
    window = Window(8, 0.0)
    now = feed(window, lambda allowed: 1000 * min(allowed, 4), 60)
    feed(window, lambda allowed: 1000.0, 120, now)
    assert window.allowed <= 2


def test_a_trial_that_fails_is_short_and_the_next_is_later_each_time() -> None:
    window, now = Window(8, 0.0), 0.0
    trials: list[float] = []
    while now < 150:
        before = window.allowed
        now = feed(window, lambda allowed: 1000.0 / allowed, 0.05, now)
        if before == 1 and window.allowed == 2 and (not trials or now - trials[-1] > 5):
            trials.append(now)
    gaps = [after - before for before, after in pairwise(trials)]
    assert [round(gap / 15) for gap in gaps] == [1, 2, 4]


def test_a_pause_of_the_callers_decides_nothing() -> None:
    window = Window(8, 0.0)
    now = feed(window, lambda allowed: 1000.0 * allowed, 0.6)
    for _ in range(12):
        window.ended(10, False, now)
        now = feed(window, lambda allowed: 1000.0 * min(allowed, 3), 1.0, now + 5.0)
    assert window.allowed in (3, 4)


@pytest.mark.parametrize(("rate_of", "best"), [(lambda n: 1000 / n**0.2, 1), (lambda n: 1000 * min(n, 3), 3)])
def test_the_window_finds_its_place_although_rates_move_by_a_third(rate_of: Callable[[int], float], best: int) -> None:
    chance = Random(7)  # of callers that come and go, and of a machine that does other things
    window = Window(4, 0.0)
    now, at_best = 0.0, 0
    for _ in range(2400):  # ten minutes
        factor = chance.uniform(0.7, 1.3)
        now = feed(window, lambda allowed, factor=factor: factor * rate_of(allowed), 0.25, now)
        at_best += abs(window.allowed - best) < (1 if best == 1 else 2)
    assert at_best > 0.75 * 2400
