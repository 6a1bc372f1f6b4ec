"""wire.peek.KnownHeads against its judge, the plain functions.

Invariant: whatever came before, a head is what the plain function says of the same bytes, or the same error is raised.
"""

from __future__ import annotations

from damaged import outcome, rows
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from gateway.wire import peek

raws = st.lists(st.sampled_from([b"", b"raw", bytes(200), bytes(20_000)]), max_size=3)


def request(name: str, version: str, id: str, parameter: bool, raw: list[bytes]) -> bytes:
    message = pb.ModelInferRequest(model_name=name, model_version=version, id=id, raw_input_contents=raw)
    message.inputs.add(name="x", datatype="FP32", shape=[1])
    if parameter:
        message.parameters["sequence_start"].bool_param = True
    return bytes(message.SerializeToString())


names, versions, ids = st.sampled_from(["m", "model", ""]), st.sampled_from(["", "1"]), st.sampled_from(["", "", "7"])
requests = st.builds(request, names, versions, ids, st.booleans(), raws)


@settings(max_examples=400, deadline=None)
@given(rows(requests))
@example([request("m", "", "", False, [b"a"]), request("m", "", "", False, [b"b"])])
@example([request("m", "", "", False, [b"abc"]), request("m", "", "", True, [b""])])
def test_a_head_is_the_plain_one_whatever_came_before(row: list[bytes]) -> None:
    heads = peek.KnownHeads(peek.peek_request, peek.RAW_INPUT)
    for body in [*row, *row]:
        found = outcome(heads.peek, body)
        assert found == outcome(peek.peek_request, body)
        if isinstance(found, peek.Head):
            plain = peek.peek_request(body)
            for name in ("other", "another"):
                expected = peek.rename_request(body, plain, model_name=name)
                assert peek.rename_request(body, found, model_name=name) == expected


def test_messages_that_differ_in_their_tensors_share_a_head() -> None:
    heads = peek.KnownHeads(peek.peek_request, peek.RAW_INPUT)
    first, second = (heads.peek(request("m", "", "", True, [raw])) for raw in (b"abc", b"xyz"))
    assert second is first


def test_models_whose_messages_have_one_size_do_not_push_each_other_out() -> None:
    heads = peek.KnownHeads(peek.peek_request, peek.RAW_INPUT)
    one, other = request("m", "", "", False, [b"abc"]), request("mm", "", "", False, [b"ab"])
    assert len(one) == len(other)
    known = heads.peek(one), heads.peek(other)
    assert [heads.peek(one) is known[0], heads.peek(other) is known[1]] == [True, True]


def test_what_callers_choose_is_kept_within_bounds() -> None:
    heads = peek.KnownHeads(peek.peek_request, peek.RAW_INPUT)
    for number in range(3000):
        heads.peek(request(f"model-{number}", "", "", False, [bytes(number)]))
        assert len(heads) <= 2 * 1024
    before = len(heads)
    heads.peek(request("m" * 1024, "", "", False, [b"x"]))
    heads.peek(request("m", "", "an id of its own", False, [b"x"]))
    assert len(heads) == before
