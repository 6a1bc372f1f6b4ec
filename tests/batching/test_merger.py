"""Who leaves when, and with whom."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.batching import Batch, Layout, MergeLimits, Merger
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
    source: bytes | memoryview = b""
    is_over: bool = False
    carried: Fields = ()

    def __post_init__(self) -> None:
        self.spans = ((0, len(self.source)),)

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
        wire.merger.submit(Request(name, source=b"x" * 50))
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
