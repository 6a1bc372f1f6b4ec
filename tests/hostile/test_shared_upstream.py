"""Callers share the few connections to an upstream: what one of them sends, or does not read, harms no other."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

from frames import (
    CODES,
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    HANG,
    INITIAL_WINDOW,
    Frame,
    Pair,
    Peer,
    block,
    connect,
    data,
    frame,
    headers,
    literal,
    message,
    rst,
    window,
)
from processes import Honest, Served, gateway, head, request
from upstreams import INFER, FakeTriton, RawServer, accept_client, infer_request, raw_triton, requests

KiB, MiB = 1 << 10, 1 << 20

NAMES: tuple[Pair, ...] = (
    (b"grpc-timeout", b"60S"),
    (b"x-shared", b"honest"),
    (b"x-shared-bin", b"aG9uZXN0"),
    (b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    (b"user-agent", b"honest/1"),
)
"""What honest callers send, and attackers send in other ways."""

POISON: tuple[tuple[Pair, ...], ...] = (
    ((b"grpc-timeout", b"99999999999S"),),
    ((b"grpc-timeout", b"5S"), (b"grpc-timeout", b"x")),
    ((b"grpc-encoding", b"\x7f"),),
    ((b"grpc-encoding", b"no such"),),
    ((b"grpc-accept-encoding", b",,,gzip;q=no"),),
    ((b"te", b"gzip"),),
    ((b"x-shared-bin", b"!"),),
    ((b"x-shared-bin", b"a"),),
    ((b"x-shared-bin", b"====,,,"),),
    ((b"x-shared", b"\x00"),),
    ((b"x-shared", b"\x80\xff"),),
    ((b"x-shared", b" spaces "),),
    ((b"x-shared", b"v" * 12_000),),
    ((b"x-shared", b"v" * 15_900),),
    ((b"X-Shared", b"v"),),
    ((b"x shared", b"v"),),
    ((b"x:shared", b"v"),),
    ((b":scheme", b"ftp"),),
    ((b":status", b"200"),),
    ((b"host", b"elsewhere"),),
    ((b"content-length", b"7"),),
    ((b"content-type", b"application/grpc"),),
    ((b"connection", b"x-shared"),),
    ((b"grpc-status", b"0"), (b"grpc-message", b"%zz")),
    ((b"grpc-status-details-bin", b"AAAA"),),
    ((b"grpc-trace-bin", b"AA"), (b"grpc-tags-bin", b"AA")),
    ((b"grpc-previous-rpc-attempts", b"-1"),),
    ((b"grpc-retry-pushback-ms", b"x"),),
    ((b"grpc-internal-encoding-request", b"gzip"),),
    ((b"lb-token", b"x"), (b"lb-cost-bin", b"x")),
    ((b"traceparent", b"00-zz"), (b"tracestate", b",,,=")),
    ((b"cookie", b"a"), (b"cookie", b"b")),
    tuple((b"x-%d" % n, b"v") for n in range(80)),
    ((b"", b"v"),),
)


def warmed(product: Served, triton: FakeTriton) -> set[str]:
    """Both connections to the upstream, once each has had a call: the second gets none before the first has 32."""
    for _ in range(100):
        with product.connect() as warming:
            warming.send(b"".join(request(INFER, infer_request(), stream=stream) for stream in range(1, 201, 2)))
            assert {warming.answer(stream).status for stream in range(1, 201, 2)} == {"0"}
        if len(triton.connections) >= 2:
            break
    return set(triton.connections)


def test_malformed_metadata_of_one_caller_reaches_no_other(product: Served, triton: FakeTriton) -> None:
    """For two seconds, with four honest callers who use the same names; the gateway never has to connect anew."""
    before = warmed(product, triton)
    order = random.Random(11)
    with ExitStack() as exits:
        honest = [exits.enter_context(Honest(product.port, INFER, infer_request(), *NAMES)) for _ in range(4)]
        until = time.monotonic() + 2
        while time.monotonic() < until:
            with product.connect() as attacker:
                for stream in range(1, 81, 2):
                    attacker.send(request(INFER, infer_request(), *order.choice(POISON), stream=stream))
                assert all(attacker.answer(stream).over for stream in range(1, 81, 2))
                assert not attacker.closed
    assert all(one.held() for one in honest)
    assert triton.connections == before


def test_callers_who_reset_their_calls_do_not_get_the_shared_connections_cut(
    product: Served, triton: FakeTriton
) -> None:
    """For two seconds, four of them, each back as soon as it is cut; what they ask for costs the upstream little."""
    attack = b"".join(request(INFER, infer_request(), stream=s) + rst(s) for s in range(1, 2401, 2))
    before = warmed(product, triton)
    until = time.monotonic() + 2
    executions, attacks = triton.executions, 0

    def keep_on() -> None:
        nonlocal attacks
        while time.monotonic() < until or attacks <= 4:
            with product.connect() as peer:
                peer.send(attack)
                peer.wait_closed(1.0)
                attacks += 1

    with Honest(product.port, INFER, infer_request()) as honest:
        threads = [threading.Thread(target=keep_on) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert triton.executions - executions < len(honest.seconds) + 100 * attacks
    assert honest.held()
    assert triton.connections == before


# What goes upstream, as frames

INCREMENTAL, WITHOUT, NEVER = "incremental", "without indexing", "never"


def representations(fragment: bytes) -> Iterator[str]:
    """How each field of a header block is written (RFC 7541 section 6)."""
    at = 0
    while at < len(fragment):
        first = fragment[at]
        bits, kind = next(
            (bits, kind)
            for mask, bits, kind in (
                (0x80, 7, "indexed"),
                (0x40, 6, INCREMENTAL),
                (0x20, 5, "table size"),
                (0x10, 4, NEVER),
                (0x00, 4, WITHOUT),
            )
            if first & mask or not mask
        )
        index, at = _integer(fragment, at, bits)
        if kind == "table size":
            continue
        yield kind
        for _ in range(0 if kind == "indexed" else 1 if index else 2):
            length, at = _integer(fragment, at, 7)
            at += length


def _integer(fragment: bytes, at: int, bits: int) -> tuple[int, int]:
    most = (1 << bits) - 1
    value, at, shift = fragment[at] & most, at + 1, 0
    while value >= most:
        value += (fragment[at] & 127) << shift
        shift += 7
        at += 1
        if fragment[at - 1] < 128:
            break
    return value, at


def test_no_field_that_a_caller_chose_enters_the_shared_table() -> None:
    heads: list[Frame] = []

    def script(peer: Peer, number: int) -> None:
        accept_client(peer)
        for got in requests(peer):
            heads.append(got)
            raw_triton(peer, got)

    with RawServer(script) as upstream, gateway(upstream.port) as served, served.connect() as peer:
        for stream in range(1, 41, 2):
            unique = literal(b"x-%d" % stream, b"mine", kind=0x40)  # incrementally indexed by the caller
            whole = head(INFER, *NAMES, (b"x-id", b"%d" % stream), stream=stream)
            peer.send(_append(whole, unique) + data(stream, message(infer_request()), 1))
            assert peer.answer(stream).status == "0"
    forwarded = [got for got in heads if "ModelInfer" in dict(got.fields)[":path"]]
    assert len(forwarded) == 20
    for got in forwarded:
        written = list(zip(got.fields, representations(got.payload), strict=True))
        chosen = [kind for (name, value), kind in written if name.startswith("x-") or name == "grpc-timeout"]
        assert len(chosen) == 5
        assert set(chosen) == {NEVER}
        assert {name for (name, _), kind in written if kind == INCREMENTAL} <= {
            ":authority",
            ":path",
            "te",
            "content-type",
            "user-agent",
            "grpc-accept-encoding",
        }
        assert ("user-agent", "honest/1") not in [field for field, kind in written if kind == INCREMENTAL]


def _append(frame_: bytes, fragment: bytes) -> bytes:
    payload = frame_[9:] + fragment
    return len(payload).to_bytes(3, "big") + frame_[3:9] + payload


def test_probes_go_on_after_an_upstream_that_cancels_them() -> None:
    probes = 0

    def script(peer: Peer, number: int) -> None:
        nonlocal probes
        accept_client(peer)
        for got in requests(peer):
            probes += "ServerLive" in dict(got.fields)[":path"]
            if probes < 4:
                peer.send(rst(got.stream, CODES.index("CANCEL")))
            else:
                raw_triton(peer, got)

    with RawServer(script) as upstream, gateway(upstream.port) as served:
        until = time.monotonic() + HANG
        while probes < 5 and time.monotonic() < until:
            time.sleep(0.1)
        assert probes >= 5
        assert served.ask(INFER, infer_request()).status == "0"


# Answers that a caller does not take


def test_answers_that_callers_do_not_take_are_bounded_and_others_get_theirs(product: Served) -> None:
    """Two hundred answers of 2 MiB, on two connections without a window: the upstream's, of 1 MiB, bounds them."""
    memory = product.memory
    with ExitStack() as exits:
        honest = exits.enter_context(Honest(product.port, INFER, infer_request()))
        for _ in range(2):
            peer = exits.enter_context(connect(product.port).greet([(INITIAL_WINDOW, 0)]))
            asking = infer_request(id_=str(2 * MiB))
            peer.send(b"".join(request(INFER, asking, stream=stream) for stream in range(1, 201, 2)))
        time.sleep(2.5)
        grown = product.memory - memory
    assert honest.held()
    assert grown < 240 * MiB


def test_a_slow_reader_gets_every_byte_and_costs_a_window(product: Served) -> None:
    """16 MiB at about 20 MiB a second."""
    memory, most = product.memory, 0
    with connect(product.port).greet([(INITIAL_WINDOW, 64 * KiB)]) as peer:
        peer.send(request(INFER, infer_request(id_=str(16 * MiB))))
        while not (1 in peer.answers and peer.answers[1].over):
            got = peer.read()
            assert got is not None
            if got.kind == 0 and got.payload:
                peer.send(window(1, len(got.payload)) + window(0, len(got.payload)))
                time.sleep(len(got.payload) / (20 * MiB))
                most = max(most, product.memory - memory)
    assert peer.answers[1].status == "0"
    assert len(peer.answers[1].body) > 16 * MiB
    assert most < 12 * MiB


def test_an_answer_whose_trailers_are_too_large_ends_one_call_once_and_no_shared_connection() -> None:
    """As of a Triton that repeats a long name, or of a model with a long error text."""
    asked = 0

    def script(peer: Peer, number: int) -> None:
        nonlocal asked
        accept_client(peer)
        for got in requests(peer):
            if dict(got.fields).get("x-long") is None:
                raw_triton(peer, got)
                continue
            asked += 1
            text = ((b"grpc-status", b"3"), (b"grpc-message", b"%7Fe" * 50_000))
            fragment = block(((b":status", b"200"), (b"content-type", b"application/grpc"), *text))
            pieces = [fragment[at : at + 16_384] for at in range(0, len(fragment), 16_384)]
            peer.send(headers(got.stream, pieces[0], END_STREAM))
            for piece in pieces[1:-1]:
                peer.send(frame(CONTINUATION, 0, got.stream, piece))
            peer.send(frame(CONTINUATION, END_HEADERS, got.stream, pieces[-1]))

    with RawServer(script) as upstream, gateway(upstream.port) as served, served.connect() as attacker:
        with Honest(served.port, INFER, infer_request()) as honest:
            connections = 0
            for stream in range(1, 101, 2):
                attacker.send(request(INFER, infer_request(), (b"x-long", b"1"), stream=stream))
                answer = attacker.answer(stream)
                assert answer.status == "8"
                assert "larger than the limit of 65536 bytes" in answer.heads[-1]["grpc-message"]
                connections = connections or upstream.connections
        assert honest.held()
        assert asked == 50
        assert upstream.connections == connections
