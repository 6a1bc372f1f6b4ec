"""Answers whose tensors lie in shared memory: what a request asks for, and the answer that its caller gets."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import MalformedMessage
from gateway.v2.answer_places import is_larger, pieces, places, requested, room_for, sizes_of, wanted
from gateway.v2.layout import SIZES

REGION = "gateway-tensors.1"
FIXED = sorted(name for name, size in SIZES.items() if size)


def asked(*names: str) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest()
    for name in names:
        request.outputs.add(name=name)
    return request


def answer(outputs: Sequence[tuple[str, str, Sequence[int]]], raw: Sequence[bytes]) -> pb.ModelInferResponse:
    made = pb.ModelInferResponse(model_name="m", model_version="1", id="x", raw_output_contents=raw)
    made.parameters["note"].string_param = "y"
    for name, datatype, shape in outputs:
        made.outputs.add(name=name, datatype=datatype, shape=shape)
    return made


def whole(answer: bytes, names: Sequence[bytes], sizes: Sequence[int], memory: bytes | bytearray) -> bytes:
    return b"".join(pieces(answer, places(answer, names, sizes), memoryview(memory)))


@given(
    outputs=st.lists(
        st.tuples(
            st.text(min_size=1, max_size=5),
            st.sampled_from(FIXED),
            st.lists(st.integers(1, 5), min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda output: output[0],
    ),
    data=st.data(),
)
def test_an_answer_is_whole_byte_for_byte_whatever_the_order(
    outputs: list[tuple[str, str, list[int]]], data: st.DataObject
) -> None:
    raw = []
    for _, datatype, shape in outputs:
        size = SIZES[datatype]
        for number in shape:
            size *= number
        raw.append(data.draw(st.binary(min_size=size, max_size=size)))
    order = data.draw(st.permutations([name for name, _, _ in outputs]))
    full = answer(outputs, raw).SerializeToString()
    names = wanted(asked(*order).SerializeToString())
    assert [name.decode() for name in names] == order
    sizes = sizes_of(full, names)
    assert sizes is not None
    told = pb.ModelInferRequest.FromString(requested(names, sizes, REGION, 4096))
    memory = bytearray(room_for(sizes))
    by_name = {name: each for (name, _, _), each in zip(outputs, raw, strict=True)}
    for output in told.outputs:
        where = output.parameters
        assert where["shared_memory_region"].string_param == REGION
        begin, size = where["shared_memory_offset"].int64_param - 4096, where["shared_memory_byte_size"].int64_param
        assert begin % 64 == 0
        assert size == len(by_name[output.name])
        assert not any(memory[begin : begin + size])
        memory[begin : begin + size] = by_name[output.name]
    short = answer(outputs, [b""] * len(outputs)).SerializeToString()
    assert whole(short, names, sizes, memory) == full


def test_only_large_tensors_stay_where_they_are() -> None:
    """A small one is no frame of its own, and does not hold the memory that others wait for."""
    sizes = [0, 8, 1 << 20, 4096, 100_000, 1]
    names = [b"%d" % number for number in range(len(sizes))]
    outputs = [(name.decode(), "UINT8", [size]) for name, size in zip(names, sizes, strict=True)]
    memory = bytearray(room_for(sizes))
    short = answer(outputs, [b""] * len(outputs)).SerializeToString()
    made = pieces(short, places(short, names, sizes), memoryview(memory))
    assert [len(piece) for piece in made if isinstance(piece, memoryview)] == [1 << 20, 100_000]
    assert len(made) == 5
    assert b"".join(made) == answer(outputs, [bytes(size) for size in sizes]).SerializeToString()
    assert pieces(b"head", [], memoryview(b"")) == [b"head"]


@pytest.mark.parametrize("count", [0, 2])
def test_one_that_is_smaller_than_its_place_is_as_large_as_it_says(count: int) -> None:
    short = answer([("y", "FP32", [count])], [b""]).SerializeToString()
    assert (
        whole(short, [b"y"], [400], bytes(400))
        == answer([("y", "FP32", [count])], [bytes(4 * count)]).SerializeToString()
    )


@pytest.mark.parametrize(
    "odd",
    [
        answer([("y", "FP32", [200])], [b""]),  # larger than its place
        answer([("z", "FP32", [1])], [b""]),
        answer([("y", "FP32", [1]), ("z", "FP32", [1])], [b"", b""]),
        answer([("y", "BYTES", [1])], [b""]),  # whose size nobody can tell
        answer([("y", "FP32", [-1])], [b""]),
        answer([("y", "FP32", [1])], [bytes(4)]),
        answer([("y", "FP32", [1])], []),
        answer([], []),
    ],
)
def test_what_is_no_answer_to_such_a_request_is_refused(odd: pb.ModelInferResponse) -> None:
    with pytest.raises(MalformedMessage):
        whole(odd.SerializeToString(), [b"y"], [400], bytes(400))


def test_outputs_with_parameters_are_left_alone() -> None:
    request = asked("a", "b")
    request.outputs[1].parameters["classification"].int64_param = 3
    assert not wanted(request.SerializeToString())
    assert not wanted(b"")
    assert not wanted(asked("a", "a").SerializeToString())
    assert not wanted(asked(*map(str, range(65))).SerializeToString())


@pytest.mark.parametrize(
    "outputs",
    [
        [("y", "BYTES", [1])],
        [("y", "FP32", [0])],
        [("y", "FP32", [-1])],
        [("y", "UNKNOWN", [1])],
        [("y", "FP32", [1]), ("z", "FP32", [1])],
        [],
    ],
)
def test_nothing_is_known_of_answers_whose_size_says_nothing_of_the_next_one(
    outputs: list[tuple[str, str, list[int]]],
) -> None:
    assert sizes_of(answer(outputs, [b"1234"] * max(1, len(outputs))).SerializeToString(), [b"y"]) is None


def test_nor_of_one_that_has_come_in_part() -> None:
    front = answer([("y", "FP32", [1])], [bytes(4)]).SerializeToString()
    for size in range(len(front)):
        with contextlib.suppress(IndexError, MalformedMessage):
            assert sizes_of(front[:size], [b"y"]) in (None, [4])


def test_what_triton_says_of_one_that_is_larger() -> None:
    said = "shared memory size specified with the request for output 'y' (4 bytes) should be at least 8 bytes to hold"
    assert is_larger(said)
    assert not is_larger("unexpected shared memory size")
