"""Shared memory is found where protobuf would read it, and nowhere else."""

from __future__ import annotations

import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import MalformedMessage
from gateway.v2.peek import peek_request
from gateway.v2.shared_memory import uses_shared_memory

KEY = "shared_memory_region"


def found(message: pb.ModelInferRequest | bytes) -> bool:
    body = message if isinstance(message, bytes) else message.SerializeToString()
    return uses_shared_memory(body, peek_request(body).raw)


def request() -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[KEY.encode()])
    message.inputs.add(name=KEY, datatype="BYTES", shape=[1]).contents.bytes_contents.append(KEY.encode())
    message.inputs[0].parameters["other"].string_param = KEY
    message.outputs.add(name=KEY)
    message.parameters["text"].string_param = KEY
    return message


def test_contents_names_and_values_are_none() -> None:
    assert not found(request())


@pytest.mark.parametrize("key", [KEY, "shared_memory_offset", "shared_memory_byte_size"])
def test_parameters_of_tensors_are(key: str) -> None:
    for tensors in ("inputs", "outputs"):
        message = request()
        getattr(message, tensors)[0].parameters[key].int64_param = 1
        assert found(message)
        assert found(pb.ModelInferRequest(raw_input_contents=[b"x"]).SerializeToString() + message.SerializeToString())


def test_a_tensor_behind_the_raw_contents_is_found_too() -> None:
    last = pb.ModelInferRequest()
    last.inputs.add(name="IN").parameters[KEY].string_param = "r"
    assert found(request().SerializeToString() + last.SerializeToString())


def test_an_entry_whose_key_is_written_twice_counts() -> None:
    entry = b"\x0a\x05other" + b"\x0a" + bytes([len(KEY)]) + KEY.encode()
    tensor = b"\x0a\x02IN" + b"\x22" + bytes([len(entry)]) + entry
    assert found(b"\x0a\x01m\x2a" + bytes([len(tensor)]) + tensor)


def test_what_can_t_be_read_is_refused_and_not_passed() -> None:
    tensor = b"\x22\x7f" + KEY.encode()
    with pytest.raises(MalformedMessage):
        found(b"\x0a\x01m\x2a" + bytes([len(tensor)]) + tensor)
