"""Header blocks (HPACK): fields out of bytes and bytes out of fields. Source: RFC 7541; its tables come from `hpack`.

A peer that calls again and again sends the same few blocks, so what a block says is kept by its bytes until the table
that it may refer to changes. Nothing is ever evicted from our own table: once it is full, fields are sent as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.table import HeaderTable

from gateway.bounded import make_room

Field = tuple[bytes, ...]
"""A header field: name and value. One of class `NeverIndexed` is sent so that no HPACK table ever holds its value; for
it to stay one, the length is not in the type: compiled code takes a tuple of known length apart and makes a new one."""


class NeverIndexed(NamedTuple):
    """A field whose value someone chose who must not learn what others sent (RFC 7541 section 7.1)."""

    name: bytes
    value: bytes


TABLE_BYTES: Final = 4096  # of a dynamic table, as HTTP/2 begins with and as all peers allow
FIELD_BYTES: Final = 32  # what a field counts beside its name and value (section 4.1)
MOST_INTEGER: Final = 1 << 28  # far beyond any length that is let in
KEPT: Final = 16  # blocks whose meaning is kept, of either kind; those of one connection differ but little
KEPT_BYTES: Final = 1024  # and none that says more

_STATIC: Final[list[Field]] = list(HeaderTable.STATIC_TABLE)
_DYNAMIC: Final = len(_STATIC) + 1  # the first index of the dynamic table
_STATIC_INDEX: Final[dict[Field, int]] = {field: n for n, field in enumerate(_STATIC, 1)}
_STATIC_NAMES: Final[dict[bytes, int]] = {field[0]: n for n, field in reversed(list(enumerate(_STATIC, 1)))}

_EOS: Final = 256
_LENGTHS: Final[list[int]] = sorted(set(REQUEST_CODES_LENGTH))
_SHORTEST: Final = 5  # bits
_SYMBOLS: Final[dict[int, int]] = {
    1 << length | code: symbol
    for symbol, (code, length) in enumerate(zip(REQUEST_CODES, REQUEST_CODES_LENGTH, strict=True))
}
"""Symbols by their code, with a one before it that tells its length."""


class BadBlock(Exception):
    """The peer's block can't be decoded, and with it no later one (RFC 9113 section 4.3)."""


class TooLarge(Exception):
    """A field list is over the limit. Its decoding was given up, so the connection is lost too."""


class Decoder:
    """Of one direction of one connection."""

    def __init__(self, most_bytes: int) -> None:
        """most_bytes: of a field list, as HTTP/2 counts them."""
        self.changes = 0  # goes up whenever blocks may mean something else
        self._most = most_bytes
        self._table: list[Field] = []  # the newest last
        self._size = 0
        self._capacity = TABLE_BYTES

    def decode(self, block: bytes) -> tuple[Field, ...]:
        """raises: BadBlock, TooLarge."""
        fields: list[Field] = []
        at, end, size = 0, len(block), 0
        field: Field
        while at < end:
            first = block[at]
            if first >= 0x80:
                index, at = _integer(block, at, 0x7F)
                field = self._entry(index)
            elif first & 0xE0 == 0x20:
                at = self._resize(block, at, not fields)
                continue
            else:
                indexed = first >= 0x40
                index, at = _integer(block, at, 0x3F if indexed else 0x0F)
                if index:
                    name = self._entry(index)[0]
                else:
                    name, at = _string(block, at)
                value, at = _string(block, at)
                if indexed:
                    field = (name, value)
                    self._insert(field)
                elif first >= 0x10:
                    field = NeverIndexed(name, value)
                else:
                    field = (name, value)
            fields.append(field)
            size += len(field[0]) + len(field[1]) + FIELD_BYTES
            if size > self._most:
                raise TooLarge(f"a header list of more than {self._most} bytes")
        return tuple(fields)

    def _entry(self, index: int) -> Field:
        if 0 < index < _DYNAMIC:
            return _STATIC[index - 1]
        back = index - _DYNAMIC + 1
        if index == 0 or back > len(self._table):
            raise BadBlock(f"no header field has index {index}")
        return self._table[-back]

    def _insert(self, field: Field) -> None:
        self.changes += 1
        size = len(field[0]) + len(field[1]) + FIELD_BYTES
        self._evict(self._capacity - size)
        if size <= self._capacity:
            self._table.append(field)
            self._size += size

    def _resize(self, block: bytes, at: int, is_first: bool) -> int:
        capacity, at = _integer(block, at, 0x1F)
        if capacity > TABLE_BYTES or not is_first:
            raise BadBlock("a table size update that is too large, or not at the start of its block")
        self.changes += 1
        self._capacity = capacity
        self._evict(capacity)
        return at

    def _evict(self, room: int) -> None:
        """Until the table is no larger than `room`."""
        gone = 0
        while gone < len(self._table) and self._size > room:
            name, value = self._table[gone]
            self._size -= len(name) + len(value) + FIELD_BYTES
            gone += 1
        if gone:
            del self._table[:gone]


def _integer(data: bytes, at: int, mask: int) -> tuple[int, int]:
    """The integer whose first byte is at `at` (section 5.1), and where it ends."""
    end = len(data)
    if at >= end:
        raise BadBlock("a header block ends within a field")
    value = data[at] & mask
    at += 1
    if value < mask:
        return value, at
    shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80 and value < MOST_INTEGER:
            return value, at
        shift += 7
        if shift > 28:
            raise BadBlock("an integer in a header block is too large")
    raise BadBlock("a header block ends within a field, or an integer in it is too large")


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    """The string whose length is at `at` (section 5.2), and where it ends."""
    length, start = _integer(data, at, 0x7F)
    end = start + length
    if end > len(data):
        raise BadBlock("a header block ends within a string")
    raw = data[start:end]
    return (_from_huffman(raw) if data[at] >= 0x80 else raw), end


def _from_huffman(data: bytes) -> bytes:
    out = bytearray()
    bits = have = 0  # those that are not decoded yet
    for byte in data:
        bits = bits << 8 | byte
        have += 8
        while have >= _SHORTEST:
            symbol = -1
            left = 0
            for length in _LENGTHS:
                left = have - length
                if left < 0:
                    break
                symbol = _SYMBOLS.get(bits >> left | 1 << length, -1)
                if symbol >= 0:
                    break
            if symbol < 0:
                break  # it goes on in the next byte
            if symbol == _EOS:
                raise BadBlock("a Huffman string contains EOS")
            out.append(symbol)
            have = left
            bits &= (1 << have) - 1
    if have >= 8 or bits != (1 << have) - 1:
        raise BadBlock("a Huffman string ends in wrong padding")
    return bytes(out)


class Encoder:
    """Of one direction of one connection."""

    def __init__(self) -> None:
        self._table: dict[Field, int] = {}  # by the order of insertion
        self._left = TABLE_BYTES
        self._capacity = TABLE_BYTES
        self._update = b""  # to tell the peer at the start of the next block
        self._known: dict[tuple[Field, ...], bytes] = {}

    def resize(self, most_bytes: int) -> None:
        """The peer says how large its table may be."""
        capacity = min(most_bytes, TABLE_BYTES)
        if capacity != self._capacity:
            self._capacity = self._left = capacity
            self._table.clear()
            self._known.clear()
            self._update = b"\x20" + (_prefixed(0x20, 0x1F, capacity) if capacity else b"")

    def encode(self, fields: Sequence[Field]) -> bytes:
        """Lists that come again should be tuples of plain fields: those are kept."""
        if isinstance(fields, tuple):
            known = self._known.get(fields)
            if known is not None:
                return known
        before, update = len(self._table), self._update
        self._update = b""
        parts = [update]
        keep = isinstance(fields, tuple) and not update
        for field in fields:
            if isinstance(field, NeverIndexed):
                keep = False
                parts.append(b"\x10" + _text(field[0]) + _text(field[1]))
            else:
                parts.append(self._plain(field))
        block = b"".join(parts)
        if len(self._table) != before:
            self._known.clear()  # indices have moved
        elif keep and isinstance(fields, tuple):
            make_room(self._known, KEPT)
            self._known[fields] = block
        return block

    def _plain(self, field: Field) -> bytes:
        index = _STATIC_INDEX.get(field, 0)
        if index:
            return _prefixed(0x80, 0x7F, index)
        number = self._table.get(field, -1)
        if number >= 0:
            return _prefixed(0x80, 0x7F, _DYNAMIC + len(self._table) - 1 - number)
        name, value = field
        size = len(name) + len(value) + FIELD_BYTES
        first, mask = (0x40, 0x3F) if size <= self._left else (0x00, 0x0F)
        if size <= self._left:
            self._left -= size
            self._table[field] = len(self._table)
        index = _STATIC_NAMES.get(name, 0)
        return _prefixed(first, mask, index) + (b"" if index else _text(name)) + _text(value)


def _text(data: bytes) -> bytes:
    return _prefixed(0, 0x7F, len(data)) + data


def _prefixed(first: int, mask: int, value: int) -> bytes:
    """An integer (section 5.1) in the low bits of a byte whose others are `first`."""
    if value < mask:
        return bytes([first | value])
    out = [first | mask]
    value -= mask
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
