"""wire.repeats against its judge, the plain functions of wire.peek.

Invariant: whatever came before, a head is what the plain function says of the same bytes, or the same error is raised.
"""

from __future__ import annotations

from damaged import outcome, rows
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from gateway.wire.peek import bool_parameter, peek_request, peek_stream_response, rename_request, rename_stream_response
from gateway.wire.repeats import StreamRequestHeads, StreamResponseHeads

ids = st.sampled_from(["", "1", "22", "i" * 127, "i" * 128, "größe"])
raws = st.lists(st.sampled_from([b"", b"raw", bytes(200)]), max_size=3)


def request(name: str, version: str, id: str, parameter: bool, raw: list[bytes]) -> bytes:
    message = pb.ModelInferRequest(model_name=name, model_version=version, id=id, raw_input_contents=raw)
    message.inputs.add(name="x", datatype="FP32", shape=[1])
    if parameter:
        message.parameters["triton_enable_empty_final_response"].bool_param = True
    return bytes(message.SerializeToString())


def response(name: str, version: str, id: str, final: bool, raw: list[bytes]) -> bytes:
    message = pb.ModelInferResponse(model_name=name, model_version=version, id=id, raw_output_contents=raw)
    message.parameters["triton_final_response"].bool_param = final
    if raw:
        message.outputs.add(name="y", datatype="FP32", shape=[1])
    return bytes(pb.ModelStreamInferResponse(infer_response=message).SerializeToString())


names, versions = st.sampled_from(["m", "model", ""]), st.sampled_from(["", "1"])
requests = st.builds(request, names, versions, ids, st.booleans(), raws)
responses = st.builds(response, names, versions, ids, st.booleans(), raws)
errors = st.builds(lambda body: b"\x0a\x03bad" + body, responses)


@settings(max_examples=400, deadline=None)
@given(rows(requests))
@example([request("m", "", "1", True, [b"a"]), request("m", "", "2", True, [b"b"])])
@example([request("m", "", "1", False, [b"a"]) + bool_parameter("late", True), request("m", "", "2", False, [b"a"])])
def test_a_requests_head_is_the_plain_one_whatever_came_before(row: list[bytes]) -> None:
    heads = StreamRequestHeads()
    for body in row:
        found = outcome(heads.peek, body)
        assert found == outcome(peek_request, body)
        if not isinstance(found, tuple):
            expected = rename_request(body, peek_request(body), model_name="other", id="own")
            assert rename_request(body, found, model_name="other", id="own") == expected  # type: ignore[arg-type]


@settings(max_examples=400, deadline=None)
@given(rows(st.one_of(responses, errors)))
def test_an_answers_head_is_the_plain_one_whatever_came_before(row: list[bytes]) -> None:
    heads = StreamResponseHeads()
    for body in row:
        found = outcome(heads.peek, body)
        assert found == outcome(peek_stream_response, body)
        if not isinstance(found, tuple):
            expected = rename_stream_response(body, peek_stream_response(body), model_name="other", id="own")
            assert rename_stream_response(body, found, model_name="other", id="own") == expected  # type: ignore[arg-type]


def test_no_long_name_is_kept() -> None:
    heads = StreamRequestHeads()
    heads.peek(request("m" * 1024, "1", "i", True, [b"x"]))
    assert heads._last._head is None


def test_a_message_like_the_one_before_is_known_by_its_bytes() -> None:
    heads = StreamRequestHeads()
    first, second = (heads.peek(request("m", "1", id, True, [b"x"])) for id in ("1", "2"))
    assert (first.id, second.id) == ("1", "2")
    assert second.entries is first.entries
