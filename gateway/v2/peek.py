"""v2 (pure): the top-level fields of V2 inference messages, read and replaced without parsing tensors.

May use values only: no protobuf, no I/O. It must not know what a name or a parameter means to routing.

A peek skips tensors by their length, so its cost grows with the number of top-level fields and not with the size of the
message. Fields may come in any order, and of a repeated scalar the last one counts, as in protobuf; `peek_front` says
what counts in a message that is not complete. Unknown fields are kept, and groups too. A peek checks the top level and
what it reads of it; Triton checks the inside of tensors.
Field numbers: grpc_service.proto (triton-inference-server/common). Encoding: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from gateway.bounded import make_room
from gateway.errors import BadRequest, GatewayError, MalformedMessage
from gateway.types import Buffer, Parameter

MAX_FIELDS: Final = 16_384
"""Top-level fields of one message. Models have at most hundreds of tensors; this many take 2 to 20 ms to scan."""

MAX_PARAMETERS: Final = 1024
"""Entries of `parameters`. Models take a handful; decoding this many takes a few milliseconds at most."""

MAX_NAME: Final = 1024
"""Bytes of a request's model name, and of its version. A model is a folder, and a folder's name has at most 255."""

MAX_ID: Final = 4096
"""Bytes of a request's id. Triton repeats the id in error texts, which must fit a header list that peers accept."""

MAX_PARAMETER_FIELDS: Final = MAX_FIELDS
"""Fields of all `parameters` entries and of their values together. Serializers write three for an entry, but protobuf
allows repeated and unknown fields."""

_MAX_GROUPS_DEEP: Final = 100
"""Depth of nested groups: protobuf's own limit, so no server reads deeper ones."""

_ID_WITHIN: Final = 64
"""Fields that are searched for the id of a refused request. Serializers write the id before all repeated fields."""

# Tags: field number << 3 | wire type. Fields 1 to 5 are the same in requests and responses.
_VARINT, _I64, _LEN, _GROUP, _GROUP_END, _I32 = 0, 1, 2, 3, 4, 5
_NAME, _VERSION, _ID, _PARAMETER = 0x0A, 0x12, 0x1A, 0x22
_SCALARS: Final = {_NAME: "model_name", _VERSION: "model_version", _ID: "id"}
_TENSOR: Final = 0x2A  # `inputs` of a request, `outputs` of a response
_REQUESTED_OUTPUT: Final = 0x32
RAW_INPUT, RAW_OUTPUT = 0x3A, 0x32  # `raw_input_contents` of a request, `raw_output_contents` of a response
_STREAM_ERROR, _STREAM_RESPONSE = 0x0A, 0x12
_TENSORS: Final = (_TENSOR, _REQUESTED_OUTPUT, RAW_INPUT)  # serializers write all scalars before these
_NO_END: Final = 1 << 40  # more bytes than any message has: the end of a field that has not arrived whole

_KEPT: Final = 1024  # entries of each table of a KnownHeads
_LONGEST_KEPT: Final = 1024  # bytes; longer heads are not remembered: models have a few tensors with short names
_PLACES: Final = 4  # how many places are remembered where raw tensors begin in messages of one size
_MOST_RAW: Final = 64  # raw tensors in a message whose head is looked up

_ONE_BYTE: Final = [bytes((number,)) for number in range(0x80)]

_FINAL: Final = "triton_final_response"


@dataclass(slots=True)  # not frozen: that would make a Head cost as much as the whole scan
class Head:
    """What is outside the tensors in one ModelInferRequest or ModelInferResponse. Not to be changed."""

    model_name: str
    model_version: str
    id: str
    has_tensors: bool  # does it have `inputs` or `outputs`?
    entries: list[bytes]  # undecoded entries of the `parameters` map, in order
    # For `rename_request`: the message is body[start:end]; body[start:front] and `strays` hold its scalars.
    start: int
    front: int
    end: int | None  # None: the end of the bytes
    strays: list[tuple[int, int]]
    raw: int = 0  # where the first raw tensor begins; the message's end if there is none
    fronts: dict[tuple[str | None, str | None], bytes] | None = field(default=None, repr=False, compare=False)
    """Only of a head that `KnownHeads` shares: by new name and version, the bytes of a renamed message up to `raw`."""
    derived: Any = field(
        default=None, repr=False, compare=False
    )  # the layout computed from a shared head (`v2.layout`)
    rows: int = field(default=0, repr=False, compare=False)  # of a shared head (`v2.rows`); 0: not known yet
    _parameters: dict[str, Parameter] | None = field(default=None, repr=False, compare=False)

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The `parameters` map, decoded when first read. A key without a value is left out.

        :raises MalformedMessage: if an entry is not a valid map entry.
        """
        if self._parameters is None:
            self._parameters = _decode_parameters(self.entries)
        return self._parameters

    @property
    def is_final(self) -> bool:
        """Is this the last response to its request? False too if Triton was not asked to say `triton_final_response`.

        :raises MalformedMessage: if an entry of `parameters` is not a valid map entry.
        """
        return bool(self.entries) and self.parameters.get(_FINAL) is True


@dataclass(slots=True)
class StreamHead:
    """What is outside the tensors in one ModelStreamInferResponse. Not to be changed."""

    error: str  # `error_message`; "" if there is none
    response: Head | None  # `infer_response`; Triton sends one beside an error too, which has the id
    rest: bytes  # unknown fields


def peek_request(body: Buffer) -> Head:
    """Read the head of a ModelInferRequest.

    :raises MalformedMessage: if the top level is not a protobuf message, or a name is not UTF-8.
    :raises BadRequest: if it has more than MAX_FIELDS top-level fields or MAX_PARAMETERS parameters, or a name, version
        or id that is too long.
    """
    return _peek(body, 0, len(body), RAW_INPUT, BadRequest)


def parameters_of(head: Head) -> dict[str, Parameter]:
    """The `parameters` of a request.

    :raises BadRequest: if they can't be read. The message is intact, so the stream that brought it goes on.
    """
    try:
        return head.parameters if head.entries else {}
    except MalformedMessage as error:
        raise BadRequest(f"A parameter of the request cannot be read: {error.text}") from None


def has_entry(head: Head, key: str) -> bool:
    """Has `parameters` an entry with this key? One without a value counts, which `Head.parameters` leaves out."""
    raw = key.encode()
    return any(raw in entry and _decode_entry(entry)[0] == key for entry in head.entries)


def maybe_id(body: bytes) -> str:
    """The id of a refused request, to answer with it; "" if there is none, or it can't be read, or it is too long."""
    try:
        for tag, _, at, stop in fields(body, 0, len(body), _ID_WITHIN):
            if tag == _ID:
                return _text(body[at:stop]) if stop - at <= MAX_ID else ""
    except MalformedMessage:
        pass
    return ""


class KnownHeads:
    """Heads of messages that are equal up to their raw tensors: read once, and then looked up by those bytes.

    Requests of one client for one model are equal up to there, unless they have ids, and so are the answers to them.
    The size of a message tells where its raw tensors may begin, so one or two look-ups are enough.
    """

    def __init__(self, peek: Callable[[bytes], Head], raw_tag: int) -> None:
        """peek: reads a message that is not known. raw_tag: RAW_INPUT or RAW_OUTPUT."""
        self._peek = peek
        self._raw_tag = raw_tag
        self._raw_at: dict[int, tuple[int, ...]] = {}  # by size of the message; the latest place comes first
        self._known: dict[bytes, Head] = {}

    def __len__(self) -> int:
        return len(self._known) + len(self._raw_at)

    def peek(self, body: bytes) -> Head:
        """The head of a message; other messages may share it. raises: what `peek` raises."""
        for raw_at in self._raw_at.get(len(body), ()):
            head = self._known.get(body[:raw_at])
            if head is not None and is_raw(body, raw_at, self._raw_tag):
                return head
        head = self._peek(body)
        if head.raw <= _LONGEST_KEPT and not head.strays and not head.id and is_raw(body, head.raw, self._raw_tag):
            return self._kept(body, head)
        return head

    def _kept(self, body: bytes, head: Head) -> Head:
        make_room(self._known, _KEPT)  # callers choose the bytes, so their number is bounded
        make_room(self._raw_at, _KEPT)
        places = self._raw_at.get(len(body), ())
        if head.raw not in places:
            self._raw_at[len(body)] = (head.raw, *places)[:_PLACES]
        head.fronts = {}
        return self._known.setdefault(body[: head.raw], head)


def is_raw(body: bytes, at: int, tag: int) -> bool:
    """Is the rest only raw tensors, and at most _MOST_RAW? Then no field of a head is among it."""
    end = len(body)
    for _ in range(_MOST_RAW):
        if at >= end:
            return at == end
        if body[at] != tag or at + 1 == end:
            return False
        size = body[at + 1]
        at += 2
        if size > 0x7F:
            try:
                size, at = read_varint(body, at - 1)
            except (IndexError, MalformedMessage):
                return False
        at += size
    return False


def peek_front(front: Buffer) -> Head | None:
    """Read a message's head from the bytes that have arrived; None if they are not enough.

    They are enough once a tensor has begun and the name came before it: every known serializer writes fields by number.
    Bytes may end within any field, of any kind; then they are not enough yet. A scalar behind the tensors is not seen,
    so whoever passes the rest on must append `tail`. Parameters behind the tensors reach Triton, but no rule sees them.

    :raises MalformedMessage: as `peek_request`, if no further bytes could make the message valid.
    """
    name = version = id = ""
    entries: list[bytes] = []
    strays: list[tuple[int, int]] = []
    at, end, grouped = 0, len(front), 0
    try:
        for _ in range(MAX_FIELDS):
            begin = at
            tag, value = _tag(front, begin)
            if tag & 7 == _GROUP:
                at, inside = _skip_group(front, tag, value, _NO_END)
                grouped += inside
                if grouped > MAX_FIELDS:
                    return None  # `peek_request` will refuse the complete message
                continue
            if tag & 7 != _LEN or tag < _NAME:
                at = _skip(front, tag, value, _NO_END)
                continue
            size, value = read_varint(front, value)
            at = value + size
            if tag in _TENSORS and at >= end:
                is_enough = name and len(entries) <= MAX_PARAMETERS
                return Head(name, version, id, True, entries, 0, 0, end, strays) if is_enough else None
            if at > end:
                return None
            if tag == _PARAMETER:
                entries.append(bytes(front[value:at]))
            elif tag < _PARAMETER:
                if size > MAX_NAME and size > _longest(tag):
                    return None  # `peek_request` will refuse the complete message, naming the first fault in it
                text = _text(front[value:at])
                strays.append((begin, at))
                name, version, id = _with(tag, text, name, version, id)
    except IndexError:
        return None
    return None


def _longest(tag: int) -> int:
    return MAX_ID if tag == _ID else MAX_NAME


def _too_long(tag: int, size: int) -> BadRequest:
    return BadRequest(f"The {_SCALARS[tag]} of a request has {size} bytes; {_longest(tag)} are allowed.")


def _with(tag: int, text: str, name: str, version: str, id: str) -> tuple[str, str, str]:
    if tag == _NAME:
        return text, version, id
    return (name, text, id) if tag == _VERSION else (name, version, text)


def tail(model_name: str, model_version: str) -> bytes:
    """Fields to append to a message: they decide its model whatever came before, as the last value of a scalar wins.

    An empty version is written too, since it has to replace an earlier one.
    """
    return _string(_NAME, model_name) + (_string(_VERSION, model_version) or b"\x12\x00")


def peek_response(body: Buffer) -> Head:
    """Read the head of a ModelInferResponse.

    :raises MalformedMessage: as `peek_request`, and where that raises BadRequest.
    """
    return _peek(body, 0, len(body), RAW_OUTPUT, MalformedMessage)


def rename_request(
    body: Buffer,
    head: Head,
    *,
    model_name: str | None = None,
    model_version: str | None = None,
    id: str | None = None,
    extra: bytes = b"",
) -> bytes:
    """A message with some scalars replaced; None keeps a scalar, "" clears it.

    Name, version and id come first in the result. All other bytes follow as they were, and then `extra`.

    body, head:  a message and its own head.
    extra:       encoded fields to append, such as `ENABLE_EMPTY_FINAL`.
    """
    if head.fronts is not None and id is None and not extra:
        beginning = head.fronts.get((model_name, model_version))
        if beginning is not None:
            rest: bytes = body[head.raw :] if isinstance(body, bytes) else bytes(body[head.raw :])
            return beginning + rest
    front = scalars(
        head.model_name if model_name is None else model_name,
        head.model_version if model_version is None else model_version,
        head.id if id is None else id,
    )
    if head.fronts is not None and id is None:
        head.fronts[model_name, model_version] = front + body[head.front : head.raw]
    if not head.strays:
        return b"".join((front, body[head.front : head.end], extra))
    return b"".join((front, *_without_strays(body, head), extra))


rename_response = rename_request  # fields 1 to 3 are the same in requests and responses


def as_asked(body: bytes, head: Head, model_name: str, id: str | None) -> bytes:
    """An answer with the model's name and the id that its caller used. id: None if the answer has it."""
    if id is None and head.model_name == model_name:
        return body
    return rename_request(body, head, model_name=model_name, id=id)


def peek_stream_response(body: Buffer) -> StreamHead:
    """Read the head of a ModelStreamInferResponse.

    :raises MalformedMessage: as `peek_response`; also if `infer_response` occurs twice, which no serializer does.
    """
    error, response, rest = "", None, b""
    for tag, begin, at, stop in fields(body, 0, len(body)):
        if tag == _STREAM_ERROR:
            error = _text(body[at:stop])
        elif tag != _STREAM_RESPONSE:
            rest += body[begin:stop]
        elif response is not None:
            raise MalformedMessage("A ModelStreamInferResponse has more than one infer_response.")
        else:
            response = _peek(body, at, stop, RAW_OUTPUT, MalformedMessage)
    return StreamHead(error, response, rest)


def rename_stream_response(
    body: Buffer,
    head: StreamHead,
    *,
    model_name: str | None = None,
    id: str | None = None,
) -> bytes:
    """A message with some scalars of its `infer_response` replaced, as `rename_request` does."""
    error = _string(_STREAM_ERROR, head.error)
    if head.response is None:
        return error + head.rest
    inner = rename_response(body, head.response, model_name=model_name, id=id)
    renamed = stream_response(inner)
    return b"".join((error, renamed, head.rest)) if error or head.rest else renamed


def stream_error(text: str, id: str, model_name: str = "") -> bytes:
    """A ModelStreamInferResponse with an in-band error, after which the stream goes on, as with Triton."""
    return _string(_STREAM_ERROR, text) + stream_response(scalars(model_name, "", id))


def stream_response(body: Buffer, extra: bytes = b"") -> bytes:
    """A ModelStreamInferResponse around a ModelInferResponse. extra: encoded fields to append to the latter."""
    return b"".join((b"\x12", encode_varint(len(body) + len(extra)), body, extra))


def with_raw(front: bytes, tag: int, raw: Sequence[Buffer]) -> bytes:
    """The message `front` with raw tensors added. They are copied once; protobuf would copy them three times.

    tag: RAW_INPUT or RAW_OUTPUT.
    """
    parts: list[Buffer] = [front]
    for each in raw:
        parts += (bytes((tag,)), encode_varint(len(each)), each)
    return b"".join(parts)


def bool_parameter(key: str, value: bool) -> bytes:
    """An encoded entry of `parameters`. Appended to a message, it replaces an earlier one with the same key."""
    entry = _string(0x0A, key) + bytes((0x12, 2, 0x08, value))
    return bytes((_PARAMETER,)) + encode_varint(len(entry)) + entry


ENABLE_EMPTY_FINAL: Final = b"\x22\x28\x0a\x22triton_enable_empty_final_response\x12\x02\x08\x01"
"""`bool_parameter("triton_enable_empty_final_response", True)`: asks Triton for a last, empty response.

Without that response nothing shows that a decoupled model has sent all of its answers."""


def _peek(  # noqa: PLR0912, PLR0915
    body: Buffer, start: int, end: int, raw_tag: int, too_many: type[GatewayError]
) -> Head:
    """Read a head: the hot loop has one turn per top-level field, and calls nothing for one-byte tags and lengths."""
    name = version = id = ""
    has_tensors = False
    entries: list[bytes] = []
    strays: list[tuple[int, int]] = []
    at = front = start
    raw = -1
    grouped = 0  # fields inside groups
    try:
        for _ in range(MAX_FIELDS + 1):
            if at == end:
                if len(entries) > MAX_PARAMETERS:
                    raise too_many(f"A message has more than {MAX_PARAMETERS} parameters.")
                until = None if end == len(body) else end
                raw = end if raw < 0 else raw
                return Head(name, version, id, has_tensors, entries, start, front, until, strays, raw)
            begin = at
            tag = body[at]
            at += 1
            if tag > 0x7F:
                tag, at = _tag(body, begin)
            if tag & 7 != _LEN:
                if tag & 7 == _GROUP:
                    at, inside = _skip_group(body, tag, at, end)
                    grouped += inside
                    if grouped > MAX_FIELDS:
                        raise too_many(f"A message has more than {MAX_FIELDS} fields in groups.")
                else:
                    at = _skip(body, tag, at, end)
                continue
            size = body[at]
            at += 1
            if size > 0x7F:
                size, at = read_varint(body, at - 1)
            stop = at + size
            if stop > end:
                raise _truncated()
            if tag > _PARAMETER:
                if tag == _TENSOR:
                    has_tensors = True
                elif tag == raw_tag and raw < 0:
                    raw = begin
            elif tag == _PARAMETER:
                entries.append(bytes(body[at:stop]))
            else:
                if size > MAX_NAME and raw_tag == RAW_INPUT and tag in _SCALARS and size > _longest(tag):
                    raise _too_long(tag, size)
                text = str(body[at:stop], "utf-8")
                if tag == _NAME:
                    name = text
                elif tag == _VERSION:
                    version = text
                elif tag == _ID:
                    id = text
                else:
                    raise MalformedMessage("A field has number 0.")
                if front == begin:
                    front = stop
                else:
                    strays.append((begin, stop))
            at = stop
    except IndexError:
        raise _truncated() from None
    except UnicodeDecodeError:
        raise _not_utf8() from None
    raise too_many(f"A message has more than {MAX_FIELDS} top-level fields.")


def fields(body: Buffer, at: int, end: int, most: int = MAX_FIELDS) -> Iterator[tuple[int, int, int, int]]:
    """Each field as (tag, its begin, its value's begin, its end): `_peek`'s loop in its plain form."""
    left = most
    try:
        while True:
            if at == end:
                return
            left -= 1
            if left < 0:
                break
            begin = at
            tag, value = _tag(body, begin)
            if tag & 7 == _GROUP:
                at, inside = _skip_group(body, tag, value, end)
                left -= inside
            elif tag & 7 == _LEN:
                size, value = read_varint(body, value)
                at = value + size
                if at > end or tag < 8:
                    raise _truncated() if tag >= 8 else MalformedMessage("A field has number 0.")
            else:
                at = _skip(body, tag, value, end)
            yield tag, begin, value, at
    except IndexError:
        raise _truncated() from None
    raise MalformedMessage(f"A message or a part of it has more than {most} fields.")


def _skip(body: Buffer, tag: int, at: int, end: int) -> int:
    """Where a field ends that is not length-delimited. at: behind its tag."""
    if tag < 8:
        raise MalformedMessage("A field has number 0.")
    kind = tag & 7
    if kind == _VARINT:
        _, stop = read_varint(body, at)
    elif kind == _I64:
        stop = at + 8
    elif kind == _I32:
        stop = at + 4
    else:
        raise MalformedMessage("A field is of an unknown wire type, or the end of a group that has not begun.")
    if stop > end:
        raise _truncated()
    return stop


def _skip_group(body: Buffer, tag: int, at: int, end: int) -> tuple[int, int]:
    """Where a group ends, and how many fields are in it. V2 has no groups, but protobuf keeps unknown ones.

    tag: with which it begins; `at` is behind it.
    """
    if tag < 8:
        raise MalformedMessage("A field has number 0.")
    ends = [tag + 1]  # end tags of the open groups; an end tag is its start tag + 1
    for count in range(MAX_FIELDS + 1):
        tag, at = _tag(body, at)
        kind = tag & 7
        if kind == _GROUP_END:
            if tag != ends.pop():
                raise MalformedMessage("A group ends that has not begun.")
        elif tag < 8:
            raise MalformedMessage("A field has number 0.")
        elif kind == _GROUP:
            if len(ends) == _MAX_GROUPS_DEEP:
                raise MalformedMessage(f"Groups are more than {_MAX_GROUPS_DEEP} deep.")
            ends.append(tag + 1)
        elif kind == _LEN:
            size, at = read_varint(body, at)
            at += size
        else:
            at = _skip(body, tag, at, end)
        if at > end:
            raise _truncated()
        if not ends:
            return at, count
    raise MalformedMessage(f"A group has more than {MAX_FIELDS} fields.")


def _tag(body: Buffer, at: int) -> tuple[int, int]:
    tag, at = read_varint(body, at)
    if tag > 0xFFFF_FFFF:
        raise MalformedMessage("A field's number is too large.")
    return tag, at


def read_varint(body: Buffer, at: int) -> tuple[int, int]:
    """The varint at `at`, cut to 64 bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
    raise MalformedMessage("A number has more than 10 bytes.")


def _decode_parameters(entries: list[bytes]) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    left = MAX_PARAMETER_FIELDS
    for entry in entries:
        key, value, count = _decode_short_entry(entry) if len(entry) <= 128 else _decode_entry(entry)
        left -= count
        if left < 0:
            raise _too_many_parameter_fields()
        if value is None:
            parameters.pop(key, None)
        else:
            parameters[key] = value
    return parameters


def _decode_entry(entry: bytes) -> tuple[str, Parameter | None, int]:
    """The key, the value, and how many fields the entry and its value have."""
    key = ""
    value: Parameter | None = None
    count = 0
    for tag, _, at, stop in fields(entry, 0, len(entry), MAX_PARAMETER_FIELDS):
        count += 1
        if tag == 0x0A:
            key = _text(entry[at:stop])
        elif tag == 0x12:
            value, inside = _decode_value(entry, at, stop, value)
            count += inside
        if count > MAX_PARAMETER_FIELDS:
            raise _too_many_parameter_fields()
    return key, value, count


# Most clients send the same few entries with every request. Callers choose the bytes, so number and size are bounded.
_decode_short_entry = functools.lru_cache(1024)(_decode_entry)


def _decode_value(entry: bytes, at: int, stop: int, value: Parameter | None) -> tuple[Parameter | None, int]:
    """An InferParameter: the last alternative wins, and `value` stays if there is none (protobuf merges repeats).

    Answers how many fields it has, too.
    """
    count = 0
    for tag, _, begin, end in fields(entry, at, stop, MAX_PARAMETER_FIELDS):
        count += 1
        if tag == 1 << 3 | _VARINT:
            value = read_varint(entry, begin)[0] != 0
        elif tag == 2 << 3 | _VARINT:
            number = read_varint(entry, begin)[0]
            value = number - (1 << 64) if number >> 63 else number
        elif tag == 3 << 3 | _LEN:
            value = _text(entry[begin:end])
        elif tag == 4 << 3 | _I64:
            value = struct.unpack("<d", entry[begin:end])[0]
        elif tag == 5 << 3 | _VARINT:
            value = read_varint(entry, begin)[0]
    return value, count


def _too_many_parameter_fields() -> MalformedMessage:
    return MalformedMessage(f"The parameters have more than {MAX_PARAMETER_FIELDS} fields.")


def _without_strays(body: Buffer, head: Head) -> list[Buffer]:
    pieces, at = [], head.front
    for begin, stop in head.strays:
        pieces.append(body[at:begin])
        at = stop
    pieces.append(body[at : head.end])
    return pieces


def scalars(name: str, version: str, id: str) -> bytes:
    """Fields 1 to 3 of a request or response; empty ones are left out."""
    names = _short_names if len(name) + len(version) <= 128 else _names
    front = names(name, version)
    return front + _string(_ID, id) if id else front


def _names(name: str, version: str) -> bytes:
    front = _string(_NAME, name)
    return front + _string(_VERSION, version) if version else front


_short_names = functools.lru_cache(1024)(_names)  # callers choose the names, so number and size are bounded


def _string(tag: int, text: str) -> bytes:
    """A string field; b"" for "", since proto3 serializers write no empty scalars."""
    raw = text.encode()
    size = len(raw)
    if 0 < size < 0x80:
        return bytes((tag, size)) + raw
    return bytes((tag,)) + encode_varint(size) + raw if size else b""


def id_parameter(key: str, id: int | str) -> bytes:
    """An entry of `parameters`, to append to a message: it replaces one with the same key. id: at least 0."""
    value = _string(0x1A, id) if isinstance(id, str) else b"\x10" + encode_varint(id)
    entry = _string(_NAME, key) + b"\x12" + encode_varint(len(value)) + value
    return b"\x22" + encode_varint(len(entry)) + entry


def encode_varint(number: int) -> bytes:
    """A number of at least 0 as a varint."""
    if number < 0x80:
        return _ONE_BYTE[number]
    if number < 0x4000:
        return bytes((number & 0x7F | 0x80, number >> 7))
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _text(raw: Buffer) -> str:
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        raise _not_utf8() from None


def _truncated() -> MalformedMessage:
    return MalformedMessage("A field is longer than its message.")


def _not_utf8() -> MalformedMessage:
    return MalformedMessage("A string is not valid UTF-8.")
