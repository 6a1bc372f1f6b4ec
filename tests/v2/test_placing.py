"""A placed request names where its raw tensors lie, and is in all else the request that came.

Protobuf is the judge: it reads both, and the tensors are looked up in the memory as Triton would.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from gateway.v2.peek import RAW_INPUT, with_raw
from gateway.v2.placing import ALIGNMENT, MOST_INPUTS, Placing, read_front

NAMES = ("net", "2", "id-1")
BEGIN = 4096


def request(*tensors: bytes) -> Any:
    message = pb.ModelInferRequest(model_name="m", model_version="1", id="x", raw_input_contents=tensors)
    message.parameters["priority"].uint64_param = 2
    for number, tensor in enumerate(tensors):
        message.inputs.add(name=f"x{number}", datatype="UINT8", shape=[1, len(tensor)])
    message.inputs[0].parameters["own"].string_param = "value"
    message.outputs.add(name="OUT").parameters["classification"].int64_param = 3
    return message


def fed(body: bytes, cuts: list[int]) -> tuple[Any, Placing, bytearray]:
    front = read_front(body)
    assert front is not None
    memory = bytearray(front.size_of(len(body)))
    placing = Placing(memoryview(memory))
    edges = [front.raw, *sorted(cut for cut in cuts if front.raw < cut < len(body)), len(body)]
    placing.feed(body[: edges[1]], front.raw)
    for begin, end in itertools.pairwise(edges[1:]):
        placing.feed(body[begin:end])
    return front, placing, memory


def as_triton_reads_it(placed: bytes, memory: bytearray) -> Any:
    """The request with its tensors back in it."""
    message = pb.ModelInferRequest.FromString(placed)
    assert not message.raw_input_contents
    for tensor in message.inputs:
        assert tensor.parameters.pop("shared_memory_region").string_param == "region"
        offset = tensor.parameters.pop("shared_memory_offset").int64_param - BEGIN
        size = tensor.parameters.pop("shared_memory_byte_size").int64_param
        assert offset % ALIGNMENT == 0
        message.raw_input_contents.append(bytes(memory[offset : offset + size]))
    return message


@given(tensors=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=5), at=st.integers(0, 300))
@settings(deadline=None)
def test_tensors_that_no_message_has_are_laid_as_those_of_one(tensors: list[bytes], at: int) -> None:
    """The front ends where the first raw tensor would begin."""
    whole = request(*tensors)
    body = whole.SerializeToString()
    without = pb.ModelInferRequest.FromString(body)
    del without.raw_input_contents[:]
    message = without.SerializeToString()
    assert with_raw(message, RAW_INPUT, tensors) == body
    front = read_front(message + bytes((RAW_INPUT,)))
    assert front is not None
    memory = bytearray(front.size_of(len(body)))
    placing = Placing(memoryview(memory))
    assert all(placing.put([memoryview(tensor)[:at], tensor[at:]]) for tensor in tensors)
    placed = front.placed(("m", "1", "x"), "region", BEGIN, placing.places)
    assert placed is not None
    assert as_triton_reads_it(placed, memory) == whole
    assert not placing.put([b"", bytes(len(memory))])
    assert len(placing.places) == len(tensors)


@given(
    tensors=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=5), cuts=st.lists(st.integers(0, 2000))
)
@settings(deadline=None)
def test_every_tensor_lies_where_the_request_says_however_it_is_cut(tensors: list[bytes], cuts: list[int]) -> None:
    message = request(*tensors)
    body = message.SerializeToString()
    front, placing, memory = fed(body, cuts)
    assert placing.is_whole
    placed = front.placed(NAMES, "region", BEGIN, placing.places)
    message.model_name, message.model_version, message.id = NAMES
    assert as_triton_reads_it(placed, memory) == message
    assert body[: front.raw] + placing.raw() == body


@given(
    tensors=st.lists(st.binary(max_size=100), min_size=1, max_size=3),
    after=st.one_of(st.binary(max_size=60), st.just(b"\x3a\xff\xff\xff\xff\xff"), st.just(b"\x3a\x7fabc")),
    cuts=st.lists(st.integers(0, 800)),
)
@settings(deadline=None)
def test_what_is_odd_after_the_tensors_is_kept_as_it_came(tensors: list[bytes], after: bytes, cuts: list[int]) -> None:
    body = request(*tensors).SerializeToString() + after
    front, placing, _ = fed(body, cuts)
    again = body[: front.raw] + placing.raw()
    if placing.is_whole:  # what came after reads as tensors too: then there may be more than inputs
        placed = front.placed(NAMES, "region", BEGIN, placing.places)
        assert placed is None or len(placing.places) == len(tensors)
        assert [t.name for t in pb.ModelInferRequest.FromString(again).inputs] == [f"x{i}" for i in range(len(tensors))]
    else:
        assert again == body


def typed() -> Any:
    message = request(b"12")
    message.inputs.add(name="y").contents.bytes_contents.append(b"3")
    return message


def with_own_memory(where: str) -> Any:
    message = request(b"12")
    getattr(message, where)[0].parameters["shared_memory_region"].string_param = "theirs"
    return message


@pytest.mark.parametrize(
    "message",
    [
        typed(),
        with_own_memory("inputs"),
        with_own_memory("outputs"),
        pb.ModelInferRequest(model_name="m", raw_input_contents=[b"1"]),
        request(*[b"1"] * (MOST_INPUTS + 1)),
        pb.ModelInferRequest(model_name="m", inputs=[{"name": "x"}]),
    ],
    ids=["typed contents", "its own input", "its own output", "no inputs", "many inputs", "no tensors"],
)
def test_what_can_t_be_placed_is_said_at_once(message: Any) -> None:
    assert read_front(message.SerializeToString()) is None


def test_a_front_that_ends_before_the_tensors_is_none() -> None:
    body = request(b"12").SerializeToString()
    front = read_front(body)
    assert front is not None
    for end in range(front.raw + 1):
        assert read_front(body[:end]) is None, end


def test_fields_that_are_unknown_are_none() -> None:
    assert read_front(b"\x0a\x01m\x7a\x01x" + request(b"12").SerializeToString()) is None


def test_as_many_tensors_as_inputs_or_none() -> None:
    message = request(b"1", b"2")
    message.raw_input_contents.append(b"3")
    front, placing, _ = fed(message.SerializeToString(), [])
    assert front.placed(NAMES, "region", BEGIN, placing.places) is None


@pytest.mark.parametrize("tensors", [(b"",), (b"", b"1"), (b"1", b"")], ids=["alone", "first", "last"])
def test_a_tensor_without_bytes_has_no_place(tensors: tuple[bytes, ...]) -> None:
    """Triton refuses to look for one, in words that would read as if it had lost the region."""
    body = request(*tensors).SerializeToString()
    front, placing, _ = fed(body, [])
    assert placing.is_whole
    assert front.placed(NAMES, "region", BEGIN, placing.places) is None
    assert body[: front.raw] + placing.raw() == body
