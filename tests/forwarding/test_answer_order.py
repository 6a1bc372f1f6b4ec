"""The order of one stream's answers, and the bytes that are held meanwhile."""

from gateway.forwarding.answer_order import AnswerOrder, HeldBytes, OrderedRequest
from gateway.rpc.budget import Budget


class Stream:
    """A caller that may read slowly, and the answers that it got."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.reads = True
        self.budget = Budget(1 << 20, "test")
        self.held = HeldBytes(1 << 10, self.budget)
        self.order: AnswerOrder[OrderedRequest] = AnswerOrder(self.send, self.held)

    def send(self, body: bytes) -> bool:
        self.got.append(body)
        return self.reads

    def enter(self) -> OrderedRequest:
        request = OrderedRequest()
        self.order.enter(request)
        return request

    def answer(self, request: OrderedRequest, body: bytes, *, last: bool = True) -> None:
        self.order.write(request, body)
        if last:
            request.done = True
            self.order.ended(request)


def test_an_answer_waits_for_those_to_earlier_requests() -> None:
    stream = Stream()
    first, second, third = stream.enter(), stream.enter(), stream.enter()
    stream.answer(third, b"3")
    stream.answer(second, b"2")
    assert (stream.got, stream.order.held_bytes, stream.held.size, stream.budget.held) == ([], 2, 2, 2)
    stream.answer(first, b"1")
    assert stream.got == [b"1", b"2", b"3"]
    assert (stream.order.held_bytes, stream.held.size, stream.budget.held) == (0, 0, 0)
    assert stream.order.maybe_first is None


def test_a_released_request_waits_for_nobody_and_those_behind_it_move_up() -> None:
    stream = Stream()
    first, second = stream.enter(), stream.enter()
    stream.answer(second, b"2")
    stream.order.release(first)
    assert stream.got == [b"2"]
    stream.answer(first, b"1", last=False)
    stream.answer(first, b"1")
    assert stream.got == [b"2", b"1", b"1"]


def test_what_was_held_of_a_released_request_is_sent_even_to_a_full_caller() -> None:
    stream = Stream()
    stream.enter()
    second = stream.enter()
    stream.answer(second, b"2", last=False)
    stream.order.caller_is_full = True
    stream.order.release(second)
    assert stream.got == [b"2"]
    assert stream.order.held_bytes == 0


def test_a_caller_that_reads_slowly_gets_one_answer_each_time_it_has_room() -> None:
    stream = Stream()
    first, second, third = stream.enter(), stream.enter(), stream.enter()
    stream.answer(second, b"2")
    stream.answer(third, b"3")
    stream.reads = False
    stream.answer(first, b"1")
    assert (stream.got, stream.order.caller_is_full) == ([b"1"], True)
    for expected in (b"2", b"3"):
        stream.order.caller_is_full = False
        stream.order.advance()
        assert stream.got[-1] == expected


def test_bytes_are_released_once_however_the_stream_ends() -> None:
    stream = Stream()
    stream.held.hold(100)
    stream.held.close()
    stream.held.release(100)
    assert (stream.held.size, stream.budget.held) == (0, 0)


def test_one_message_may_always_be_kept() -> None:
    stream = Stream()
    stream.budget.hold(1 << 21)
    assert stream.held.has_room
    stream.held.hold(1)
    assert not stream.held.has_room
