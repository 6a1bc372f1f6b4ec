"""What one caller may do to a gateway, as hypothesis strategies: everything of tests/hostile, on every kind of call.

An abuse is frames for a number of streams, and how they are sent; `playing` sends them. `EVERY` has each kind at its
fullest, `abuses` draws kinds, sizes, places and cuts. `Place` is where an abuse calls.
"""

from __future__ import annotations

import functools
import gzip
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    PADDED,
    PRIORITY,
    Pair,
    block,
    data,
    frame,
    headers,
    integer,
    literal,
    message,
    ping,
    rst,
    settings,
    u32,
    window,
)
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from gateway.v1 import prediction_pb2

KiB, MiB = 1 << 10, 1 << 20

PUBLIC_MODELS = ("identity_fp32", "counted", "picky", "words", "silent", "repeat", "fails")
PUBLIC_MODELS += ("accumulate", "accumulate_text", "identity_fp64")
"""Each is public as `p-NAME`, and merging as `m-NAME`. The last is the neighbours' alone."""

Unit = Callable[[int], bytes]
"""The frames of the n-th stream, by its id."""


@dataclass(frozen=True)
class Abuse:
    what: str
    unit: Unit = field(repr=False)
    count: int = 1  # streams on each connection
    opening: bytes = field(default=b"", repr=False)
    connections: int = 1
    pause: float = 0.0  # seconds after each unit
    hold: float = 0.0  # seconds that all is left as it is at the end
    window: int = 65_535  # bytes of each answer that are wanted at first
    reads: bool = True  # and then as many as come
    cut: int = 0  # bytes at the end of the last unit that are not sent


@dataclass(frozen=True)
class Place:
    """A method, and a way to models: their own names, public ones, or public ones that merge."""

    method: str
    prefix: str

    def __repr__(self) -> str:
        return f"{self.method} to {self.prefix}…"

    @property
    def path(self) -> bytes:
        services = {"Predict": "gateway.v1.PredictionService", "Reflection": "grpc.reflection.v1alpha.ServerReflection"}
        own = [service for part, service in services.items() if part in self.method]
        return f"/{(own or ['inference.GRPCInferenceService'])[0]}/{self.method}".encode()

    @property
    def is_stream(self) -> bool:
        return "Stream" in self.method or self.method == "ServerReflectionInfo"

    def body(
        self, model: str = "identity_fp32", values: Any = ((1.0, 2.0),), datatype: str = "FP32", **given: Any
    ) -> bytes:
        """A request. given: id, version, input, output: texts; parameters."""
        make = self._typed if "Predict" in self.method else self._v2
        array = np.asarray(values, {"FP32": np.float32, "INT32": np.int32}.get(datatype, np.object_))
        return make(self.prefix + model, array, datatype, given)

    def _v2(self, model: str, array: np.ndarray, datatype: str, given: dict[str, Any]) -> bytes:
        request = pb.ModelInferRequest(model_name=model, id=given.get("id", ""), model_version=given.get("version", ""))
        request.inputs.add(name=given.get("input", "IN"), datatype=datatype, shape=array.shape)
        elements = array.flatten().tolist()
        raw = array.tobytes()
        if datatype == "BYTES":
            raw = b"".join(len(element).to_bytes(4, "little") + element for element in elements)
        request.raw_input_contents.append(raw)
        if "code" in given:
            code = given["code"].encode()
            request.inputs.add(name="CODE", datatype="BYTES", shape=[1])
            request.raw_input_contents.append(len(code).to_bytes(4, "little") + code)
        if "output" in given:
            request.outputs.add(name=given["output"])
        for key, value in given.get("parameters", {}).items():
            kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
            setattr(request.parameters[key], kind, value)
        return bytes(request.SerializeToString())

    def _typed(self, model: str, array: np.ndarray, datatype: str, given: dict[str, Any]) -> bytes:
        request = prediction_pb2.PredictRequest(model=model, model_version=given.get("version", ""))
        tensor = request.inputs[given.get("input", "IN")]
        tensor.datatype = datatype
        tensor.shape[:] = array.shape
        if datatype == "BYTES":
            tensor.raw = b"".join(len(element).to_bytes(4, "little") + element for element in array.flatten().tolist())
        else:
            tensor.raw = array.tobytes()
        if "code" in given:
            request.inputs["CODE"].strings.values.append(given["code"].encode())
        if "output" in given:
            request.outputs.append(given["output"])
        request.parameters.update({key: str(value) for key, value in given.get("parameters", {}).items()})
        if self.is_stream:
            request = prediction_pb2.StreamPredictRequest(id=given.get("id", ""), request=request)
        return bytes(request.SerializeToString())

    def head(self, stream: int, *extra: Pair, end: bool = False) -> bytes:
        pseudo = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", self.path), (b":authority", b"abuse"))
        fields = block((*pseudo, (b"te", b"trailers"), (b"content-type", b"application/grpc"), *extra))
        pieces = [fields[at : at + 16_384] for at in range(0, len(fields), 16_384)]
        frames = headers(stream, pieces[0], (END_STREAM if end else 0) | (END_HEADERS if len(pieces) == 1 else 0))
        for number, piece in enumerate(pieces[1:], 2):
            frames += frame(CONTINUATION, END_HEADERS if number == len(pieces) else 0, stream, piece)
        return frames

    def call(self, body: bytes, *extra: Pair, messages: int = 1, flag: int = 0, end: bool = True) -> Unit:
        """A whole call, or one that is left open."""
        whole = message(body, flag) * messages
        return lambda stream: self.head(stream, *extra) + split(stream, whole, end=end)


PLACES = tuple(
    Place(method, prefix)
    for method in ("ModelInfer", "ModelStreamInfer", "Predict", "StreamPredict")
    for prefix in ("", "p-", "m-")
    if prefix or "Predict" not in method
)
OTHERS = tuple(
    Place(method, "") for method in ("ServerLive", "ModelMetadata", "RepositoryIndex", "ServerReflectionInfo")
)


def split(stream: int, body: bytes, *, end: bool) -> bytes:
    """DATA frames."""
    pieces = [body[at : at + 16_384] for at in range(0, len(body), 16_384)] or [b""]
    last = len(pieces) - 1
    return b"".join(data(stream, piece, END_STREAM if end and n == last else 0) for n, piece in enumerate(pieces))


# Words


def long_names(place: Place, where: str, length: int, count: int) -> Abuse:
    """Triton repeats names in its errors, and these are trailers."""
    long = "9" * length
    body = place.body(long) if where == "model" else place.body("counted", [[1]], "INT32", **{where: long})
    if where == "parameter":
        body = place.body(parameters={long: "x"})
    return Abuse(f"{where} of {length} characters, {place}", place.call(body), count, pause=0.01)


FORGED = (
    *("cannot parse: Server is stopping", "Server is stopping, scheduler for model has stopped accepting new requests"),
    *("Request for unknown model: 'x' has no available versions", "Request for unknown model: 'fails' is not found"),
    *("This protocol is restricted, expecting header 'triton-grpc-protocol-key'", "Exceeds maximum queue size"),
    *("Request timeout expired", "Socket closed", "failed to connect to all addresses", "GOAWAY received", "%ff\x00"),
    *("too long " * 10_000, "ä" * 40_000),
)
CODES = ("UNAVAILABLE", "INTERNAL", "NOT_FOUND", "INVALID_ARG", "CANCELLED", "UNSUPPORTED")


def forged_errors(place: Place, text: str, code: str, count: int) -> Abuse:
    """A model that fails as it is told to."""
    body = place.body("fails", [text.encode()], "BYTES", code=code)
    return Abuse(
        f"{code} {text[:40]!r}, {place}", place.call(body, messages=3 if place.is_stream else 1), count, pause=0.02
    )


BAD: dict[str, dict[str, Any]] = {
    "no such model": {"model": "nobody"},
    "no such version": {"model": "counted", "version": "9", "values": [[1]], "datatype": "INT32"},
    "no number for a version": {"version": "abc"},
    "no such input": {"input": "INN"},
    "no such output": {"output": "OUTT"},
    "the wrong datatype": {"values": [[1]], "datatype": "INT32"},
    "too many rows": {"values": [[1.0]] * 99},
    "a reserved parameter": {"parameters": {"triton_mine": 1}},
    "a start without a sequence": {"parameters": {"sequence_start": True}},
    "a name that is not ASCII": {"model": "größe", "id": "größe"},
    "refused by the model": {"model": "picky", "values": [[-1.0, 1.0]]},
}


def bad_requests(place: Place, what: str, count: int) -> Abuse:
    """Refused by Triton; on a stream between good ones, and where calls are merged among others."""
    bad, good = message(place.body(**BAD[what])), message(place.body())
    whole = good + bad * 5 + good if place.is_stream else bad
    return Abuse(
        f"{what}, {place}", lambda stream: place.head(stream) + split(stream, whole, end=True), count, pause=0.005
    )


def bad_bytes(place: Place, seed: int, count: int) -> Abuse:
    """A good message with a few bytes changed, or cut, or that is not UTF-8."""
    good = place.body(id="id", parameters={"a": "b"})

    def unit(stream: int) -> bytes:
        chance = random.Random(f"{seed} {stream}")
        body = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            body[chance.randrange(len(body))] = chance.choice((0xFF, 0x80, 0x00, chance.randrange(256)))
        return place.head(stream) + split(stream, message(bytes(body[: chance.randint(1, len(body))])), end=True)

    return Abuse(f"bad bytes, {place}", unit, count)


def spoilt_merges(seed: int, count: int) -> Abuse:
    """What may be merged with others' calls and must not: other versions, metadata, shapes, parameters, deadlines."""
    place = Place("ModelInfer", "m-")

    def unit(stream: int) -> bytes:
        chance = random.Random(f"{seed} {stream}")
        extra = chance.choice(((), ((b"x-who", b"%d" % stream),), ((b"grpc-timeout", b"3m"),), ((b"x-a-bin", b"AA"),)))
        version = chance.choice(("", "1", "2", "9"))
        body = chance.choice(
            (
                place.body("counted", [[stream] * chance.randint(1, 3)], "INT32", version=version, id=str(stream)),
                place.body("picky", [[chance.choice((-1.0, 1.0)), 2.0]], id="bad"),
                place.body("words", [[b"z y x"]], "BYTES"),
                place.body("silent", [[1]], "INT32"),
                place.body(values=[[float(stream)] * chance.randint(1, 3)] * chance.randint(1, 9)),
            )
        )
        ending = rst(stream) if chance.random() < 0.1 else b""
        return place.head(stream, *extra) + split(stream, message(body), end=True) + ending

    return Abuse(f"spoilt merges {seed}", unit, count, pause=0.002)


def broken_sequences(place: Place, count: int) -> Abuse:
    """Begun and left, ended without a beginning, begun twice; not those of the neighbours."""

    def unit(stream: int) -> bytes:
        flags = ({"sequence_start": True}, {"sequence_end": True}, {}, {"sequence_start": True, "sequence_end": True})
        parameters = {"sequence_id": f"abuse-{stream}", **flags[stream // 2 % 4]}
        body = place.body("accumulate_text", [[1]], "INT32", parameters=parameters)
        return place.head(stream, (b"grpc-timeout", b"2S")) + split(stream, message(body), end=True)

    return Abuse(f"broken sequences, {place}", unit, count, pause=0.01)


# Sizes


def bombs(place: Place, encoding: str, megabytes: int, count: int) -> Abuse:
    def unit(stream: int) -> bytes:
        return place.call(_packed(encoding, megabytes), (b"grpc-encoding", encoding.encode()), flag=1)(stream)

    return Abuse(f"{encoding} bomb of {megabytes} MiB, {place}", unit, count)


@functools.cache
def _packed(encoding: str, megabytes: int) -> bytes:
    plain = bytes(megabytes * MiB)
    return gzip.compress(plain, 6) if encoding == "gzip" else zlib.compress(plain, 6)


def unfinished(place: Place, kilobytes: int, count: int, hold: float) -> Abuse:
    """Messages that lack their end; those with tensors have them before the model's name."""
    size = kilobytes * KiB
    start = b"\0" + u32(size + 100) + _field(7, size + 50) + bytes(size)
    return Abuse(
        f"unfinished messages of {kilobytes} KiB, {place}",
        lambda stream: place.head(stream) + split(stream, start, end=False),
        count,
        hold=hold,
    )


def _field(number: int, length: int) -> bytes:
    """The beginning of a protobuf field of so many bytes."""
    written = bytearray((number << 3 | 2,))
    while length >= 128:
        written.append(length & 127 | 128)
        length >>= 7
    return bytes((*written, length))


def half_messages(place: Place, less: int, end: bool, count: int) -> Abuse:
    whole = message(place.body())[:-less]
    return Abuse(
        f"messages without their last {less} bytes, {place}",
        lambda stream: place.head(stream) + split(stream, whole, end=end),
        count,
        hold=0.0 if end else 0.3,
    )


def many_messages(place: Place, kind: str, count: int, number: int, ending: str) -> Abuse:
    """A stream, or a call, with messages by the thousand."""
    one = {"empty": message(b""), "good": message(place.body()), "bad": message(place.body(input="INN"))}[kind]

    def unit(stream: int) -> bytes:
        sent = place.head(stream) + split(stream, one * number, end=ending == "end")
        return sent + rst(stream) if ending == "reset" else sent

    return Abuse(f"{number} {kind} messages, then {ending}, {place}", unit, count, hold=0.2)


def unread_answers(place: Place, window: int, count: int, hold: float) -> Abuse:
    """Large answers that nobody takes, or not to their end."""
    body = place.body(values=[[1.0] * (64 * KiB)])
    unit = place.call(body, messages=4 if place.is_stream else 1)
    return Abuse(f"answers into a window of {window}, {place}", unit, count, window=window, reads=False, hold=hold)


def decoupled(prefix: str, answers: int, count: int, cancel: bool) -> Abuse:
    """Many answers to one request, unread, and the stream left."""
    place = Place("ModelStreamInfer", prefix)
    call = place.call(place.body("repeat", [answers], "INT32"))
    unit = (lambda stream: call(stream) + rst(stream)) if cancel else call
    return Abuse(f"{answers} answers each, {place}", unit, count, window=0, reads=False, pause=0.01, hold=0.2)


# Haste


def resets(place: Place, code: int, whole: bool, pause: float, count: int) -> Abuse:
    body = message(place.body())
    whole_body = body if whole else body[:-1]

    def unit(stream: int) -> bytes:
        return place.head(stream) + split(stream, whole_body, end=whole) + rst(stream, code)

    return Abuse(f"resets with code {code}, whole={whole}, {place}", unit, count, pause=pause)


def deadlines(place: Place, unit_: str, count: int) -> Abuse:
    """A distinct one for each call, from next to nothing to a day and more."""
    body = message(place.body())

    def unit(stream: int) -> bytes:
        return place.head(stream, (b"grpc-timeout", b"%d%s" % (1 + stream, unit_.encode()))) + split(
            stream, body, end=True
        )

    return Abuse(f"deadlines in {unit_}, {place}", unit, count)


LARGEST = (1 << 31) - 1
CONTROL: dict[str, Unit] = {
    "PING": lambda _: ping(),
    "SETTINGS": lambda n: settings([(4, 65_535 + n), (1, n % 5000)]),
    "WINDOW_UPDATE": lambda _: window(0, 1),
    "window overflow": lambda _: window(0, LARGEST),
    "PRIORITY": lambda stream: frame(PRIORITY, 0, stream, u32(0) + b"x"),
    "unknown frames": lambda _: frame(0xFA, 0, 0, b"unknown"),
    "CONTINUATION": lambda _: frame(CONTINUATION, 0, 1, b"\0\x01x\x01y" * 100),
    "DATA on idle streams": lambda stream: data(stream + 100_000, b"x"),
    "RST of idle streams": lambda stream: rst(stream + 100_000),
}


def control_frames(what: str, count: int) -> Abuse:
    return Abuse(what, CONTROL[what], count)


def empty_frames(place: Place, kind: str, count: int) -> Abuse:
    one = data(1, b"") if kind == "nothing" else frame(DATA, PADDED, 1, b"\x05" + bytes(5))
    return Abuse(f"DATA of {kind}, {place}", lambda _: one, count, place.head(1))


def connections(place: Place, count: int, hold: float) -> Abuse:
    return Abuse(f"connections with half a call, {place}", place.head, 1, connections=count, hold=hold)


# Heads

_LINE_FEEDS = sum(0x3FFFFFFC << 30 * place for place in range(4)).to_bytes(15, "big")  # four codes of 30 bits
HUFFMAN = {"short codes": b"\x00" * 3000, "long codes": _LINE_FEEDS * 200, "no end": b"\xff" * 3000}


def _huffman(name: bytes, coded: bytes) -> bytes:
    """A literal whose value is Huffman-coded."""
    return b"\0" + integer(0, 7, len(name)) + name + integer(0x80, 7, len(coded)) + coded


def header_lists(place: Place, what: str, count: int) -> Abuse:
    good = place.head(1)[9:]
    bomb = headers(1, good + literal(b"x", b"v" * 3900, kind=0x40))

    def fragment(stream: int) -> bytes:
        match what:
            case "large":
                return good + literal(b"x", b"v" * 15_000)
            case "many":
                return good + b"".join(literal(b"x-%d" % n, b"") for n in range(400))
            case "entries":
                return good + b"".join(literal(b"x-%d-%d" % (stream, n), b"v" * 30, kind=0x40) for n in range(80))
            case "bomb":
                return good + integer(0x80, 7, 62) * 15_000
            case "table sizes":
                return integer(0x20, 5, stream % 4096) * 2 + good
            case "no such index":
                return good + integer(0x80, 7, 9000)
        return good + _huffman(b"x", HUFFMAN[what]) * 4

    def unit(stream: int) -> bytes:
        return headers(stream, fragment(stream), END_HEADERS | END_STREAM)

    return Abuse(f"header lists: {what}, {place}", unit, count, bomb if what == "bomb" else b"")


HEADERS = ("large", "many", "entries", "bomb", "table sizes", "no such index", *HUFFMAN)
FIELDS: tuple[tuple[Pair, ...], ...] = (
    ((b"grpc-timeout", b"99999999999S"),),
    ((b"grpc-encoding", b"no such"),),
    ((b"te", b"gzip"),),
    ((b"x-shared-bin", b"!"),),
    ((b"x-shared", b"\x00"),),
    ((b"x-shared", b"\x80\xff"),),
    ((b"x-shared", b" spaces "),),
    ((b"X-Shared", b"v"),),
    ((b":status", b"200"),),
    ((b"host", b"elsewhere"),),
    ((b"content-length", b"7"),),
    ((b"connection", b"x-shared"),),
    ((b"grpc-status", b"0"), (b"grpc-message", b"%zz")),
    ((b"traceparent", b"00-" + b"ab" * 16 + b"-" + b"cd" * 8 + b"-01"),),
    ((b"", b"x"),),
)


def odd_fields(place: Place, number: int, count: int) -> Abuse:
    return Abuse(f"{FIELDS[number]}, {place}", place.call(place.body(), *FIELDS[number]), count)


def noise(place: Place, seed: int, count: int) -> Abuse:
    """Good frames with a few bytes changed, each on a connection of its own as long as it is let."""
    good = place.call(place.body())

    def unit(stream: int) -> bytes:
        chance = random.Random(f"{seed} {stream}")
        frames = bytearray(good(stream))
        for _ in range(chance.randint(1, 5)):
            frames[chance.randrange(len(frames))] = chance.randrange(256)
        return bytes(frames)

    return Abuse(f"noise {seed}, {place}", unit, count, connections=8)


# All of it

places = st.sampled_from(PLACES)
streams = st.sampled_from([place for place in PLACES if place.is_stream])
unary = st.sampled_from([place for place in PLACES if not place.is_stream])
anywhere = st.sampled_from((*PLACES, *OTHERS))
counts = st.sampled_from([1, 5, 30, 100])
floods = st.sampled_from([50, 500, 3000])
seeds = st.integers(0, 10_000)
holds = st.sampled_from([0.0, 0.3, 1.0])
LENGTHS = (1000, 8000, 20_000, 70_000, 300_000)
NAMES = ("model", "version", "id", "input", "output", "parameter")
ENDINGS = ("end", "reset", "silence")
TIMEOUTS = ("n", "u", "m", "S", "M", "H")

kinds: tuple[st.SearchStrategy[Abuse], ...] = (
    st.builds(long_names, places, st.sampled_from(NAMES), st.sampled_from(LENGTHS), st.sampled_from([1, 5, 30])),
    st.builds(forged_errors, places, st.sampled_from(FORGED), st.sampled_from(CODES), st.sampled_from([1, 5, 30])),
    st.builds(bad_requests, places, st.sampled_from(sorted(BAD)), counts),
    st.builds(bad_bytes, anywhere, seeds, counts),
    st.builds(spoilt_merges, seeds, counts),
    st.builds(broken_sequences, places, st.sampled_from([1, 5, 20])),
    st.builds(bombs, anywhere, st.sampled_from(["gzip", "deflate"]), st.sampled_from([1, 16, 100]), st.integers(1, 8)),
    st.builds(unfinished, anywhere, st.sampled_from([1, 60, 1000, 20_000]), st.sampled_from([1, 10, 100]), holds),
    st.builds(half_messages, anywhere, st.integers(1, 20), st.booleans(), counts),
    st.builds(
        many_messages,
        anywhere,
        st.sampled_from(["empty", "good", "bad"]),
        st.integers(1, 4),
        st.sampled_from([10, 300, 3000]),
        st.sampled_from(ENDINGS),
    ),
    st.builds(
        many_messages,
        streams | st.just(OTHERS[3]),
        st.just("empty"),
        st.integers(1, 4),
        st.just(200_000),
        st.sampled_from(ENDINGS),
    ),
    st.builds(unread_answers, places, st.sampled_from([0, 1, 1000, 65_535]), st.sampled_from([1, 10, 50]), holds),
    st.builds(
        decoupled, st.sampled_from(["", "p-", "m-"]), st.sampled_from([1, 100, 1000]), st.integers(1, 5), st.booleans()
    ),
    st.builds(resets, anywhere, st.integers(0, 13), st.booleans(), st.sampled_from([0.0, 0.005, 0.03]), floods),
    st.builds(deadlines, places, st.sampled_from(TIMEOUTS), floods),
    st.builds(control_frames, st.sampled_from(sorted(CONTROL)), floods),
    st.builds(empty_frames, anywhere, st.sampled_from(["nothing", "padding"]), floods),
    st.builds(connections, anywhere, st.sampled_from([5, 50, 200]), holds),
    st.builds(header_lists, anywhere, st.sampled_from(HEADERS), st.sampled_from([1, 30, 300])),
    st.builds(odd_fields, anywhere, st.integers(0, len(FIELDS) - 1), counts),
    st.builds(noise, anywhere, seeds, counts),
)


def _cut(abuse: Abuse, cut: int) -> Abuse:
    return Abuse(**{**vars(abuse), "cut": cut})


abuses = st.one_of(kinds) | st.builds(_cut, st.one_of(kinds), st.integers(1, 400))
scripts = st.lists(abuses, min_size=1, max_size=4)
"""What is done at the same time."""

_OWN, _PUBLIC, _MERGED = (Place("ModelInfer", prefix) for prefix in ("", "p-", "m-"))
_STREAM, _MERGED_STREAM = Place("ModelStreamInfer", "p-"), Place("ModelStreamInfer", "m-")
_TYPED, _TYPED_STREAM = Place("Predict", "p-"), Place("StreamPredict", "p-")

EVERY: dict[str, tuple[Abuse, ...]] = {
    "long names": (
        *(long_names(place, where, 70_000, 20) for place, where in zip((_OWN, _PUBLIC, _MERGED), NAMES, strict=False)),
        *(
            long_names(place, where, 70_000, 20)
            for place, where in zip((_STREAM, _TYPED, _OWN), NAMES[3:], strict=True)
        ),
    ),
    "errors in streams that sound like a server's": tuple(
        forged_errors(place, text, "INTERNAL", 20)
        for place in (_STREAM, _MERGED_STREAM, _TYPED_STREAM)
        for text in (FORGED[0], FORGED[1])
    ),
    "UNAVAILABLE by a model": tuple(
        forged_errors(place, FORGED[4], "UNAVAILABLE", 20) for place in (_OWN, _PUBLIC, _MERGED, _TYPED, _STREAM)
    ),
    "UNAVAILABLE that sounds like a server's": tuple(
        forged_errors(_PUBLIC, text, "UNAVAILABLE", 20) for text in (FORGED[1], FORGED[5], FORGED[-2])
    ),
    "NOT_FOUND by a model": (forged_errors(_PUBLIC, FORGED[2], "NOT_FOUND", 20),),
    "bad requests": (*(bad_requests(_MERGED, what, 50) for what in BAD), bad_requests(_STREAM, "no such input", 30)),
    "bad bytes": (bad_bytes(_PUBLIC, 1, 200), bad_bytes(_STREAM, 2, 200), bad_bytes(_TYPED, 3, 200)),
    "spoilt merges": (spoilt_merges(1, 200), spoilt_merges(2, 200)),
    "broken sequences": (broken_sequences(_PUBLIC, 30), broken_sequences(_STREAM, 30)),
    "bombs": (bombs(_PUBLIC, "gzip", 100, 8), bombs(_STREAM, "deflate", 100, 8)),
    "unfinished small methods": (unfinished(OTHERS[0], 24_000, 24, 0.5),),
    "unfinished calls": (unfinished(_PUBLIC, 24_000, 24, 0.5), unfinished(_TYPED, 24_000, 24, 0.5)),
    "unfinished streams": (unfinished(_STREAM, 24_000, 24, 0.5), half_messages(_STREAM, 3, False, 50)),
    "halves": (half_messages(_PUBLIC, 3, True, 50), half_messages(_TYPED, 3, True, 50)),
    **{
        f"empty messages, then {ending}": tuple(
            many_messages(place, "empty", 1, 200_000, ending) for place in (_STREAM, _TYPED_STREAM, OTHERS[3])
        )
        for ending in ENDINGS
    },
    "many messages": (many_messages(_STREAM, "good", 2, 3000, "reset"), many_messages(_STREAM, "bad", 2, 3000, "end")),
    "unread answers": tuple(unread_answers(place, 0, 50, 0.5) for place in (_PUBLIC, _STREAM, _TYPED)),
    "unread decoupled answers": (decoupled("p-", 1000, 5, True), decoupled("", 1000, 5, False)),
    "resets": tuple(
        resets(place, code, whole, 0.0, 3000)
        for place, code, whole in ((_PUBLIC, 0, True), (_PUBLIC, 8, True), (_STREAM, 0, False))
    ),
    "deadlines": tuple(deadlines(_PUBLIC, unit, 1000) for unit in ("u", "H")),
    "control frames": (*(control_frames(what, 3000) for what in CONTROL), empty_frames(_STREAM, "nothing", 3000)),
    "connections": (connections(_PUBLIC, 200, 0.5),),
    "header lists": tuple(header_lists(_PUBLIC, what, 300) for what in HEADERS),
    "odd fields": tuple(odd_fields(_PUBLIC, number, 20) for number in range(len(FIELDS))),
    "noise": (noise(_STREAM, 3, 50), noise(_MERGED, 4, 50)),
}
"""By kind, what is done at the same time."""
