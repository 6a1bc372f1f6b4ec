"""What we rely on the engine for, so that a new version of it can't change it unnoticed."""

from __future__ import annotations

import h2.connection
import h2.events
import hpack
import pytest
from h2_peers import lenient

from gateway.wire.engine import (
    DataReceived,
    Engine,
    Event,
    NeverIndexed,
    RequestReceived,
    StreamClosed,
    client_engine,
    goaway_frame,
    server_engine,
)
from gateway.wire.limits import Limits

HEAD = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/x"), (b":authority", b"a")]


def exchange(left: Engine, right: Engine) -> None:
    while True:
        there, back = left.data_to_send(), right.data_to_send()
        if there:
            right.receive_data(there)
        if back:
            left.receive_data(back)
        if not there and not back:
            return


def pair(limits: Limits | None = None) -> tuple[Engine, Engine]:
    client, server = client_engine(limits or Limits()), server_engine(limits or Limits())
    exchange(client, server)
    client.events(), server.events()
    return client, server


def kinds(events: list[Event]) -> list[type[Event]]:
    return [type(event) for event in events]


def test_a_stream_closes_when_its_last_frame_is_written() -> None:
    client, server = pair()
    stream = client.send_request(HEAD, end_stream=True)
    server.receive_data(client.data_to_send())
    assert kinds(server.events()) == [RequestReceived]
    server.send_response(stream, [(b":status", b"200")], end_stream=True)
    assert server.events() == []
    server.data_to_send()
    assert kinds(server.events()) == [StreamClosed]


def test_window_is_given_back_for_bytes_of_a_stream_that_has_closed() -> None:
    client, server = pair(Limits(stream_window=65_535, connection_window=65_535))
    for _ in range(5):  # 5 x 40,000 bytes through a window of 65,535
        stream = client.send_request(HEAD)
        client.send_data(stream, b"x" * 40_000)
        exchange(client, server)
        client.reset_stream(stream)
        exchange(client, server)
        got = [event for event in server.events() if isinstance(event, DataReceived)]
        assert sum(len(event.data) for event in got) == 40_000
        for event in got:
            server.acknowledge_received_data(len(event.data), event.stream_id)
        exchange(client, server)


def test_window_is_not_given_back_before_it_is_acknowledged() -> None:
    client, server = pair(Limits(stream_window=65_535, connection_window=65_535))
    stream = client.send_request(HEAD)
    client.send_data(stream, b"x" * 100_000)
    exchange(client, server)
    assert client.queued_body_size(stream) == 100_000 - 65_535
    server.acknowledge_received_data(65_535, stream)
    exchange(client, server)
    assert client.queued_body_size(stream) == 0


def test_a_never_indexed_field_arrives_as_such_and_leaves_the_table_alone() -> None:
    client = client_engine(Limits())
    peer = h2.connection.H2Connection(lenient(client=False))
    sizes = []
    for number in range(3):
        client.send_request([*HEAD, NeverIndexed(b"x-secret", b"value-%d" % number)], end_stream=True)
        events = peer.receive_data(client.data_to_send())
        head = next(event for event in events if isinstance(event, h2.events.RequestReceived))
        field = next(field for field in head.headers if field[0] == b"x-secret")
        assert field == (b"x-secret", b"value-%d" % number)
        assert isinstance(field, hpack.NeverIndexedHeaderTuple)
        sizes.append(len(peer.decoder.header_table.dynamic_entries))
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_goaway_written_by_hand_is_understood() -> None:
    peer = h2.connection.H2Connection(lenient(client=True))
    peer.initiate_connection()
    peer.receive_data(server_engine(Limits()).data_to_send())
    (event,) = peer.receive_data(goaway_frame(7, 11, b"calm down"))
    assert isinstance(event, h2.events.ConnectionTerminated)
    assert (event.last_stream_id, event.error_code, event.additional_data) == (7, 11, b"calm down")


@pytest.mark.parametrize("size", [1, 16_384, 131_072, 131_073, 1_000_000])
def test_output_in_pieces_is_the_whole_body(size: int) -> None:
    client, server = pair()
    stream = client.send_request(HEAD)
    body = bytes(i % 251 for i in range(size))
    client.send_data(stream, body, end_stream=True)
    got = b""
    while len(got) < size:
        piece = client.data_to_send(131_072)
        assert len(piece) <= 131_072
        server.receive_data(piece)
        for event in server.events():
            if isinstance(event, DataReceived):
                got += event.data
                server.acknowledge_received_data(len(event.data), stream)
        client.receive_data(server.data_to_send())
    assert got == body
