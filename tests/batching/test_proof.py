"""What a model must have said of itself before anything of it is merged, and who may travel with whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.batching import Layout, Layouts, carried, fits, why_not
from gateway.rpc.metadata import Fields
from gateway.v2.peek import peek_response


def described() -> tuple[Any, Any]:
    """The config and metadata of a model that can be merged."""
    config = model_config_pb2.ModelConfig(name="m", max_batch_size=8)
    config.input.add(name="IN", dims=[2])
    config.output.add(name="OUT", dims=[-1])
    metadata = pb.ModelMetadataResponse(name="m", versions=["1"])
    metadata.inputs.add(name="IN", datatype="FP32", shape=[-1, 2])
    metadata.outputs.add(name="OUT", datatype="FP32", shape=[-1, -1])
    return config, metadata


def test_a_plain_batching_model_can_be_merged() -> None:
    assert why_not(*described()) == ""


AGAINST: dict[str, Callable[[Any, Any], object]] = {
    "no batching": lambda config, _: setattr(config, "max_batch_size", 0),
    "batches of one": lambda config, _: setattr(config, "max_batch_size", 1),
    "sequences": lambda config, _: config.sequence_batching.SetInParent(),
    "decoupled": lambda config, _: setattr(config.model_transaction_policy, "decoupled", True),
    "ensemble": lambda config, _: config.ensemble_scheduling.SetInParent(),
    "response cache": lambda config, _: setattr(config.response_cache, "enable", True),
    "batch input": lambda config, _: config.batch_input.add(),
    "batch output": lambda config, _: config.batch_output.add(target_name=["OUT"]),
    "ragged": lambda config, _: setattr(config.input[0], "allow_ragged_batch", True),
    "shape tensor in": lambda config, _: setattr(config.input[0], "is_shape_tensor", True),
    "shape tensor out": lambda config, _: setattr(config.output[0], "is_shape_tensor", True),
    "input of fixed rows": lambda _, metadata: metadata.inputs[0].shape.__setitem__(0, 8),
    "output of fixed rows": lambda _, metadata: metadata.outputs[0].shape.__setitem__(0, 8),
    "output without axes": lambda _, metadata: metadata.outputs[0].ClearField("shape"),
    "no outputs told": lambda _, metadata: metadata.ClearField("outputs"),
}


@pytest.mark.parametrize("change", AGAINST.values(), ids=AGAINST)
def test_a_model_whose_rows_may_not_be_its_callers_is_not_merged(change: Callable[[Any, Any], object]) -> None:
    config, metadata = described()
    change(config, metadata)
    assert why_not(config, metadata)


def answer(*, shape: tuple[int, ...] = (3, 2), name: str = "OUT", **parameters: Any) -> pb.ModelInferResponse:
    message = pb.ModelInferResponse(model_name="m", model_version="1")
    message.outputs.add(name=name, datatype="UINT8", shape=shape)
    size = 1
    for dim in shape:
        size *= dim
    message.raw_output_contents.append(bytes(size))
    for key, value in parameters.items():
        setattr(message.parameters[key], f"{type(value).__name__}_param".replace("int_", "int64_"), value)
    return message


def read(message: pb.ModelInferResponse) -> Layout | None:
    body = message.SerializeToString()
    found = Layouts(pb.ModelInferResponse).maybe_read(body, peek_response(body))
    return found[0] if found else None


def test_an_answer_of_rows_can_be_divided() -> None:
    assert read(answer()) is not None
    assert read(answer(triton_final_response=True)) is not None  # true of each part


def whole() -> dict[str, pb.ModelInferResponse]:
    of_an_output, unknown, inside = answer(), answer(), answer()
    of_an_output.outputs[0].parameters["x"].bool_param = True
    unknown.MergeFromString(b"\xf2\x06\x03new")
    inside.outputs[0].MergeFromString(b"\xf2\x06\x03new")
    shared = answer()
    shared.outputs[0].parameters["shared_memory_region"].string_param = "r"
    return {
        "a parameter": answer(rows=3),
        "a parameter of an output": of_an_output,
        "not the last answer": answer(triton_final_response=False),
        "an unknown field": unknown,
        "an unknown field of an output": inside,
        "shared memory": shared,
    }


@pytest.mark.parametrize("message", whole().values(), ids=whole())
def test_what_is_said_of_the_whole_is_not_divided(message: pb.ModelInferResponse) -> None:
    assert read(message) is None


@pytest.mark.parametrize(
    ("message", "does"),
    [
        (answer(), True),
        (answer(shape=(3, 5)), True),
        (answer(shape=(3,)), False),
        (answer(shape=(3, 2, 1)), False),
        (answer(name="OTHER"), False),
    ],
    ids=["rows", "other columns", "a rank less", "a rank more", "another output"],
)
def test_an_answer_must_be_what_the_metadata_say(message: pb.ModelInferResponse, does: bool) -> None:
    layout = read(message)
    assert layout is not None
    assert fits(layout, {"OUT": ("UINT8", (-1, -1))}) is does


def test_a_fixed_dimension_must_be_that_one() -> None:
    layout = read(answer())
    assert layout is not None
    assert fits(layout, {"OUT": ("UINT8", (-1, 2))})
    assert not fits(layout, {"OUT": ("UINT8", (-1, 3))})


FIELDS: Fields = (
    (b"x-request-id", b"7"),
    (b"traceparent", b"00"),
    (b"x-forwarded-for", b"a"),
    (b"authorization", b"b"),
    (b"x-tenant", b"c"),
    (b"triton-grpc-protocol-inference", b"key"),
)


def test_by_default_all_metadata_must_be_equal_but_that_of_single_calls() -> None:
    assert [name for name, _ in carried(FIELDS, None)] == [
        b"authorization",
        b"x-tenant",
        b"triton-grpc-protocol-inference",
    ]


def test_the_name_that_the_gateway_gives_a_caller_keeps_callers_apart_under_any_key() -> None:
    told = (*FIELDS, (b"x-forwarded-user", b"ada"))
    assert (b"x-forwarded-user", b"ada") not in carried(told, None)
    assert carried(told, None, b"x-forwarded-user")[-1] == (b"x-forwarded-user", b"ada")
    assert (b"x-forwarded-for", b"a") not in carried(told, None, b"x-forwarded-user")


def test_nobody_travels_on_anothers_key_for_a_restricted_protocol_whatever_the_config_lists() -> None:
    assert [name for name, _ in carried(FIELDS, frozenset({"x-request-id"}))] == [
        b"x-request-id",
        b"triton-grpc-protocol-inference",
    ]
    assert carried((), frozenset({"x-request-id"})) == ()
