"""Header blocks (HPACK): fields out of bytes and bytes out of fields. Source: RFC 7541; its tables come from `hpack`.

A peer sends the same few blocks again and again, so the encoder and the engine remember what a block says until the
dynamic table changes. The encoder evicts nothing from its table: when that is full, it sends new fields as literals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.table import HeaderTable

from gateway.bounded import make_room

Field = tuple[bytes, ...]
"""A header field: name and value. An HPACK table never holds the value of one of class `NeverIndexed`. The length is
not in the type, since compiled code unpacks tuples of fixed length and would lose the subclass."""


class NeverIndexed(NamedTuple):
    """A field whose value a caller chose. Indexing it would let callers probe each other's values (section 7.1)."""

    name: bytes
    value: bytes


TABLE_BYTES: Final = 4096  # bytes of the dynamic table that every peer allows at first (RFC 9113 section 6.5.2)
FIELD_BYTES: Final = 32  # overhead of a field in sizes of tables and lists (section 4.1)
MOST_INTEGER: Final = 1 << 28  # above every length that is accepted
NEVER_FITS: Final = 16_384  # encoded bytes of a field that no table can hold: a byte takes at most 30 bits
KEPT: Final = 16  # header blocks that are remembered; those of one connection differ little
KEPT_BYTES: Final = 1024  # bytes; larger blocks are not remembered
LATEST: Final = 4  # of those, how many are looked through for a list before it is looked up: an answer has three

_STATIC: Final[list[Field]] = list(HeaderTable.STATIC_TABLE)
_DYNAMIC: Final = len(_STATIC) + 1  # first index of the dynamic table
_STATIC_INDEX: Final[dict[Field, int]] = {field: n for n, field in enumerate(_STATIC, 1)}
_STATIC_NAMES: Final[dict[bytes, int]] = {field[0]: n for n, field in reversed(list(enumerate(_STATIC, 1)))}

_EOS: Final = 256
_HALVES: Final = 16  # values of half a byte
_PADDING: Final = 7  # bits of padding that may end a string
_LONGEST_CODE: Final = 30  # bits


def _huffman_tables() -> tuple[list[tuple[int, bytes]], frozenset[int]]:
    """A table of steps by state + half byte, and the set of states in which a string may end.

    A state is a node of the code's tree, times 16. A step gives the next state (-1 if the half byte completes EOS) and
    the symbol that it completes, if any; it can't complete two, as no code is shorter than five bits.
    """
    zero: list[int] = [0]  # where a 0 bit leads from each node: to another node, or to -1 - symbol
    one: list[int] = [0]  # where a 1 bit leads
    for symbol, (code, length) in enumerate(zip(REQUEST_CODES, REQUEST_CODES_LENGTH, strict=True)):
        node = 0
        for bit in range(length - 1, 0, -1):
            side = one if code >> bit & 1 else zero
            if not side[node]:
                side[node] = len(zero)
                zero.append(0)
                one.append(0)
            node = side[node]
        (one if code & 1 else zero)[node] = -1 - symbol
    steps = [_huffman_step(zero, one, start, half) for start in range(len(zero)) for half in range(_HALVES)]
    ends, node = {0}, 0
    for _ in range(_PADDING):
        node = one[node]
        ends.add(node * _HALVES)
    return steps, frozenset(ends)


def _huffman_step(zero: list[int], one: list[int], node: int, half: int) -> tuple[int, bytes]:
    ended = b""
    for bit in (3, 2, 1, 0):
        node = (one if half >> bit & 1 else zero)[node]
        if node == -1 - _EOS:
            return -1, b""
        if node < 0:
            node, ended = 0, bytes([-1 - node])
    return node * _HALVES, ended


_tables: Final = _huffman_tables()
_HUFFMAN: Final[list[tuple[int, bytes]]] = _tables[0]
_HUFFMAN_ENDS: Final[frozenset[int]] = _tables[1]


class BadBlock(Exception):
    """The block can't be decoded, and neither can any later block (RFC 9113 section 4.3)."""


class Cut(BadBlock):
    """The block ends within a field."""


class TooLarge(Exception):
    """A header list is over the limit. `at` is the first byte that was not decoded: see `Decoder.drop`."""

    def __init__(self, text: str, at: int) -> None:
        super().__init__(text)
        self.at = at


class Decoder:
    """Decodes one direction of one connection."""

    def __init__(self, most_bytes: int) -> None:
        """most_bytes: largest header list to decode (RFC 9113 section 6.5.2, SETTINGS_MAX_HEADER_LIST_SIZE)."""
        self.changes = 0  # goes up when blocks may mean other fields than before
        self._most = most_bytes
        self._table: list[Field] = []  # the newest entry comes last
        self._size = 0
        self._capacity = TABLE_BYTES
        self._strings = 0  # strings still to come of the field that `drop` skips
        self._passing = 0  # bytes still to come of the string that `drop` skips

    def decode(self, block: bytes) -> tuple[Field, ...]:
        """The fields of a whole block. raises: BadBlock, TooLarge."""
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
                raise TooLarge(f"a header list of more than {self._most} bytes", at)
        return tuple(fields)

    def drop(self, part: bytes, at: int, is_start: bool) -> int:
        """Skip fields, keeping only their effect on the table, so that later blocks can still be decoded.

        part: may end anywhere. is_start: whether it begins the block. raises: BadBlock.
        returns: where the first incomplete field begins; give the bytes from there again, with more behind them.
        """
        end = len(part)
        while at < end:
            begin = at
            if self._passing:
                step = min(self._passing, end - at)
                self._passing -= step
                at += step
                continue
            try:
                if self._strings:
                    self._passing, at = _integer(part, at, 0x7F)
                    self._strings -= 1
                elif part[at] & 0xE0 == 0x20:
                    at = self._resize(part, at, is_start)
                    continue
                else:
                    at = self._drop_field(part, at)
            except Cut:
                return begin
            is_start = False
        return at

    @property
    def is_within_field(self) -> bool:
        """Is `drop` in the middle of a field?"""
        return bool(self._strings or self._passing)

    def _drop_field(self, part: bytes, at: int) -> int:
        first = part[at]
        if first >= 0x80:
            index, after = _integer(part, at, 0x7F)
            self._entry(index)
            return after
        indexed = first >= 0x40
        index, after = _integer(part, at, 0x3F if indexed else 0x0F)
        name = self._entry(index)[0] if index else b""
        if indexed:
            try:
                value_at = after
                if not index:
                    name, value_at = _string(part, after)
                value, value_at = _string(part, value_at)
            except Cut:
                if len(part) - at <= NEVER_FITS:
                    raise
                self.changes += 1
                self._evict(0)  # a field that is larger than the table empties it (section 4.4)
            else:
                self._insert((name, value))
                return value_at
        self._strings = 1 if index else 2
        return after

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
        """Drop the oldest entries until the table has at most `room` bytes (section 4.3)."""
        gone = 0
        while gone < len(self._table) and self._size > room:
            name, value = self._table[gone]
            self._size -= len(name) + len(value) + FIELD_BYTES
            gone += 1
        if gone:
            del self._table[:gone]


def _integer(data: bytes, at: int, mask: int) -> tuple[int, int]:
    """The integer that begins at `at` (section 5.1), and where it ends."""
    end = len(data)
    if at >= end:
        raise Cut("a header block ends within a field")
    value = data[at] & mask
    at += 1
    if value < mask:
        return value, at
    shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value += (byte & 0x7F) << shift
        if value >= MOST_INTEGER or shift > 28:
            raise BadBlock("an integer in a header block is too large")
        if byte < 0x80:
            return value, at
        shift += 7
    raise Cut("a header block ends within a field")


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    """The string that begins at `at` (section 5.2), and where it ends."""
    length, start = _integer(data, at, 0x7F)
    end = start + length
    if end > len(data):
        raise Cut("a header block ends within a string")
    raw = data[start:end]
    return (_from_huffman(raw) if data[at] >= 0x80 else raw), end


def _from_huffman(data: bytes) -> bytes:
    table, state, out = _HUFFMAN, 0, bytearray()
    for byte in data:
        state, ended = table[state + (byte >> 4)]
        if ended:
            out += ended
        if state >= 0:
            state, ended = table[state + (byte & 15)]
            if ended:
                out += ended
        if state < 0:
            raise BadBlock("a Huffman string contains EOS")
    if state not in _HUFFMAN_ENDS:
        raise BadBlock("a Huffman string ends in wrong padding")
    return bytes(out)


class Encoder:
    """Encodes one direction of one connection."""

    def __init__(self) -> None:
        self._table: dict[Field, int] = {}  # insertion number of each entry
        self._left = TABLE_BYTES
        self._capacity = TABLE_BYTES
        self._update = b""  # the size update to send at the start of the next block (section 6.3)
        self._known: dict[tuple[Field, ...], bytes] = {}
        self._chosen: dict[tuple[Field, ...], bytes] = {}  # never indexed, so that no change of the table matters
        self._latest: list[tuple[Sequence[Field], bytes]] = []  # of both, the blocks that were asked for last

    def resize(self, most_bytes: int) -> None:
        """Follow the peer's SETTINGS_HEADER_TABLE_SIZE."""
        capacity = min(most_bytes, TABLE_BYTES)
        if capacity != self._capacity:
            self._capacity = self._left = capacity
            self._table.clear()
            self._forget()
            self._update = b"\x20" + (_prefixed(0x20, 0x1F, capacity) if capacity else b"")

    def encode(self, fields: Sequence[Field], repeats: bool = False) -> bytes:
        """The block of these fields. It is remembered if they are a tuple without `NeverIndexed` fields.

        repeats: it is remembered all the same, since many answers are alike.
        """
        latest = self._maybe_latest(fields)
        if latest is not None:
            return latest
        if isinstance(fields, tuple):
            known = self._known.get(fields)
            if known is not None:
                return self._noted(fields, known)
        before, update = len(self._table), self._update
        self._update = b""
        parts = [update]
        keep = isinstance(fields, tuple) and not update
        for field in fields:
            if isinstance(field, NeverIndexed):
                keep = keep and repeats
                parts.append(_never_indexed(field))
            else:
                parts.append(self._plain(field))
        block = b"".join(parts)
        if len(self._table) != before:
            self._forget()  # an insertion changes the indices of older entries
        elif keep and isinstance(fields, tuple):
            make_room(self._known, KEPT)
            self._known[fields] = block
        return block

    def encode_chosen(self, fields: Sequence[Field]) -> bytes:
        """The rest of a block: fields that a caller chose. They are remembered if all of them are `NeverIndexed`."""
        latest = self._maybe_latest(fields)
        if latest is not None:
            return latest
        if not isinstance(fields, tuple):
            return self.encode(fields)
        known = self._chosen.get(fields)
        if known is not None:
            return self._noted(fields, known)
        parts: list[bytes] = []
        for field in fields:
            if not isinstance(field, NeverIndexed):
                return self.encode(fields)
            parts.append(_never_indexed(field))
        block = b"".join(parts)
        if len(block) <= KEPT_BYTES:
            make_room(self._chosen, KEPT)
            self._chosen[fields] = block
        return block

    def _maybe_latest(self, fields: Sequence[Field]) -> bytes | None:
        """The block of this very list, if it is among the latest: to find it by its fields takes five times as long."""
        for known, block in self._latest:
            if known is fields:
                return block
        return None

    def _noted(self, fields: tuple[Field, ...], block: bytes) -> bytes:
        self._latest = [(fields, block), *self._latest[: LATEST - 1]]
        return block

    def _forget(self) -> None:
        self._known.clear()
        self._latest.clear()

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


def _never_indexed(field: Field) -> bytes:
    return b"\x10" + _text(field[0]) + _text(field[1])


def _text(data: bytes) -> bytes:
    return _prefixed(0, 0x7F, len(data)) + data


def _prefixed(first: int, mask: int, value: int) -> bytes:
    """An integer with a prefix of as many bits as `mask` has (section 5.1); `first` holds the byte's other bits."""
    if value < mask:
        return bytes([first | value])
    out = [first | mask]
    value -= mask
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
