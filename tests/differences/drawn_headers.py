"""What a client may send as the beginning of a call, drawn: header lists and frames, right but for some oddities.

Written by hand, so that anything can be wrong: no library would send most of it. Source: RFC 9113, RFC 7541.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "hostile"))

from frames import (
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PREFACE,
    PRIORITISED,
    data,
    frame,
    integer,
    message,
    settings,
    u32,
    window,
)

Fields = list[tuple[bytes, bytes]]
STREAM = 1


@dataclass
class Drawn:
    """One call, and what is odd about it."""

    fields: Fields
    body: bytes
    odd: list[str] = field(default_factory=list)
    flags: int = END_HEADERS
    kinds: bytes = b"\x00"  # how the fields are indexed, in turn
    before: bytes = b""  # of the header block
    after: bytes = b""
    cuts: list[int] = field(default_factory=list)  # where the block is cut, in percent
    padding: int = -1
    dependency: int = -1
    between: bytes = b""  # frames before those of the body
    ends_with: Fields | None = None  # trailers

    def block(self) -> bytes:
        parts = [self.before]
        for number, (name, value) in enumerate(self.fields):
            kind = self.kinds[number % len(self.kinds)]
            parts.append(bytes((kind,)) + integer(0, 7, len(name)) + name + integer(0, 7, len(value)) + value)
        return b"".join((*parts, self.after))

    def sent(self) -> bytes:
        """All bytes of a connection that makes this call alone."""
        block, flags = self.block(), self.flags
        at = sorted({0, len(block), *(len(block) * cut // 100 for cut in self.cuts)})
        pieces = [block[begin:end] for begin, end in itertools.pairwise(at)] or [b""]
        pieces = [piece[n : n + 16_000] for piece in pieces for n in range(0, max(1, len(piece)), 16_000)]
        first = pieces[0]
        if self.dependency >= 0:
            flags, first = flags | PRIORITISED, u32(self.dependency) + b"\x10" + first
        if self.padding >= 0:
            flags, first = flags | PADDED, bytes((self.padding,)) + first + bytes(min(self.padding, 200))
        out = [PREFACE, settings()]
        if len(pieces) == 1:
            out.append(frame(HEADERS, flags, STREAM, first))
        else:
            out.append(frame(HEADERS, flags & ~END_HEADERS, STREAM, first))
            out += [frame(CONTINUATION, 0, STREAM, piece) for piece in pieces[1:-1]]
            out.append(frame(CONTINUATION, END_HEADERS, STREAM, pieces[-1]))
        out.append(self.between)
        if not flags & END_STREAM:
            out.append(data(STREAM, message(self.body), 0 if self.ends_with is not None else END_STREAM))
            if self.ends_with is not None:
                trailers = Drawn(self.ends_with, b"").block()
                out.append(frame(HEADERS, END_HEADERS | END_STREAM, STREAM, trailers))
        return b"".join(out)


PATH = b"/inference.GRPCInferenceService/ModelInfer"


def right(body: bytes, path: bytes = PATH) -> Drawn:
    pseudo = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"gateway")]
    return Drawn([*pseudo, (b"content-type", b"application/grpc"), (b"te", b"trailers"), (b"x-mark", b"1")], body)


Oddity = Callable[[Drawn, random.Random], None]


def _value_of(drawn: Drawn, name: bytes, value: bytes) -> None:
    drawn.fields = [(key, value if key == name else old) for key, old in drawn.fields]


def _one_of(name: bytes, *values: bytes) -> Oddity:
    def odd(drawn: Drawn, draw: random.Random) -> None:
        value = draw.choice(values)
        _value_of(drawn, name, value)
        drawn.odd.append(f"{name.decode()} {value[:20]!r}")

    return odd


def _added(*choices: tuple[bytes, bytes]) -> Oddity:
    def odd(drawn: Drawn, draw: random.Random) -> None:
        name, value = draw.choice(choices)
        drawn.fields.insert(draw.randint(4, len(drawn.fields)), (name, value))
        drawn.odd.append(f"added {name[:30]!r} {value[:20]!r}")

    return odd


def _left_out(drawn: Drawn, draw: random.Random) -> None:
    name, _ = drawn.fields.pop(draw.randrange(len(drawn.fields)))
    drawn.odd.append(f"without {name.decode('latin-1')}")


def _twice(drawn: Drawn, draw: random.Random) -> None:
    twice = draw.choice(drawn.fields)
    drawn.fields.insert(draw.randint(0, len(drawn.fields)), twice)
    drawn.odd.append(f"twice {twice[0].decode('latin-1')}")


def _moved(drawn: Drawn, draw: random.Random) -> None:
    moved = drawn.fields.pop(draw.randrange(len(drawn.fields)))
    drawn.fields.insert(draw.randint(0, len(drawn.fields)), moved)
    drawn.odd.append(f"moved {moved[0].decode('latin-1')}")


def _byte_in(drawn: Drawn, draw: random.Random, *, is_name: bool) -> None:
    at = draw.randrange(len(drawn.fields))
    pair = list(drawn.fields[at])
    text, where = pair[not is_name], 0
    where = draw.randint(0, len(text))
    byte = bytes((draw.choice((*range(0x30), 0x40, 0x41, 0x5A, 0x5C, 0x7F, 0x80, 0xE4, 0xFF)),))
    pair[not is_name] = text[:where] + byte + text[where + draw.randint(0, 1) :]
    drawn.odd.append(
        f"{'name' if is_name else 'value'} of {drawn.fields[at][0].decode('latin-1')} with {byte!r} at {where}"
    )
    drawn.fields[at] = (pair[0], pair[1])


def _large(drawn: Drawn, draw: random.Random) -> None:
    size = draw.choice((1000, 8000, 15_000, 20_000, 50_000, 70_000, 200_000))
    drawn.fields.append((b"x-large", b"a" * size))
    drawn.odd.append(f"large {size}")


def _many(drawn: Drawn, draw: random.Random) -> None:
    count = draw.choice((10, 60, 80, 95, 120, 500))
    drawn.fields += [(b"x-%d" % number, b"v") for number in range(count)]
    drawn.odd.append(f"many {count}")


def _coded(drawn: Drawn, draw: random.Random) -> None:
    """HPACK: how fields are indexed, and what is wrong in a block."""
    what = draw.randrange(7)
    if what == 0:
        drawn.kinds = bytes(draw.choice((0x00, 0x10, 0x40)) for _ in range(4))
    elif what == 1:
        drawn.before = draw.choice((b"\x20", b"\x3f\xe1\x1f", b"\x3f\xe2\x1f", b"\x20\x3f\xe1\x1f"))
    elif what == 2:
        drawn.after = draw.choice(
            (b"\x20", b"\x80", b"\xbe", b"\xff\xff\xff\xff\xff\xff", b"\x00\x05ab", b"\x00", b"\x40")
        )
    elif what == 3:
        drawn.after = draw.choice((b"\x82", b"\x84", b"\x90", b"\xbd"))  # of the static table: :method, :path, accept…
    elif what == 4:
        drawn.after = b"\x00\x01y\x81" + draw.choice(
            (b"\x1f", b"\x00", b"\xff")
        )  # Huffman: good, bad and wrong padding
    elif what == 5:
        drawn.after = b"\x0f" + draw.choice((b"\x00", b"\x11", b"\x2f", b"\xff\x7f")) + b"\x01v"
    else:
        drawn.after = bytes(draw.randrange(256) for _ in range(draw.randint(1, 6)))
    drawn.odd.append(f"hpack {what} {drawn.before.hex()} {drawn.after.hex()}")


def _framed(drawn: Drawn, draw: random.Random) -> None:
    what = draw.randrange(9)
    if what == 0:
        drawn.cuts = [draw.randint(0, 100) for _ in range(draw.choice((1, 2, 5, 12)))]
    elif what == 1:
        drawn.padding = draw.choice((0, 1, 100, 200, 255))
    elif what == 2:
        drawn.dependency = draw.choice((0, 1, 3, 5, 1 << 31))
    elif what == 3:
        drawn.flags |= END_STREAM
    elif what == 4:
        drawn.between = frame(draw.choice((0x0B, 0x10, 0xFF)), 0, draw.choice((0, 1)), b"x" * draw.randint(0, 20))
    elif what == 5:
        drawn.between = draw.choice(
            (frame(2, 0, 1, u32(0) + b"\x10"), frame(2, 0, 1, u32(1) + b"\x10"), frame(2, 0, 1, b"x"))
        )
    elif what == 6:
        drawn.between = window(draw.choice((0, 1, 3)), draw.choice((0, 1, 1000, 0x7FFFFFFF)))
    elif what == 7:
        trailers: list[Fields] = [[], [(b"x-end", b"1")], [(b":path", b"/")], [(b"X-End", b"1")], [(b"te", b"gzip")]]
        drawn.ends_with = draw.choice(trailers)
    else:
        drawn.between = data(STREAM, b"") * draw.choice((1, 3))
    drawn.odd.append(
        f"frames {what} {drawn.cuts} {drawn.padding} {drawn.dependency} {drawn.between[:30].hex()} {drawn.ends_with}"
    )


ODDITIES: list[Oddity] = [
    _one_of(b":method", b"GET", b"post", b"PUT", b"CONNECT", b"", b"PO ST", b"OPTIONS", b"HEAD"),
    _one_of(b":scheme", b"https", b"", b"ftp", b"HTTP", b"ht tp", b"http:"),
    _one_of(b":path", b"", b"*", b"x", b"/x y", b"/#", b"/\xc3\xa4", PATH + b"?a=b", b"//", b"/%zz", PATH + b"/",
            b"http://gateway" + PATH),
    _one_of(b":authority", b"", b"a b", b"user@gateway", b"gateway:99999", b"[::1]:80", b"g\xc3\xa4", b"a,b", b"a/b"),
    _one_of(b"content-type", b"", b"text/html", b"application/grpc+proto", b"application/grpc;x=y", b"APPLICATION/GRPC",
            b"application/grpcx"),
    _one_of(b"te", b"", b"gzip", b"trailers, gzip", b"Trailers", b" trailers"),
    _added(
        (b"connection", b"close"), (b"keep-alive", b"1"), (b"proxy-connection", b"x"),
        (b"transfer-encoding", b"chunked"),
        (b"upgrade", b"h2c"), (b"host", b"gateway"), (b"host", b"other"), (b"http2-settings", b"AAMAAABkAAQAAP__"),
        (b"expect", b"100-continue"), (b"cookie", b"a=b"), (b"cookie", b"c=d"), (b"trailer", b"x"),
    ),
    _added(
        (b"content-length", b"0"), (b"content-length", b"-1"), (b"content-length", b"+9"), (b"content-length", b"1x"),
        (b"content-length", b"99999999999999999999"), (b"content-length", b""), (b"content-length", b"5, 5"),
    ),
    _added(
        (b"grpc-timeout", b"10S"), (b"grpc-timeout", b"1"), (b"grpc-timeout", b"123456789S"), (b"grpc-timeout", b"-1S"),
        (b"grpc-encoding", b"identity"), (b"grpc-encoding", b"br"), (b"grpc-accept-encoding", b"gzip,,"),
        (b"x-a-bin", b"AAA"), (b"x-a-bin", b"!"), (b"x-a", b""), (b"x-a", b" v "), (b"x_a", b"v"), (b"x.a", b"v"),
    ),
    _added(
        (b"grpc-previous-rpc-attempts", b"1"), (b"grpc-previous-rpc-attempts", b"x"), (b"grpc-status", b"x"),
        (b"grpc-message", b"%"), (b"grpc-retry-pushback-ms", b"x"), (b"grpc-trace-bin", b"!"), (b"lb-token", b"x"),
    ),
    _added((b":status", b"200"), (b":unknown", b"x"), (b":", b"x"), (b":protocol", b"websocket")),
    _added((b"", b"x"), (b"a:b", b"x")),
    _left_out, _left_out, _twice, _moved, _large, _many, _coded, _coded, _framed, _framed,
    lambda drawn, draw: _byte_in(drawn, draw, is_name=True),
    lambda drawn, draw: _byte_in(drawn, draw, is_name=False),
]  # fmt: skip


def drawn(body: bytes, draw: random.Random) -> Drawn:
    """A call with up to three oddities."""
    call = right(body)
    for oddity in draw.sample(ODDITIES, draw.choice((0, 1, 1, 1, 1, 2, 2, 3))):
        oddity(call, draw)
    return call
