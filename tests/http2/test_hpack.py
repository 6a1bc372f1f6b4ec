"""Header blocks, judged by python-hyper's `hpack` at the other end, in both directions."""

from __future__ import annotations

import time

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slowness import slowness

from gateway.http2.hpack import KEPT, NEVER_FITS, TABLE_BYTES, BadBlock, Decoder, Encoder, Field, NeverIndexed, TooLarge

NAMES = st.sampled_from([b":path", b":authority", b"te", b"content-type", b"grpc-timeout", b"x-a", b"x" * 200])
VALUES = st.one_of(st.sampled_from([b"", b"trailers", b"application/grpc", b"v" * 130, b"\xff" * 9]), st.binary())
PLAIN = st.tuples(NAMES, VALUES)
FIELDS = st.lists(st.one_of(PLAIN, st.builds(NeverIndexed, NAMES, VALUES)), max_size=8)
RESIZED = st.sampled_from([None, None, None, 0, 50, 1000, TABLE_BYTES])
TURNS = st.lists(st.tuples(FIELDS, RESIZED, st.booleans()), max_size=12)


@given(TURNS)
def test_we_read_what_another_writes(turns: list[tuple[list[Field], int | None, bool]]) -> None:
    theirs, ours = hpack.Encoder(), Decoder(1 << 20)
    for fields, resized, huffman in turns:
        if resized is not None:
            theirs.header_table_size = resized
        marked = [hpack.NeverIndexedHeaderTuple(*f) if isinstance(f, NeverIndexed) else f for f in fields]
        got = ours.decode(theirs.encode(marked, huffman=huffman))
        assert list(got) == fields
        # theirs refers to a field that is in the table already, whatever it is marked as
        assert all(isinstance(sent, NeverIndexed) for sent, f in zip(fields, got, strict=True) if type(f) is not tuple)


LONG = st.builds(bytes.__mul__, st.sampled_from([b"v", b"\x0b", b"aZ9"]), st.integers(0, 30_000))
LONG_FIELDS = st.lists(st.tuples(NAMES, st.one_of(VALUES, LONG)), max_size=6)
CUTS = st.lists(st.integers(1, 20_000), max_size=20)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(LONG_FIELDS, st.booleans(), st.booleans(), CUTS, RESIZED), max_size=6))
def test_after_a_list_that_was_dropped_later_ones_are_read(
    turns: list[tuple[list[Field], bool, bool, list[int], int | None]],
) -> None:
    """In any pieces, and both tables hold the same in the end."""
    theirs, ours = hpack.Encoder(), Decoder(1 << 20)
    for fields, is_dropped, huffman, cuts, resized in turns:
        if resized is not None:
            theirs.header_table_size = resized
        block = theirs.encode(fields, huffman=huffman)
        if not is_dropped:
            assert list(ours.decode(block)) == fields
            continue
        waiting, is_start = b"", True
        for size in [20, *cuts, len(block)]:
            waiting, block = waiting + block[:size], block[size:]
            waiting, is_start = waiting[ours.drop(waiting, 0, is_start) :], False
            assert len(waiting) <= NEVER_FITS
        assert waiting == b""
        assert not ours.is_within_field
        assert [*reversed(ours._table)] == [*theirs.header_table.dynamic_entries]


def test_a_field_of_any_size_is_dropped_without_being_kept_or_decoded() -> None:
    """100 MB that are to be indexed: such a field empties the table (RFC 7541 section 4.4)."""
    decoder, waiting = Decoder(1000), b"\x40\x01x\xff\x81\xc1\xd7\x2f"
    assert len(decoder.decode(b"\x40\x01a\x01b")) == len(decoder._table) == 1
    started = time.thread_time()
    for _ in range(100):
        waiting += bytes(1_000_000)
        waiting = waiting[decoder.drop(waiting, 0, is_start=False) :]
        assert len(waiting) <= NEVER_FITS
    assert not decoder.is_within_field
    assert decoder._table == []
    assert time.thread_time() - started < 1.0 * slowness()


@pytest.mark.parametrize("text", [b"\n\r\x16" * 4000, b"aeiost012c" * 1500, bytes(range(256)) * 40])
def test_no_huffman_code_is_slow_to_read(text: bytes) -> None:
    """At least 4 MB/s, interpreted; by looking up one code after another it was 1."""
    block = hpack.Encoder().encode([(b"x", text)], huffman=True)
    started, size = time.thread_time(), 0
    while size < 400_000:
        assert Decoder(1 << 20).decode(block) == ((b"x", text),)
        size += len(block)
    assert time.thread_time() - started < 0.1 * slowness()


def test_a_mark_is_read() -> None:
    (plain, marked) = Decoder(1000).decode(b"\x00\x01x\x01y" + b"\x10\x01x\x01y")
    assert (plain, marked) == ((b"x", b"y"), (b"x", b"y"))
    assert not isinstance(plain, NeverIndexed)
    assert isinstance(marked, NeverIndexed)


@given(TURNS)
def test_another_reads_what_we_write(turns: list[tuple[list[Field], int | None, bool]]) -> None:
    ours, theirs = Encoder(), hpack.Decoder(max_header_list_size=1 << 20)
    for fields, resized, as_tuple in turns:
        if resized is not None:
            ours.resize(resized)
            theirs.max_allowed_table_size = resized
        for _ in range(2):  # the second time it may be known
            got = theirs.decode(ours.encode(tuple(fields) if as_tuple else fields), raw=True)
            assert [tuple(field) for field in got] == fields


def test_a_list_that_comes_again_is_a_few_bytes() -> None:
    ours = Encoder()
    fields = ((b":method", b"POST"), (b":path", b"/a/b"), (b"te", b"trailers"), (b"user-agent", b"x/1"))
    assert len(ours.encode(fields)) > 20
    assert len(ours.encode(fields)) == len(fields)


def test_a_list_that_was_sent_just_now_is_encoded_anew_once_the_table_has_changed() -> None:
    ours, theirs = Encoder(), hpack.Decoder()
    fields = ((b":status", b"200"), (b"x-ours", b"1"))
    for n in range(4):
        for _ in range(3):  # known by its fields, and then by what it is
            assert tuple(theirs.decode(ours.encode(fields), raw=True)) == fields
        theirs.decode(ours.encode([(b"x-number", b"%d" % n)]), raw=True)
    ours.resize(0)
    theirs.max_allowed_table_size = 0
    assert tuple(theirs.decode(ours.encode(fields), raw=True)) == fields


def test_what_a_caller_chose_is_in_no_table() -> None:
    ours, theirs = Encoder(), hpack.Decoder()
    for n in range(100):
        (field,) = theirs.decode(ours.encode([NeverIndexed(b"x-user", b"%d" % n)]), raw=True)
        assert isinstance(field, hpack.NeverIndexedHeaderTuple)
    assert len(theirs.header_table.dynamic_entries) == 0


def test_what_a_caller_chose_again_is_the_same_bytes_whatever_the_table_holds() -> None:
    ours, theirs = Encoder(), hpack.Decoder()
    chosen, plain = (NeverIndexed(b"x-user", b"7"),), ((b"x-user", b"7"),)
    blocks = []
    for n in range(3):
        block = ours.encode_chosen(chosen)
        (field,) = theirs.decode(ours.encode([(b"x-number", b"%d" % n)]) + block, raw=True)[1:]
        assert isinstance(field, hpack.NeverIndexedHeaderTuple)
        assert field == (b"x-user", b"7")
        blocks.append(block)
        theirs.decode(ours.encode(plain), raw=True)  # our own field, which is equal, is in the table by now
    assert len(set(blocks)) == 1
    assert len(theirs.header_table.dynamic_entries) == 4


def test_our_own_field_beside_one_that_a_caller_chose_may_be_in_the_table() -> None:
    ours, theirs = Encoder(), hpack.Decoder()
    for n in range(3):
        mixed = (NeverIndexed(b"x-user", b"7"), (b"x-number", b"%d" % n), (b"x-ours", b"1"))
        block = ours.encode([(b"te", b"trailers")]) + ours.encode_chosen(mixed)
        assert [tuple(field) for field in theirs.decode(block, raw=True)[1:]] == list(mixed)


def test_tables_and_what_is_kept_are_bounded() -> None:
    ours, theirs = Encoder(), hpack.Decoder(max_header_list_size=1 << 20)
    reader = Decoder(1 << 20)
    for n in range(3000):
        fields = ((b"x-number", b"%d" % n), (b"te", b"trailers"))
        block = ours.encode(fields)
        assert [tuple(field) for field in theirs.decode(block, raw=True)] == list(fields)
        assert reader.decode(hpack.Encoder().encode(fields)) == fields
        ours.encode_chosen((NeverIndexed(b"x-user", b"%d" % n),))
        assert len(ours._known) <= KEPT
        assert len(ours._chosen) <= KEPT
        assert len(ours._table) * 33 <= TABLE_BYTES
        assert len(reader._table) * 33 <= TABLE_BYTES


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",  # index 0
        b"\xbe",  # the first of an empty table
        b"\xff\x80\x80\x80\x80\x80\x01",  # an integer without end
        b"\xff\xff\xff\xff\xff\x7f",
        b"\xff",  # cut
        b"\x40",
        b"\x40\x01x",
        b"\x40\x01x\x05abc",
        b"\x40\x7f\xff\xff\xff\x7f",  # a string of 256 MB
        b"\x82\x20",  # a table size update behind a field
        b"\x3f\xe2\x1f",  # and one of 4097
        b"\x40\x81\xff\x00",  # padding of eight bits
        b"\x40\x81\x18\x00",  # padding of zeros
        b"\x40\x84\xff\xff\xff\xff\x00",  # EOS
    ],
)
def test_a_bad_block_is_refused(block: bytes) -> None:
    with pytest.raises(BadBlock):
        Decoder(1 << 20).decode(block)


@given(st.binary(max_size=60))
def test_any_bytes_are_fields_or_refused(block: bytes) -> None:
    decoder = Decoder(2000)
    try:
        fields = decoder.decode(block)
    except (BadBlock, TooLarge):
        return
    assert sum(len(name) + len(value) + 32 for name, value in fields) <= 2000


def test_a_bomb_is_given_up_at_the_limit() -> None:
    """One large field, named again and again by one byte each."""
    decoder = Decoder(64 * 1024)
    block = b"\x40\x01x" + b"\x7f\x81\x1d" + bytes(3840) + b"\xbe" * 100_000
    with pytest.raises(TooLarge, match="65536"):
        decoder.decode(block)
