"""What is around the raw tensors is read, rewritten and taken apart as protobuf would."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.batching import Batch, Layout, Layouts
from gateway.rpc.metadata import Fields
from gateway.v2.peek import Head, peek_request, peek_response
from gateway.v2.placing import read_front

SIZES = {"FP32": 4, "INT64": 8, "UINT8": 1, "FP16": 2}


def bytes_elements(elements: Sequence[bytes]) -> bytes:
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


@dataclass(eq=False)
class Request:
    """A caller's request as a merge point sees it."""

    source: bytes | memoryview
    head: Head
    layout: Layout
    spans: Sequence[tuple[int, int]]
    caller: Hashable = 0
    is_over: bool = field(default=False)
    carried: Fields = ()


def request_message(rows: int, *, id: str = "", seed: int = 0, outputs: Sequence[str] = ("y",)) -> pb.ModelInferRequest:
    """Two inputs, one of them BYTES, whose contents say whose they are."""
    message = pb.ModelInferRequest(model_name="public", id=id)
    message.inputs.add(name="x", datatype="FP32", shape=[rows, 3])
    message.inputs.add(name="text", datatype="BYTES", shape=[rows, 2])
    for name in outputs:
        message.outputs.add(name=name)
    message.raw_input_contents.append(np.arange(rows * 3, dtype=np.float32).tobytes() + b"")
    message.raw_input_contents.append(bytes_elements([f"{seed}-{n}".encode() * (n + 1) for n in range(rows * 2)]))
    return message


def read(layouts: Layouts, message: pb.ModelInferRequest) -> Request | None:
    body = message.SerializeToString()
    head = peek_request(body)
    found = layouts.maybe_read(body, head)
    return Request(body, head, *found) if found else None


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_a_merged_request_is_the_members_rows_one_after_the_other(rows: list[int]) -> None:
    layouts = Layouts(pb.ModelInferRequest)
    messages = [request_message(count, id=str(n), seed=n) for n, count in enumerate(rows)]
    members = [read(layouts, message) for message in messages]
    assert all(members)

    merged = pb.ModelInferRequest.FromString(Batch([m for m in members if m]).request("variant", "2"))

    assert (merged.model_name, merged.model_version, merged.id) == ("variant", "2", "")
    assert [list(tensor.shape) for tensor in merged.inputs] == [[sum(rows), 3], [sum(rows), 2]]
    assert [output.name for output in merged.outputs] == ["y"]
    for number in range(2):
        assert merged.raw_input_contents[number] == b"".join(m.raw_input_contents[number] for m in messages)


@given(rows=st.integers(1, 4), wrong=st.integers(-5, 5))
def test_a_request_whose_tensors_lie_elsewhere_is_read_as_one_that_has_them(rows: int, wrong: int) -> None:
    """Or is not read, if one has not the size of its shape."""
    layouts = Layouts(pb.ModelInferRequest)
    message = request_message(rows)
    message.parameters["own"].int64_param = 1
    whole = read(layouts, message)
    front = read_front(message.SerializeToString())
    assert whole is not None
    assert front is not None
    first, second = message.raw_input_contents
    memory = memoryview(first + bytes(64) + second + bytes(64))
    for changed in range(2):
        sizes = [len(first) + (wrong if changed == 0 else 0), len(second) + (wrong if changed == 1 else 0)]
        spans = [(0, sizes[0]), (len(first) + 64, len(first) + 64 + sizes[1])]
        found = layouts.maybe_read_apart(front.layout, memory, spans)
        assert (found is not None) == (wrong == 0)
        assert found is None or (found[0] is whole.layout and found[1] == spans)
        assert layouts.maybe_read_apart(front.layout, memory, spans[:1]) is None


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.booleans())
def test_each_member_gets_the_answer_that_it_would_have_got_alone(rows: list[int], with_parameter: bool) -> None:
    requests, answers = Layouts(pb.ModelInferRequest), Layouts(pb.ModelInferResponse)
    members = [read(requests, request_message(count, id=f"id{n}")) for n, count in enumerate(rows)]

    def answer(counts: list[int], model: str, id: str) -> bytes:
        total = sum(counts)
        message = pb.ModelInferResponse(model_name=model, model_version="1", id=id)
        if with_parameter:
            message.parameters["triton_final_response"].bool_param = True
        message.outputs.add(name="y", datatype="INT64", shape=[total, 2])
        message.outputs.add(name="label", datatype="BYTES", shape=[total])
        first = sum(rows[: rows.index(counts[0])]) if len(counts) == 1 else 0
        values = np.arange(sum(rows) * 2, dtype=np.int64)
        texts = [b"t" * n for n in range(sum(rows))]
        message.raw_output_contents.append(values[first * 2 : (first + total) * 2].tobytes())
        message.raw_output_contents.append(bytes_elements(texts[first : first + total]))
        return bytes(message.SerializeToString())

    merged = answer(rows, "variant", "")
    head = peek_response(merged)
    found = answers.maybe_read(merged, head)
    assert found is not None
    made = Batch([m for m in members if m]).answers(merged, head, *found)

    at = 0
    for n, (count, body) in enumerate(zip(rows, made, strict=True)):
        parsed = pb.ModelInferResponse.FromString(body)
        assert (parsed.model_name, parsed.model_version, parsed.id) == ("public", "1", f"id{n}")
        assert [list(tensor.shape) for tensor in parsed.outputs] == [[count, 2], [count]]
        assert list(np.frombuffer(parsed.raw_output_contents[0], np.int64)) == list(range(at * 2, (at + count) * 2))
        assert parsed.raw_output_contents[1] == bytes_elements([b"t" * k for k in range(at, at + count)])
        assert parsed.SerializeToString() == body  # field by field where protobuf itself would put it
        at += count


def altered(**changes: object) -> pb.ModelInferRequest:
    message = request_message(2)
    if "parameter" in changes:
        message.parameters[str(changes["parameter"])].int64_param = 1
    if "shape" in changes:
        message.inputs[0].shape[:] = changes["shape"]  # type: ignore[index]
    if "raw" in changes:
        message.raw_input_contents[0] = changes["raw"]
    if "text" in changes:
        message.raw_input_contents[1] = changes["text"]
    return message


ALONE = {
    "sequence": altered(parameter="sequence_id"),
    "priority": altered(parameter="priority"),
    "timeout": altered(parameter="timeout"),
    "rows that differ between inputs": altered(shape=[3, 2]),
    "too few bytes": altered(raw=b"1234"),
    "negative shape": altered(shape=[-1, 3]),
    "no rows": altered(shape=[0, 3]),
    "an element too long": altered(text=b"\xff\xff\xff\x7fabc"),
    "bytes left over": altered(text=bytes_elements([b"a"] * 5)),
}


@pytest.mark.parametrize("message", ALONE.values(), ids=ALONE)
def test_what_can_not_be_merged_safely_goes_alone(message: pb.ModelInferRequest) -> None:
    assert read(Layouts(pb.ModelInferRequest), message) is None


@pytest.mark.parametrize(("rows", "is_read"), [(2048, True), (2049, False)])
def test_a_request_of_very_many_strings_goes_alone(rows: int, is_read: bool) -> None:
    """Each is looked at on the event loop, and 64 MiB of empty ones come in 64 KiB that are compressed."""
    message = request_message(2)
    for tensor in message.inputs:
        tensor.shape[0] = rows
    message.raw_input_contents[:] = [bytes(12 * rows), bytes(8 * rows)]
    assert (read(Layouts(pb.ModelInferRequest), message) is not None) == is_read


def test_typed_contents_go_alone() -> None:
    message = pb.ModelInferRequest(model_name="m")
    tensor = message.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    tensor.contents.fp32_contents.append(1.0)
    assert read(Layouts(pb.ModelInferRequest), message) is None


def test_shared_memory_goes_alone() -> None:
    message = pb.ModelInferRequest(model_name="m")
    tensor = message.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    tensor.parameters["shared_memory_region"].string_param = "r"
    assert read(Layouts(pb.ModelInferRequest), message) is None


def test_the_flag_of_nvidias_client_does_not_matter() -> None:
    assert read(Layouts(pb.ModelInferRequest), altered(parameter="triton_enable_empty_final_response")) is not None


def test_requests_for_other_outputs_have_another_signature() -> None:
    layouts = Layouts(pb.ModelInferRequest)
    some, other = read(layouts, request_message(1)), read(layouts, request_message(1, outputs=("z",)))
    assert some is not None
    assert other is not None
    assert some.layout.signature != other.layout.signature


def test_the_number_of_rows_is_not_part_of_the_signature() -> None:
    layouts = Layouts(pb.ModelInferRequest)
    one, three = read(layouts, request_message(1)), read(layouts, request_message(3))
    assert one is not None
    assert three is not None
    assert one.layout.signature == three.layout.signature


@given(st.binary(max_size=300))
def test_arbitrary_bytes_after_a_name_never_raise(rest: bytes) -> None:
    body = pb.ModelInferRequest(model_name="m").SerializeToString() + rest
    head = Head("m", "", "", True, [], 0, 3, len(body), [])
    Layouts(pb.ModelInferRequest).maybe_read(body, head)
