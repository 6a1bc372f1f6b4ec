"""Metadata, timeouts and status messages on the wire."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.forwarding.metadata import first_values
from gateway.rpc.metadata import (
    MOST_MESSAGE,
    decode_message,
    encode_message,
    fields_from,
    format_timeout,
    is_legal,
    metadata_from,
    parse_timeout,
    text_of,
)

KEYS = st.text("abcdefghijklmnopqrstuvwxyz0123456789_-.", min_size=1).map(lambda key: f"x-{key}")
TEXTS = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E))


@given(st.lists(st.tuples(KEYS.filter(lambda k: not k.endswith("-bin")), TEXTS)))
def test_text_metadata_survives_the_wire_in_order(metadata: list[tuple[str, str | bytes]]) -> None:
    assert metadata_from(fields_from(metadata)) == metadata


@given(st.lists(st.tuples(KEYS.map(lambda key: key + "-bin"), st.binary())))
def test_binary_metadata_survives_the_wire_in_order(metadata: list[tuple[str, str | bytes]]) -> None:
    assert metadata_from(fields_from(metadata)) == metadata


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (b"AAEC", [b"\0\1\2"]),
        (b"AA==", [b"\0"]),
        (b"AA", [b"\0"]),
        (b"AA,AQ==,Ag", [b"\0", b"\1", b"\2"]),
        (b"", [b""]),
    ],
)
def test_binary_values_may_be_padded_or_not_and_joined(value: bytes, parts: list[bytes]) -> None:
    assert metadata_from([(b"x-bin", value)]) == [("x-bin", part) for part in parts]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"", b"v"),
        (b"X-Upper", b"v"),
        (b"with space", b"v"),
        (b"x\xff", b"v"),
        (b"x!", b"v"),
        (b"x", b"a\r\nb: c"),
        (b"x", b"a\0b"),
        (b"x", b"\x7f"),
        (b"x-bin", b"not base64!"),
        (b"x-bin", b"A"),
    ],
)
def test_what_other_peers_would_choke_on_is_not_legal(name: bytes, value: bytes) -> None:
    assert not is_legal(name, value)


@pytest.mark.parametrize(
    ("value", "told", "read"),
    [
        ("São Paulo".encode(), "São Paulo", "São Paulo"),
        (b"S\xe3o Paulo", b"S\xe3o Paulo", "São Paulo"),
        (b"\xff\x80", b"\xff\x80", "ÿ\x80"),
        (b"a\tb", "a\tb", "a\tb"),
    ],
    ids=["UTF-8", "Latin-1", "neither", "tab"],
)
def test_a_value_that_is_not_ascii_survives_to_the_byte_and_can_be_read(
    value: bytes, told: str | bytes, read: str
) -> None:
    assert is_legal(b"x", value)
    metadata = metadata_from([(b"x", value)])
    assert metadata == [("x", told)]
    assert fields_from(metadata) == [(b"x", value)]
    assert text_of(value) == read
    assert first_values(metadata) == {"x": read}


@pytest.mark.parametrize("key", ["te", "content-type", "grpc-timeout", "grpc-status", ":path", "connection", "host"])
def test_reserved_keys_are_not_metadata(key: str) -> None:
    assert metadata_from([(key.encode(), b"v")]) == []
    with pytest.raises(ValueError, match="reserved"):
        fields_from([(key, "v")])


@given(st.text())
def test_any_status_message_survives_the_wire(text: str) -> None:
    encoded = encode_message(text)
    assert all(0x20 <= byte <= 0x7E for byte in encoded)
    assert decode_message(encoded) == text
    assert encoded.strip() == encoded  # as HTTP wants fields' values


@pytest.mark.parametrize(
    ("wire", "text"),
    [(b"100%", "100%"), (b"%zz", "%zz"), (b"%4", "%4"), (b"%FF", "�"), (b"a%20b", "a b"), (b"\xc3\xa9", "é")],
)
def test_a_broken_escape_is_never_an_error(wire: bytes, text: str) -> None:
    assert decode_message(wire) == text


@pytest.mark.parametrize(
    ("wire", "seconds"),
    [(b"1H", 3600), (b"2M", 120), (b"3S", 3), (b"4m", 0.004), (b"5u", 5e-6), (b"6n", 6e-9), (b"99999999S", 99_999_999)],
)
def test_timeouts_are_read_in_every_unit(wire: bytes, seconds: float) -> None:
    assert parse_timeout(wire) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "wire", [b"", b"S", b"10", b"-1S", b"+1S", b"1.5S", b"abc", b"123456789S", b"1s", b" 1S", b"1 S"]
)
def test_a_malformed_timeout_is_refused(wire: bytes) -> None:
    with pytest.raises(ValueError, match="grpc-timeout"):
        parse_timeout(wire)


@given(st.floats(min_value=1e-6, max_value=1e8, allow_nan=False))
def test_a_timeout_is_never_shortened_and_hardly_lengthened(seconds: float) -> None:
    read = parse_timeout(format_timeout(seconds))
    assert read >= min(seconds, 99_999_999) * (1 - 1e-9)
    assert read <= seconds * 1.00002 + 2e-6
    assert len(format_timeout(seconds)) <= 9


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_timeout_in_the_past_is_zero(seconds: float) -> None:
    assert parse_timeout(format_timeout(seconds)) == 0


@pytest.mark.parametrize("text", ["e" * 100_000, "é" * 20_000, "%" * 11_000, "x" * 32_766 + "%"])
def test_a_message_is_cut_to_what_peers_take(text: str) -> None:
    encoded = encode_message(text)
    assert len(encoded) <= MOST_MESSAGE
    assert decode_message(encoded).removesuffix("...").rstrip("\ufffd") in text
    assert encode_message("e" * MOST_MESSAGE) == b"e" * MOST_MESSAGE
