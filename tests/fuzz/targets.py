"""What reads bytes that others sent, each as a function of bytes: the targets of `make fuzz` and of the corpus.

A target catches the errors that its reader declares, and no others. Whatever else it raises is a finding, and so are
its own assertions: what is accepted must mean what another reader, or a plain version, says it means.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import hpack
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from gateway.api import typed
from gateway.config import ConfigError, load
from gateway.config.experiment_file import load_experiments
from gateway.errors import BadInput, BadRequest, CommandFailed, GatewayError, Overloaded
from gateway.forwarding.messages import parse_request, parse_response, tensors_of
from gateway.forwarding.sharing.key import maybe_key
from gateway.http2.frames import PREFACE
from gateway.http2.hpack import NEVER_FITS, BadBlock, Decoder, Field, TooLarge
from gateway.http2.limits import Limits
from gateway.rpc.client import ClientCall, ClientConnection
from gateway.rpc.codes import CallFailed
from gateway.rpc.deadlines import Deadlines
from gateway.rpc.framing import PREFIX, Inflater, read_prefix
from gateway.rpc.metadata import (
    MOST_MESSAGE,
    decode_message,
    encode_message,
    fields_from,
    format_timeout,
    is_legal,
    is_metadata,
    metadata_from,
    parse_timeout,
    text_of,
)
from gateway.rpc.requests import RequestHeads
from gateway.rpc.server import ServerCall, ServerConnection
from gateway.status import Code
from gateway.steps import WrongAnswer
from gateway.steps.header import BadPicture, read_header
from gateway.steps.picture import Fit, decode
from gateway.telemetry.capture import redact
from gateway.telemetry.replay import read as read_capture
from gateway.telemetry.w3c import is_unsampled, trace_id_of
from gateway.v1 import prediction_pb2
from gateway.v2 import peek, weight
from gateway.v2.layout import Layouts, split_rows
from gateway.v2.raw import to_array, to_raw
from gateway.v2.repeats import StreamRequestHeads, StreamResponseHeads
from gateway.v2.spec import DATATYPES
from gateway.v2.versions import maybe_version, read_version

Target = Callable[[bytes], None]

TARGETS: dict[str, Target] = {}

GREETING = PREFACE + b"\0\0\0\x04\0\0\0\0\0" + b"\0\0\0\x04\x01\0\0\0\0"
"""What a polite client begins with: the preface, its SETTINGS, and the acknowledgement of the server's."""

SERVER_GREETING = GREETING[len(PREFACE) :]

_LIMIT = 1 << 16  # bytes of a message, or of a header list: so that a small input can reach it
_PIXELS = 1 << 16  # of a picture that is decoded, so that its pixels are not what takes the time


def target(function: Target) -> Target:
    TARGETS[function.__name__] = function
    return function


def seconds_of(function: Target, data: bytes) -> float:
    """The CPU that an input takes, in seconds: the best of three, since the first may fill tables."""
    best = math.inf
    for _ in range(3):
        began = time.process_time()
        function(data)
        best = min(best, time.process_time() - began)
    return best


# Connections


def _pieces(data: bytes) -> Iterator[bytes]:
    """The input behind its first byte, as the network may cut it: that byte says how long the first pieces are."""
    size, rest = data[:1], data[1:]
    if size and size[0]:
        for _ in range(64):
            if not rest:
                return
            yield rest[: size[0]]
            rest = rest[size[0] :]
    yield rest


@target
def http2_server(data: bytes) -> None:
    """A client sends it to the gateway. Every call ends at most once; in the end nothing is left."""
    ends: dict[ServerCall, int] = {}
    bugs: list[Exception] = []
    deadlines, now = Deadlines(), 1000.0

    def accept(call: ServerCall) -> None:
        ends[call] = 0
        call.on_cancel = lambda code: ends.update({call: ends[call] + 1})
        if len(ends) % 3 == 0:
            call.on_request = lambda done: done.reply(done.body)
        elif len(ends) % 3 == 1:
            call.streaming = True
            call.on_message = lambda body, compressed: call.send_message(body)
        else:
            call.cut_through = True
            call.on_request = lambda done: done.fail(Code.ABORTED, "no")

    limits = Limits(message_bytes=_LIMIT)
    connection = ServerConnection(limits, now, lambda: None, accept=accept, deadlines=deadlines, peer="fuzz")
    connection.on_bug = bugs.append
    for piece in (GREETING, *_pieces(data)):
        connection.receive(piece, now)
        _drain(connection)
        now += 0.5
        deadlines.expire(now)
        connection.tick(now)
    connection.close("end of input")
    _drain(connection)
    assert bugs == []
    assert connection.streams == {}
    assert len(deadlines) == 0
    assert all(count <= 1 for count in ends.values())
    assert all(call.done for call in ends)


@target
def http2_client(data: bytes) -> None:
    """An upstream answers it to two calls, one unary and one a stream. Each ends once; then nothing is left."""
    bugs: list[Exception] = []
    ends: dict[ClientCall, int] = {}
    deadlines, now = Deadlines(), 1000.0
    connection = ClientConnection(Limits(message_bytes=_LIMIT), now, lambda: None, authority="fuzz:1")
    connection.on_bug = bugs.append
    for number in range(2):
        call = ClientCall(b"/x", (), deadlines, now + 5, now)
        ends[call] = 0
        call.on_done = lambda done: ends.update({done: ends[done] + 1})
        call.request = b"hello" if number else None
        if not number:
            call.on_message = lambda body, compressed, call=call: call.feed()
        connection.start(call)
    for piece in (SERVER_GREETING, *_pieces(data)):
        connection.receive(piece, now)
        _drain(connection)
        now += 0.5
        deadlines.expire(now)
        connection.tick(now)
    connection.close("end of input")
    _drain(connection)
    assert bugs == []
    assert set(ends.values()) == {1}
    assert connection.streams == {}
    assert len(deadlines) == 0


def _drain(connection: ServerConnection | ClientConnection) -> None:
    while connection.output() or connection.has_work:
        connection.advance()


# Header fields


def _parts(data: bytes) -> Iterator[bytes]:
    """The input as several: each after its length in two bytes; the last one may be cut."""
    while data:
        size = int.from_bytes(data[:2], "big")
        yield data[2 : 2 + size]
        data = data[2 + size :]


@target
def hpack_blocks(data: bytes) -> None:
    """Header blocks of one connection. What we take python-hyper's decoder takes, as the same; dropped blocks leave the
    same table."""
    ours, dropping, theirs = Decoder(_LIMIT), Decoder(_LIMIT), hpack.Decoder(max_header_list_size=_LIMIT)
    for block in _parts(data):
        try:
            fields: Sequence[Field] = ours.decode(block)
        except (BadBlock, TooLarge):
            return
        assert [tuple(field) for field in theirs.decode(block, raw=True)] == [tuple(field) for field in fields]
        waiting, is_start = b"", True
        cut = len(block) if block[:1] and block[0] & 0xE0 == 0x20 else 7  # a table size update may only begin a block
        for piece in (block[:cut], block[cut:]):
            waiting += piece
            waiting, is_start = waiting[dropping.drop(waiting, 0, is_start) :], False
            assert len(waiting) <= NEVER_FITS
        assert waiting == b""
        assert dropping._table == ours._table


_BASE: tuple[Field, ...] = ((b":method", b"POST"), (b":path", b"/x"), (b"content-type", b"application/grpc"))


@target
def grpc_fields(data: bytes) -> None:
    """Names and values of one header list: timeouts, `-bin` values, messages, trace parents, versions, host names."""
    parts = list(_parts(data))
    fields = tuple(zip(parts[::2], parts[1::2], strict=False))
    for name, value in fields:
        _one_field(name, value)
    try:
        head = RequestHeads(Limits()).read(_BASE + fields)
    except CallFailed:
        return
    if not head.http_status:
        assert head.timeout is None or 0 < head.timeout <= 99_999_999 * 3600
        metadata_from(head.fields)


def _one_field(name: bytes, value: bytes) -> None:
    if is_metadata(name) and is_legal(name, value):
        found = metadata_from([(name, value)])
        again = fields_from(found)
        assert metadata_from(again) == found
        if not name.endswith(b"-bin"):
            assert [tuple(field) for field in again] == [(name, value)]
    try:
        seconds = parse_timeout(value)
    except ValueError:
        pass
    else:
        assert abs(parse_timeout(format_timeout(seconds)) - seconds) <= max(1.0, seconds * 1e-3) or seconds > 99_999_999
    message = decode_message(value)
    encoded = encode_message(message)
    assert len(encoded) <= MOST_MESSAGE
    assert encoded.isascii()
    assert decode_message(encoded) == message or len(encoded) >= MOST_MESSAGE - 20
    text = text_of(value)
    assert len(trace_id_of(text)) in (0, 32)
    is_unsampled(text)
    version = maybe_version(text)
    assert version is None or maybe_version(version) == version
    try:
        assert read_version(text) == version
    except BadRequest:
        assert version is None


# Messages


@target
def grpc_messages(data: bytes) -> None:
    """Length-prefixed messages, compressed as the first byte says. zlib itself says what a compressed one is."""
    encoding = (b"", b"identity", b"gzip", b"deflate", b"br")[data[0] % 5] if data else b""
    at, rest = 0, data[1:]
    while at + PREFIX <= len(rest):
        try:
            length, is_compressed = read_prefix(rest, at, _LIMIT)
            at += PREFIX
            body = rest[at : at + length]
            at += length
            if is_compressed:
                inflater = Inflater(body, encoding, _LIMIT)
                while not inflater.step(4096):
                    pass
                bits = zlib.MAX_WBITS | (16 if encoding == b"gzip" else 0)
                assert inflater.body == zlib.decompress(body, bits)
                assert len(inflater.body) <= _LIMIT
        except CallFailed:
            return


def _maybe(parse: Callable[[bytes], Any], body: bytes, *errors: type[Exception]) -> Any:
    try:
        return parse(body)
    except errors:
        return None


def _outcome(read: Callable[[bytes], Any], body: bytes) -> object:
    try:
        return read(body)
    except GatewayError as error:
        return type(error), error.text


def _same(message: Any, head: peek.Head) -> None:
    """Does protobuf read what the peek reads?

    Of parameters with unknown fields it does not, here: Python's protobuf (upb) counts such an entry as unknown.
    Triton's (C++) reads it, as the peek does.
    """
    assert (message.model_name, message.model_version, message.id) == (head.model_name, head.model_version, head.id)
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    if known.ByteSize() != message.ByteSize():
        return
    parameters = {}
    for key, value in message.parameters.items():
        choice = value.WhichOneof("parameter_choice")
        if choice:
            parameters[key] = getattr(value, choice)
    assert _comparable(parameters) == _comparable(peek.parameters_of(head))


def _comparable(parameters: dict[str, Any]) -> dict[str, tuple[type, object]]:
    return {
        key: (type(value), "nan" if isinstance(value, float) and math.isnan(value) else value)
        for key, value in parameters.items()
    }


def _taken_apart(layouts: Layouts, body: bytes, head: peek.Head) -> None:
    found = layouts.maybe_read(body, head)
    if found is None:
        return
    layout, spans = found
    layout.encoded(1)
    for part, (begin, end) in zip(layout.parts, spans, strict=True):
        if layout.rows <= 64:
            assert b"".join(split_rows(part, body, (begin, end), [1] * layout.rows)) == body[begin:end]


@target
def v2_request(body: bytes) -> None:
    """A ModelInferRequest. protobuf says what it means."""
    message = _maybe(pb.ModelInferRequest.FromString, body, DecodeError)
    _maybe(partial(weight.weigh, parts=weight.V2_REQUEST), body, GatewayError)
    peek.maybe_id(body)
    try:
        head = peek.peek_request(body)
        peek.parameters_of(head)
    except GatewayError:
        _fronts(body, None)
        return
    _fronts(body, head)
    if message is not None:
        _same(message, head)
        _answered(message)
    renamed = peek.rename_request(body, head, model_name="m", model_version="", id="new")
    again = peek.peek_request(renamed)
    assert (again.model_name, again.model_version, again.id) == ("m", "", "new")
    assert again.entries == head.entries
    assert peek.peek_request(body + peek.tail("m", "7")).model_name == "m"
    maybe_key(body, head, ())
    layouts = Layouts(pb.ModelInferRequest)
    for _ in range(2):  # the second time it is known
        _taken_apart(layouts, body, head)


def _fronts(body: bytes, head: peek.Head | None) -> None:
    """What a front says holds for the whole, unless scalars follow the tensors."""
    for cut in {1, len(body) // 3, len(body) // 2, len(body) - 1}:
        try:
            front = peek.peek_front(body[:cut])
        except GatewayError:
            continue
        if front is not None and head is not None and not head.strays:
            assert (front.model_name, front.model_version) == (head.model_name, head.model_version)


def _answered(message: Any) -> None:
    """What pipelines and captures make of a request."""
    message = parse_request(message.SerializeToString())
    if weight.weight_of_texts(message.inputs, message.raw_input_contents) <= weight.BRIEF:
        _maybe(lambda _: tensors_of(message.inputs, message.raw_input_contents), b"", BadInput)
    redact(message, ["x", "text"])


@target
def v2_response(body: bytes) -> None:
    """A ModelInferResponse of an upstream."""
    message = _maybe(pb.ModelInferResponse.FromString, body, DecodeError)
    if len(body) <= 1 << 14:
        _maybe(parse_response, body, WrongAnswer)
    head = _maybe(peek.peek_response, body, GatewayError)
    if head is None or _maybe(lambda _: (head.parameters,), b"", GatewayError) is None:
        return
    if message is not None:
        _same(message, head)
    again = peek.peek_response(peek.as_asked(body, head, "public", "id"))
    assert (again.model_name, again.id) == ("public", "id")
    _taken_apart(Layouts(pb.ModelInferResponse), body, head)


@target
def v2_stream(data: bytes) -> None:
    """Messages of one stream, first as requests and then as responses. Those that are known by the message before are
    read as those that are not."""
    requests, responses = StreamRequestHeads(), StreamResponseHeads()
    known = peek.KnownHeads(peek.peek_request, peek.RAW_INPUT)
    for body in itertools.islice(_parts(data), 50):
        plain = _outcome(peek.peek_request, body)
        assert _facts(_outcome(requests.peek, body)) == _facts(plain)
        assert _facts(_outcome(known.peek, body)) == _facts(plain)
        answer = _outcome(peek.peek_stream_response, body)
        assert _facts(_outcome(responses.peek, body)) == _facts(answer)
        if isinstance(answer, peek.StreamHead):
            peek.rename_stream_response(body, answer, model_name="m", id="i")


def _facts(found: object) -> object:
    """What is read of a message, whichever way it was read."""
    if isinstance(found, peek.StreamHead):
        return found.error, _facts(found.response), found.rest
    if isinstance(found, peek.Head):
        return found.model_name, found.model_version, found.id, found.has_tensors, found.entries
    return found


@target
def v2_raw(data: bytes) -> None:
    """A tensor's raw contents: its datatype, its number of axes, four bytes for each, and the rest."""
    if len(data) < 2:
        return
    datatype, axes = DATATYPES[data[0] % len(DATATYPES)], data[1] % 40
    shape = [int.from_bytes(data[2 + 4 * n : 6 + 4 * n], "big", signed=True) for n in range(axes)]
    raw = data[2 + 4 * axes :]
    try:
        array = to_array("x", datatype, shape, raw)
    except BadInput:
        return
    assert list(array.shape) == shape
    if datatype not in ("BOOL", "BF16"):  # whose values have several spellings
        assert to_raw(datatype, array) == raw


@target
def typed_request(body: bytes) -> None:
    """A `gateway.v1.PredictRequest`, to the V2 request that is made of it."""
    try:
        weight.weigh(body, weight.PREDICT_REQUEST)
        request = prediction_pb2.PredictRequest.FromString(body)
        made = typed._body_of(request)
    except (GatewayError, DecodeError):
        return
    assert peek.peek_request(made).model_name == request.model


# Files and pictures


@cache
def _file() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"), "input")


@target
def config(data: bytes) -> None:
    """A config file."""
    _file().write_bytes(data)
    _maybe(lambda _: load(_file(), {"HOST": "triton"}), b"", ConfigError)


@target
def experiments(data: bytes) -> None:
    """A file of experiment plans."""
    _file().write_bytes(data)
    _maybe(lambda _: load_experiments(_file()), b"", ConfigError)


@target
def captures(data: bytes) -> None:
    """A file of captured requests."""
    _file().write_bytes(data)
    _maybe(lambda _: list(read_capture(os.fspath(_file()))), b"", CommandFailed)


@target
def picture(data: bytes) -> None:
    """An encoded picture."""
    try:
        header = read_header(data)
        if header.width * header.height <= _PIXELS:
            pixels = decode(data, header, Fit(64, 56, draft=True))
            assert pixels.shape in ((3, 56, 56), (1, 56, 56))
    except (BadPicture, Overloaded):
        pass


# Tokens


def with_tokens() -> bool:
    """Is there what reads JWTs? It comes with an extra."""
    return all(importlib.util.find_spec(name) is not None for name in ("gateway.access", "jwt"))


if with_tokens():
    from gateway.access.tokens import Issuer, KeySet, Tokens

    _PUBLIC = {"kty": "OKP", "crv": "Ed25519", "kid": "1", "x": "iojj3XQJ8ZX9UtstPLpdcspnCb8dlBIb83SIAbQPb1w"}
    """The public key of the private key of 32 bytes that are 1; seeds are signed with it."""

    _ISSUER = Issuer("https://issuer", ("gateway",), ("EdDSA",), groups="realm.roles", prefix="i:")

    @target
    def jwt(data: bytes) -> None:
        """A bearer token; and a key set, as an issuer may send it."""
        tokens = Tokens([_ISSUER], {"https://issuer": KeySet({"keys": [_PUBLIC]}, ("EdDSA",))})
        with contextlib.suppress(GatewayError):
            assert tokens.principal(data.decode("latin-1")).name.startswith("i:")
        with contextlib.suppress(ValueError, RecursionError):
            KeySet(json.loads(data), ("RS256", "ES256", "EdDSA"))
