"""Whatever comes, in whatever state, cut anywhere.

Invariants: no exception leaves the connection and no callback fails; every accepted call ends at most once and,
when the connection is gone, has ended; then nothing is left in the connection or its deadlines.
"""

from __future__ import annotations

from h2_peers import ClientUnderTest, ServerUnderTest, message
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_abuse import ACK, END_HEADERS, END_STREAM, HEAD, HEADERS, PREFACE, SETTINGS, frame

from gateway.rpc.client import ClientCall
from gateway.rpc.server import ServerCall
from gateway.status import Code

STREAMS = st.sampled_from([0, 1, 3, 5, 2, 99, 2**31 - 1])
PAYLOADS = st.one_of(
    st.sampled_from(
        [b"", bytes(4), bytes(5), bytes(6), bytes(8), b"\x7f\xff\xff\xff", HEAD, HEAD + b"\x00\x01X\x01y", b"\xbe" * 50]
    ),
    st.binary(max_size=40).map(message),
    st.binary(max_size=60),
)
FRAMES = st.builds(frame, st.integers(0, 12), st.sampled_from([0, 1, 4, 5, 8, 0x20, 0xFF]), STREAMS, PAYLOADS)
GOOD = st.builds(
    lambda stream, body, flags: frame(HEADERS, END_HEADERS, stream, HEAD) + frame(0, flags, stream, message(body)),
    st.sampled_from([1, 3, 5, 7, 9]),
    st.binary(max_size=20),
    st.sampled_from([0, END_STREAM]),
)
ACTIONS = st.sampled_from(["reply", "finish", "headers", "write", "fail", "drain", "tick", "reset", "feed"])


class Watched:
    """A server that does to its calls what the test says, and counts their ends."""

    def __init__(self) -> None:
        self.ends: dict[ServerCall, int] = {}
        self.server = ServerUnderTest(self._accept, greet=False)
        self.server.raw(PREFACE + frame(SETTINGS, 0, 0) + frame(SETTINGS, ACK, 0))

    def _accept(self, call: ServerCall) -> None:
        self.ends[call] = 0
        call.on_cancel = lambda code: self.ends.update({call: self.ends[call] + 1})
        if len(self.ends) % 2:
            call.streaming = True
            call.on_message = lambda body, compressed: None
        else:
            call.cut_through = True
            call.on_request = lambda done: None

    def act(self, action: str) -> None:
        connection = self.server.connection
        if action == "drain":
            connection.drain(1.0)
        elif action == "tick":
            self.server.now += 1.0
            self.server.deadlines.expire(self.server.now)
            connection.tick(self.server.now)
        for call in list(self.ends)[-2:]:
            match action:
                case "reply":
                    call.reply(b"x" * 100)
                case "finish":
                    call.finish(Code.OK)
                case "headers":
                    call.send_headers([(b"i", b"1")])
                case "write":
                    call.send_headers()
                    call.send_message(b"y" * 50)
                case "fail":
                    call.fail(Code.ABORTED, "no")
                case "reset":
                    call.reset()
                case "feed":
                    call.feed()
        self.server.read()


@given(st.lists(st.one_of(FRAMES, GOOD, st.binary(max_size=30), ACTIONS), max_size=14), st.integers(0, 40))
@settings(max_examples=500, deadline=None)
@example([frame(HEADERS, END_HEADERS, 1, HEAD), "headers", "finish", "finish"], 0)
def test_a_server_survives_anything(steps: list[bytes | str], cut: int) -> None:
    watched = Watched()
    server = watched.server
    for step in steps:
        if isinstance(step, str):
            watched.act(step)
        else:
            server.raw(step[:cut])
            server.raw(step[cut:])
    server.connection.close("end of test")
    server.read()
    assert server.bugs == []
    assert server.connection.streams == {}
    assert len(server.deadlines) == 0
    assert all(count <= 1 for count in watched.ends.values())
    assert all(call.done for call in watched.ends)


@given(st.lists(st.one_of(FRAMES, st.binary(max_size=30), st.sampled_from(["start", "cancel", "tick"])), max_size=14))
@settings(max_examples=500, deadline=None)
def test_a_client_survives_anything(steps: list[bytes | str]) -> None:
    client = ClientUnderTest()
    bugs: list[Exception] = []
    client.connection.on_bug = bugs.append
    ends: dict[ClientCall, int] = {}

    def start() -> None:
        call = ClientCall(b"/x", (), client.deadlines, client.now + 5, client.now)
        call.request = b"hello" if len(ends) % 2 else None
        if call.request is None:
            call.on_message = lambda body, compressed: call.feed()
        ends[call] = 0
        call.on_done = lambda done: ends.update({call: ends[call] + 1})
        client.connection.start(call)

    start()
    start()
    for step in steps:
        if step == "start":
            if client.connection.has_room:
                start()
        elif step == "cancel":
            list(ends)[-1].cancel()
        elif step == "tick":
            client.now += 1
            client.deadlines.expire(client.now)
            client.connection.tick(client.now)
        elif isinstance(step, bytes):
            client.connection.receive(step, client.now)
        while client.connection.output():
            pass
    client.connection.close("end of test")
    assert bugs == []
    assert set(ends.values()) == {1}
    assert client.connection.streams == {}
    assert len(client.deadlines) == 0
