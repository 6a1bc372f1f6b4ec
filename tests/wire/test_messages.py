"""Message prefixes and bounded decompression."""

from __future__ import annotations

import gzip
import itertools
import os
import zlib

import pytest

from gateway.status import Code
from gateway.wire.codes import CallFailed, from_http, from_reset
from gateway.wire.limits import Limits, MiB
from gateway.wire.messages import Inflater, compress, decompress, prefix, read_prefix

LIMITS = Limits()


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
@pytest.mark.parametrize(
    "body", [b"", b"x", os.urandom(100_000), bytes(1 * MiB)], ids=["empty", "one", "random", "zeros"]
)
def test_compressed_messages_come_back_whole(encoding: bytes, body: bytes) -> None:
    assert decompress(compress(body, encoding), encoding, LIMITS) == body


def test_other_compressors_are_understood() -> None:
    assert decompress(gzip.compress(b"abc"), b"gzip", LIMITS) == b"abc"
    assert decompress(zlib.compress(b"abc"), b"deflate", LIMITS) == b"abc"


@pytest.mark.parametrize(
    ("body", "encoding", "code"),
    [
        (gzip.compress(bytes(8 * MiB + 1)), b"gzip", Code.RESOURCE_EXHAUSTED),
        (gzip.compress(os.urandom(8 * MiB + 1), 1), b"gzip", Code.RESOURCE_EXHAUSTED),
        (gzip.compress(b"abc") * 2, b"gzip", Code.INTERNAL),
        (gzip.compress(b"abc") + bytes(100_000), b"gzip", Code.INTERNAL),
        (gzip.compress(bytes(4 * MiB))[:-1], b"gzip", Code.INTERNAL),
        (gzip.compress(b"abc") + b"junk", b"gzip", Code.INTERNAL),
        (gzip.compress(b"abc")[:-1], b"gzip", Code.INTERNAL),
        (b"not gzip", b"gzip", Code.INTERNAL),
        (b"", b"gzip", Code.INTERNAL),
        (b"abc", b"snappy", Code.UNIMPLEMENTED),
        (b"abc", b"", Code.INTERNAL),
        (b"abc", b"identity", Code.INTERNAL),
    ],
    ids=[
        "bomb",
        "large",
        "two",
        "much-junk",
        "large-cut",
        "junk",
        "cut",
        "garbage",
        "empty",
        "unknown",
        "unnamed",
        "identity",
    ],
)
def test_what_cannot_be_decompressed_safely_fails_the_call(body: bytes, encoding: bytes, code: Code) -> None:
    with pytest.raises(CallFailed) as failure:
        decompress(body, encoding, Limits(message_bytes=8 * MiB))
    assert failure.value.code is code


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
@pytest.mark.parametrize(
    "body",
    [bytes(8 * MiB), b"\xff\x00" * (4 * MiB), b"\0\0\0\1" * 77 * 1000, os.urandom(8 * MiB)],
    ids=["zeros", "mask", "padded ids", "random"],
)
def test_whatever_a_message_may_hold_may_come_compressed(body: bytes, encoding: bytes) -> None:
    """However well it compresses: a mask does so 910-fold, zeros 1024-fold. Its size is the only bound."""
    assert decompress(compress(body, encoding), encoding, Limits(message_bytes=8 * MiB)) == body


@pytest.mark.parametrize("step", [1, 1000, 65_536, 1 << 20])
def test_a_message_inflates_in_slices_no_larger_than_asked_for(step: int) -> None:
    body = bytes(100_000) if step > 1 else b"abc" * 30
    inflater = Inflater(gzip.compress(body), b"gzip", len(body))
    sizes = [0]
    while not inflater.step(step):
        sizes.append(inflater.size)
    assert inflater.body == body
    assert all(after - before <= step for before, after in itertools.pairwise(sizes))


def test_a_message_never_grows_beyond_the_message_limit() -> None:
    with pytest.raises(CallFailed, match="1000 bytes"):
        decompress(gzip.compress(bytes(1001)), b"gzip", Limits(message_bytes=1000))


@pytest.mark.parametrize(("length", "fits"), [(99, True), (100, True), (101, False), (0xFFFFFFFF, False)])
def test_a_length_is_refused_from_its_prefix_alone(length: int, fits: bool) -> None:
    head = prefix(length)
    if fits:
        assert read_prefix(head, 0, 100) == (length, False)
    else:
        with pytest.raises(CallFailed, match=f"{length} bytes .* 100 bytes") as failure:
            read_prefix(head, 0, 100)
        assert failure.value.code is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("flag", [2, 3, 255])
def test_a_flag_that_is_neither_0_nor_1_is_an_error(flag: int) -> None:
    with pytest.raises(CallFailed) as failure:
        read_prefix(bytes([flag, 0, 0, 0, 0]), 0, 100)
    assert failure.value.code is Code.INTERNAL


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (b"400", Code.INTERNAL),
        (b"401", Code.UNAUTHENTICATED),
        (b"403", Code.PERMISSION_DENIED),
        (b"404", Code.UNIMPLEMENTED),
        (b"429", Code.UNAVAILABLE),
        (b"431", Code.INTERNAL),
        (b"502", Code.UNAVAILABLE),
        (b"503", Code.UNAVAILABLE),
        (b"504", Code.UNAVAILABLE),
        (b"500", Code.UNKNOWN),
        (b"302", Code.UNKNOWN),
        (b"", Code.UNKNOWN),
    ],
)
def test_http_statuses_map_as_grpc_says(status: bytes, code: Code) -> None:
    assert from_http(status) is code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (0, Code.INTERNAL),
        (1, Code.INTERNAL),
        (7, Code.UNAVAILABLE),
        (8, Code.CANCELLED),
        (11, Code.RESOURCE_EXHAUSTED),
        (12, Code.PERMISSION_DENIED),
        (13, Code.INTERNAL),
        (99, Code.INTERNAL),
    ],
)
def test_resets_map_as_grpc_says(error: int, code: Code) -> None:
    assert from_reset(error) is code
