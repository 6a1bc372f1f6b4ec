"""wire.peek against its judge, protobuf's own parser.

Invariant: whatever protobuf reads as a message, peek reads with the same head; whatever else comes in raises nothing
but the declared error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import example, given
from hypothesis import strategies as st
from slowness import slowness
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import BadRequest, GatewayError, MalformedMessage
from gateway.types import Parameter
from gateway.v2 import peek
from gateway.v2.peek import Buffer, Head

# Messages as lists of encoded fields, so that order, repeats and unknown fields are free


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes((number & 0x7F | 0x80,)), number >> 7
    return out + bytes((number,))


def long_varint(number: int, size: int) -> bytes:
    """The same number in more bytes than it needs, which protobuf allows."""
    plain = varint(number)
    return (
        plain
        if len(plain) >= size
        else plain[:-1] + bytes((plain[-1] | 0x80,)) + b"\x80" * (size - len(plain) - 1) + b"\0"
    )


def delimited(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


texts = st.text(max_size=200)
unknown_fields = st.one_of(
    st.builds(delimited, st.integers(8, 2**29 - 1), st.binary(max_size=200)),
    st.builds(lambda n, v: varint(n << 3) + varint(v), st.integers(1, 2**29 - 1), st.integers(0, 2**64 - 1)),
    st.builds(lambda n, v: varint(n << 3 | 1) + v, st.integers(1, 2**29 - 1), st.binary(min_size=8, max_size=8)),
    st.builds(lambda n, v: varint(n << 3 | 5) + v, st.integers(1, 2**29 - 1), st.binary(min_size=4, max_size=4)),
)


def group(number: int, inside: bytes) -> bytes:
    return varint(number << 3 | 3) + inside + varint(number << 3 | 4)


def groups(inside: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(group, st.integers(1, 2**29 - 1), st.lists(inside, max_size=3).map(b"".join))


unknown_fields = st.recursive(unknown_fields, groups, max_leaves=4)
parameter_values = st.one_of(
    st.builds(lambda v: pb.InferParameter(bool_param=v), st.booleans()),
    st.builds(lambda v: pb.InferParameter(int64_param=v), st.integers(-(2**63), 2**63 - 1)),
    st.builds(lambda v: pb.InferParameter(string_param=v), texts),
    st.builds(lambda v: pb.InferParameter(double_param=v), st.floats()),
    st.builds(lambda v: pb.InferParameter(uint64_param=v), st.integers(0, 2**64 - 1)),
    st.just(pb.InferParameter()),
).map(lambda message: message.SerializeToString())
keys = st.one_of(st.sampled_from(["sequence_id", "triton_final_response", ""]), texts)
entries = st.lists(
    st.one_of(
        st.builds(delimited, st.just(1), keys.map(str.encode)),
        st.builds(
            delimited, st.just(2), st.lists(parameter_values | groups(parameter_values), max_size=4).map(b"".join)
        ),
    ),
    max_size=6,
).map(b"".join)
scalars = st.builds(
    lambda number, text, pad: long_varint(number << 3 | 2, pad) + long_varint(len(text), pad) + text,
    st.integers(1, 3),
    texts.map(str.encode),
    st.integers(1, 4),
)
tensors = st.builds(
    lambda name, shape: delimited(
        5, pb.ModelInferRequest.InferInputTensor(name=name, datatype="FP32", shape=shape).SerializeToString()
    ),
    texts,
    st.lists(st.integers(0, 9), max_size=3),
)
messages = st.lists(
    st.one_of(scalars, scalars, st.builds(delimited, st.just(4), entries), tensors, unknown_fields), max_size=12
).map(b"".join)

KINDS: list[tuple[type[Message], Callable[[Buffer], Head]]] = [
    (pb.ModelInferRequest, peek.peek_request),
    (pb.ModelInferResponse, peek.peek_response),
]
kinds = pytest.mark.parametrize(("kind", "read"), KINDS, ids=["request", "response"])


def parameter(message: pb.InferParameter) -> Parameter | None:
    choice = message.WhichOneof("parameter_choice")
    return getattr(message, choice) if choice else None


def plain_head(message: pb.ModelInferRequest | pb.ModelInferResponse) -> tuple[object, ...]:
    """The judge: what protobuf says about a message."""
    found = {key: parameter(value) for key, value in message.parameters.items()}
    tensors = message.inputs if isinstance(message, pb.ModelInferRequest) else message.outputs
    return (
        message.model_name,
        message.model_version,
        message.id,
        bool(tensors),
        comparable({key: value for key, value in found.items() if value is not None}),
    )


def comparable(parameters: dict[str, Parameter]) -> dict[str, tuple[type, object]]:
    return {
        key: (type(value), "nan" if isinstance(value, float) and math.isnan(value) else value)
        for key, value in parameters.items()
    }


def peeked(head: Head) -> tuple[object, ...]:
    return head.model_name, head.model_version, head.id, head.has_tensors, comparable(head.parameters)


@kinds
@given(body=messages)
def test_a_head_is_what_protobuf_reads(kind: type[Message], read: Callable[[Buffer], Head], body: bytes) -> None:
    expected = plain_head(kind.FromString(body))

    assert peeked(read(body)) == expected
    assert peeked(read(memoryview(body))) == expected


@kinds
@given(body=messages, name=st.none() | texts, version=st.none() | texts, id=st.none() | texts)
def test_a_renamed_message_is_the_parsed_one_with_its_scalars_set(
    kind: type[Message],
    read: Callable[[Buffer], Head],
    body: bytes,
    name: str | None,
    version: str | None,
    id: str | None,
) -> None:
    expected = kind.FromString(body)
    for field, value in (("model_name", name), ("model_version", version), ("id", id)):
        if value is not None:
            setattr(expected, field, value)

    renamed = peek.rename_request(body, read(body), model_name=name, model_version=version, id=id)

    assert kind.FromString(renamed) == expected


@given(body=messages)
def test_renaming_keeps_every_other_byte_in_order(body: bytes) -> None:
    """The plain version cuts the scalars out field by field."""
    kept = b"".join(body[a:z] for tag, a, _, z in peek.fields(body, 0, len(body)) if tag not in (0x0A, 0x12, 0x1A))

    assert peek.rename_request(body, peek.peek_request(body), model_name="", model_version="", id="") == kept


def test_a_message_in_canonical_order_only_changes_at_its_front() -> None:
    request = pb.ModelInferRequest(model_name="public", model_version="1", id="7", raw_input_contents=[b"\0" * 64])
    body = request.SerializeToString()
    request.model_name = "variant"

    assert peek.rename_request(body, peek.peek_request(body), model_name="variant") == request.SerializeToString()


@kinds
@given(body=st.binary(max_size=60) | st.builds(lambda a, b: a + b, messages, st.binary(max_size=20)))
@example(body=b"\x0a\x02\xff\xff")  # a name that is not UTF-8
@example(body=b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
@example(body=b"\x80" * 30)
@example(body=b"\x02\x00")  # field number 0
def test_arbitrary_bytes_raise_nothing_but_the_declared_error(
    kind: type[Message], read: Callable[[Buffer], Head], body: bytes
) -> None:
    found: Head | None = None
    refusal = ""
    try:
        found = read(body)
        peek.rename_request(body, found, model_name="other")
        _ = found.parameters
    except MalformedMessage as error:
        refusal = error.text
    try:
        expected = plain_head(kind.FromString(body))
    except DecodeError:
        return  # what peek reads nevertheless is wrong inside of tensors, and Triton's to refuse
    # The parameters are left out: implementations of protobuf disagree on a map entry with unknown fields in it.
    assert (found is not None and peeked(found)[:4] == expected[:4]) or "group" in refusal


MALFORMED = {
    "length_beyond_the_end": b"\x0a\x05abc",
    "no_length": b"\x0a",
    "truncated_fixed64": b"\x41\0\0\0",
    "truncated_fixed32": b"\x45\0\0",
    "truncated_varint": b"\x40\x80",
    "varint_of_11_bytes": b"\x40" + b"\x80" * 10 + b"\x01",
    "name_not_utf8": b"\x0a\x02\xff\xff",
    "id_not_utf8": b"\x1a\x01\xc0",
    "field_number_0": b"\x02\x00",
    "field_number_0_varint": b"\x00\x00",
    "group_without_an_end": b"\x43\x08\x01",
    "group_that_ends_as_another": b"\x43\x4c",
    "group_that_ends_within_another": b"\x43\x4b\x44\x4c",
    "group_with_a_field_that_is_too_long": b"\x43\x0a\x05\x44",
    "group_with_field_number_0": b"\x43\x00\x00\x44",
    "group_number_0": b"\x03\x04",
    "groups_too_deep": b"\x43" * 101 + b"\x44" * 101,
    "group_end": b"\x44",
    "wire_type_7": b"\x47",
    "tag_above_32_bits": b"\x82\x80\x80\x80\x10\x00",
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_bytes_that_are_no_message_are_refused(body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        peek.peek_request(body)
    with pytest.raises(MalformedMessage):
        peek.peek_request(b"\x0a\x01m" + body)


@pytest.mark.parametrize(
    "entry", [b"\x0a\x02\xff\xff", b"\x0a\x05a", b"\x12\x03\x1a\x01\xff"], ids=["key", "length", "string"]
)
def test_a_malformed_parameter_is_refused_when_it_is_read(entry: bytes) -> None:
    head = peek.peek_request(delimited(4, entry))

    with pytest.raises(MalformedMessage):
        _ = head.parameters


# Cost


@pytest.mark.parametrize(
    "count", [peek.MAX_FIELDS - 1, peek.MAX_FIELDS, peek.MAX_FIELDS + 1], ids=["below", "at", "above"]
)
@pytest.mark.parametrize("field", [b"\x2a\x00", b"\x0a\x00", b"\x40\x00"], ids=["input", "name", "varint"])
def test_a_request_may_have_max_fields_and_no_more(count: int, field: bytes) -> None:
    body = field * count
    started = time.thread_time()
    if count > peek.MAX_FIELDS:
        with pytest.raises(BadRequest, match=str(peek.MAX_FIELDS)):
            peek.peek_request(body)
    else:
        peek.rename_request(b"\x40\0" + body[2:], peek.peek_request(b"\x40\0" + body[2:]))
    assert time.thread_time() - started < 1 * slowness()


@pytest.mark.parametrize("count", [peek.MAX_PARAMETERS, peek.MAX_PARAMETERS + 1], ids=["at", "above"])
def test_a_request_may_have_max_parameters_and_no_more(count: int) -> None:
    body = peek.bool_parameter("key", True) * count
    if count > peek.MAX_PARAMETERS:
        with pytest.raises(BadRequest, match=str(peek.MAX_PARAMETERS)):
            peek.peek_request(body)
    else:
        assert peek.peek_request(body).parameters == {"key": True}


ENDLESS = {
    "values": lambda count: [delimited(2, b"\x08\x01") * (count // 2)],
    "fields of a value": lambda count: [delimited(2, b"\x08\x01" * (count - 1))],
    "entries": lambda count: [delimited(2, b"\x08\x01" * 99)] * (count // 100),
    "short entries": lambda count: [delimited(2, b"\x08\x01" * 31)] * (count // 32),
    "groups": lambda count: [group(8, b"\x08\x01" * (count - 1))],
}


@pytest.mark.parametrize("made", ENDLESS.values(), ids=ENDLESS)
def test_parameters_may_have_so_many_fields_and_no_more(made: Callable[[int], list[bytes]]) -> None:
    most = peek.MAX_PARAMETER_FIELDS
    for count in (most, most + 200):
        head = peek.peek_request(b"".join(delimited(4, entry) for entry in made(count)))
        started = time.thread_time()
        if count > most:
            with pytest.raises(MalformedMessage, match=str(most)):
                _ = head.parameters
        else:
            _ = head.parameters
        assert time.thread_time() - started < 1 * slowness()


@pytest.mark.parametrize("count", [1, 100, 1000])
def test_groups_do_not_hide_fields_from_the_limit(count: int) -> None:
    inside = b"\x08\x01" * (peek.MAX_FIELDS // count)
    peek.peek_request(group(8, inside) * count)
    with pytest.raises(GatewayError, match=str(peek.MAX_FIELDS)):
        peek.peek_request(group(8, inside + b"\x08\x01") * count + group(8, b"\x08\x01" * 1000))


def test_a_group_that_has_not_come_whole_may_go_on() -> None:
    front = b"\x0a\x01m" + group(8, group(9, b"\x08\x01") + delimited(1, bytes(9)))
    for end in range(3, len(front)):
        assert peek.peek_front(front[:end]) is None
    head = peek.peek_front(front + b"\x2a\x7f")
    assert head is not None
    assert head.model_name == "m"


@pytest.mark.parametrize(
    ("body", "id"),
    [
        (b"\x0a\x01m\x1a\x01a\xff", "a"),
        (b"\x0a\x01m\xff", ""),
        (b"\x1a\x01\xff", ""),
        (delimited(3, b"9" * peek.MAX_ID), "9" * peek.MAX_ID),
        (delimited(3, b"9" * (peek.MAX_ID + 1)), ""),
    ],
    ids=["before what is wrong", "behind it", "not UTF-8", "at the limit", "too long"],
)
def test_the_id_of_a_refused_request_is_found_if_it_may_be_repeated(body: bytes, id: str) -> None:
    assert peek.maybe_id(body) == id


def test_a_key_without_a_value_is_an_entry_all_the_same() -> None:
    bare = delimited(4, delimited(1, b"a"))
    other = delimited(4, delimited(1, b"b") + delimited(2, delimited(3, b"a")))
    assert peek.has_entry(peek.peek_request(other + bare), "a")
    assert not peek.has_entry(peek.peek_request(other), "a")


def test_a_response_with_too_many_fields_is_not_the_callers_fault() -> None:
    with pytest.raises(MalformedMessage, match=str(peek.MAX_FIELDS)):
        peek.peek_response(b"\x2a\x00" * (peek.MAX_FIELDS + 1))


def test_a_stream_s_response_may_not_have_more_fields_either() -> None:
    peek.peek_stream_response(b"\x40\x00" * peek.MAX_FIELDS)
    with pytest.raises(MalformedMessage, match=str(peek.MAX_FIELDS)):
        peek.peek_stream_response(b"\x40\x00" * (peek.MAX_FIELDS + 1))


def test_a_peek_does_not_cost_more_for_a_large_tensor() -> None:
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"\1" * (16 << 20)])
    body = request.SerializeToString()

    assert best_of(20, lambda: peek.peek_request(body)) < 50e-6 * slowness()


def best_of(rounds: int, action: Callable[[], object]) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


# Streams

stream_parts = st.tuples(texts, st.none() | messages, st.lists(unknown_fields, max_size=2).map(b"".join), st.booleans())


def stream_message(error: str, inner: bytes | None, unknown: bytes, swapped: bool) -> bytes:
    first = delimited(1, error.encode())
    second = b"" if inner is None else delimited(2, inner)
    return unknown + second + first if swapped else first + second + unknown


@given(parts=stream_parts, name=st.none() | texts, id=st.none() | texts)
def test_a_stream_response_is_read_and_renamed_as_protobuf_does(
    parts: tuple[str, bytes | None, bytes, bool], name: str | None, id: str | None
) -> None:
    body = stream_message(*parts)
    expected = pb.ModelStreamInferResponse.FromString(body)

    head = peek.peek_stream_response(body)

    assert head.error == expected.error_message
    assert (head.response is not None) == expected.HasField("infer_response")
    if head.response is not None:
        assert peeked(head.response) == plain_head(expected.infer_response)
        for field, value in (("model_name", name), ("id", id)):
            if value is not None:
                setattr(expected.infer_response, field, value)
    renamed = peek.rename_stream_response(body, head, model_name=name, id=id)
    assert pb.ModelStreamInferResponse.FromString(renamed) == expected


@given(body=st.binary(max_size=60) | st.binary(max_size=60).map(lambda inner: delimited(2, inner)))
def test_arbitrary_stream_bytes_raise_nothing_but_the_declared_error(body: bytes) -> None:
    try:
        head = peek.peek_stream_response(body)
        peek.rename_stream_response(body, head, model_name="m")
    except MalformedMessage:
        return


def test_two_responses_in_one_stream_message_are_refused() -> None:
    with pytest.raises(MalformedMessage):
        peek.peek_stream_response(delimited(2, b"") * 2)


@given(text=texts, id=texts, name=texts)
def test_an_in_band_error_has_its_text_id_and_model(text: str, id: str, name: str) -> None:
    expected = pb.ModelStreamInferResponse(
        error_message=text, infer_response=pb.ModelInferResponse(id=id, model_name=name)
    )

    assert peek.stream_error(text, id, name) == expected.SerializeToString()


@given(body=messages)
def test_a_response_is_wrapped_into_a_stream_response_as_protobuf_does(body: bytes) -> None:
    expected = pb.ModelStreamInferResponse(infer_response=pb.ModelInferResponse.FromString(body))

    assert pb.ModelStreamInferResponse.FromString(peek.stream_response(body)) == expected


def response(final: bool | None, outputs: int) -> bytes:
    message = pb.ModelInferResponse(model_name="m")
    if final is not None:
        message.parameters["triton_final_response"].bool_param = final
    for _ in range(outputs):
        message.outputs.add(name="OUT")
    return bytes(message.SerializeToString())


@pytest.mark.parametrize(
    ("final", "is_final"),
    [
        pytest.param(None, False, id="nothing_said"),
        pytest.param(False, False, id="one_of_many"),
        pytest.param(True, True, id="the_last"),
    ],
)
@pytest.mark.parametrize("outputs", [0, 1])
def test_a_response_says_whether_it_is_the_last(final: bool | None, outputs: int, is_final: bool) -> None:
    head = peek.peek_response(response(final, outputs))
    assert (head.is_final, head.has_tensors) == (is_final, bool(outputs))


# Parameters


@given(key=texts, value=st.booleans())
def test_a_parameter_is_encoded_as_protobuf_does(key: str, value: bool) -> None:
    request = pb.ModelInferRequest.FromString(peek.bool_parameter(key, value))

    assert {k: v.bool_param for k, v in request.parameters.items()} == {key: value}


def test_an_appended_parameter_wins() -> None:
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"1234"])
    request.parameters["triton_enable_empty_final_response"].bool_param = False
    body = request.SerializeToString()

    extended = peek.rename_request(body, peek.peek_request(body), extra=peek.ENABLE_EMPTY_FINAL)

    request.parameters["triton_enable_empty_final_response"].bool_param = True
    assert pb.ModelInferRequest.FromString(extended) == request
    assert peek.bool_parameter("triton_enable_empty_final_response", True) == peek.ENABLE_EMPTY_FINAL


@st.composite
def canonical_requests(draw: st.DrawFn) -> bytes:
    """As every serializer seen writes them: fields by number."""
    message = pb.ModelInferRequest(
        model_name=draw(texts), model_version=draw(st.sampled_from(["", "3"])), id=draw(texts)
    )
    for key in draw(st.lists(keys, max_size=3)):
        message.parameters[key].int64_param = draw(st.integers(0, 9))
    for raw in draw(st.lists(st.binary(max_size=400), max_size=3)):
        message.inputs.add(name=draw(texts), datatype="BYTES", shape=[1])
        message.raw_input_contents.append(raw)
    return bytes(message.SerializeToString())


@given(body=canonical_requests(), cut=st.integers(min_value=0))
def test_the_head_of_a_front_is_that_of_the_whole_or_not_known_yet(body: bytes, cut: int) -> None:
    head = peek.peek_front(body[: cut % (len(body) + 1)])
    if head is not None:
        whole = peek.peek_request(body)
        assert peeked(head)[:3] == peeked(whole)[:3]
        assert head.parameters == whole.parameters


@st.composite
def requests_with_unknown_fields(draw: st.DrawFn) -> bytes:
    """Scalars and parameters in any order, then tensors; fields of every kind that nobody knows between them."""
    heads = st.one_of(scalars, st.builds(delimited, st.just(4), entries), unknown_fields)
    begun = st.one_of(tensors, st.builds(delimited, st.sampled_from([6, 7]), st.binary(max_size=50)), unknown_fields)
    return b"".join([*draw(st.lists(heads, max_size=8)), *draw(st.lists(begun, max_size=4))])


@given(body=requests_with_unknown_fields())
@example(body=delimited(1, b"m") + varint(9 << 3 | 5) + b"1234" + delimited(5, b""))
@example(body=delimited(1, b"m") + varint(9 << 3 | 1) + b"12345678" + delimited(5, b""))
@example(body=delimited(1, b"m") + varint(1 << 3 | 5) + b"1234" + delimited(2, b"7") + delimited(5, b""))
@example(body=delimited(1, b"m") + delimited(99, b"unknown") + delimited(2, b"7") + delimited(5, b""))
@example(body=delimited(1, b"m") + delimited(4, b"") * (peek.MAX_PARAMETERS + 1) + delimited(5, b"x"))
def test_a_message_cut_at_any_byte_is_not_enough_or_says_what_the_whole_says(body: bytes) -> None:
    for cut in range(len(body)) if len(body) < 2000 else range(len(body) - 10, len(body)):
        head = peek.peek_front(body[:cut])
        if head is not None:
            whole = peek.peek_request(body)
            assert peeked(head)[:3] == peeked(whole)[:3]
            assert head.entries == whole.entries


def test_a_front_is_enough_once_a_tensor_has_begun() -> None:
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"x" * 1000])
    message.inputs.add(name="image", datatype="UINT8", shape=[1000])
    body = message.SerializeToString()

    assert peek.peek_front(body[:200]) is not None
    assert peek.peek_front(body[:2]) is None


@given(body=messages, name=st.text(min_size=1, max_size=20), version=st.sampled_from(["", "7"]))
def test_a_tail_decides_the_model_whatever_came_before(body: bytes, name: str, version: str) -> None:
    parsed = pb.ModelInferRequest.FromString(body + peek.tail(name, version))

    assert (parsed.model_name, parsed.model_version) == (name, version)


@pytest.mark.parametrize(("field", "most"), [("model_name", 1024), ("model_version", 1024), ("id", 4096)])
def test_names_versions_and_ids_have_bounds_on_the_way_in(field: str, most: int) -> None:
    """Triton and the gateway repeat them in error texts and metadata; what a model answers has no such bound."""

    def request(size: int) -> bytes:
        message = pb.ModelInferRequest(model_name="m", raw_input_contents=[bytes(100_000)])
        setattr(message, field, "\u00fc" * (size // 2))
        message.inputs.add(name="x", datatype="FP32", shape=[1])
        return bytes(message.SerializeToString())

    assert peek.peek_request(request(most))
    assert peek.peek_front(request(most)[:90_000]) is not None
    with pytest.raises(BadRequest, match=rf"The {field} of a request has {most + 2} bytes; {most} are allowed"):
        peek.peek_request(request(most + 2))
    assert peek.peek_front(request(most + 2)[:90_000]) is None
    assert getattr(peek.peek_response(request(most + 2)), field)


@pytest.mark.parametrize("id", [1, 127, 128, 2**63 - 1, "a", "ä" * 100])
def test_an_id_that_is_appended_replaces_the_one_before_for_protobuf_and_for_the_reader(id: int | str) -> None:
    message = pb.ModelInferRequest(model_name="m")
    message.parameters["sequence_id"].int64_param = 7
    message.parameters["sequence_start"].bool_param = True
    body = message.SerializeToString() + peek.id_parameter("sequence_id", id)
    setattr(message.parameters["sequence_id"], "string_param" if isinstance(id, str) else "int64_param", id)
    assert pb.ModelInferRequest.FromString(body) == message
    assert peek.peek_request(body).parameters == {"sequence_id": id, "sequence_start": True}
