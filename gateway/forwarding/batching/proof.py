"""Whether a model's requests can be merged, and which requests may be merged with each other. Pure.

A model is merged only if its config and metadata prove that every tensor has a batch axis whose rows are independent.
Sources: Triton's model_config.proto and grpc_service.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gateway.rpc.metadata import Fields
from gateway.v2.layout import Layout

PER_CALL: Final = frozenset({
    b"x-request-id", b"request-id", b"x-correlation-id", b"correlation-id",
    b"traceparent", b"tracestate", b"baggage", b"b3", b"uber-trace-id", b"x-cloud-trace-context", b"x-amzn-trace-id",
    b"x-real-ip", b"forwarded", b"via",
})  # fmt: skip
"""Metadata keys whose values differ from call to call, and that Triton does not read."""
PER_CALL_PREFIXES: Final = (b"x-b3-", b"x-datadog-", b"x-envoy-", b"x-forwarded-")

_PASSES: Final = b"triton-grpc-protocol-"
"""Prefix of the keys of `--grpc-restricted-protocol`: no request may use the key that another caller has."""


def why_not(config: Any, metadata: Any) -> str:
    """Why a model's requests can't be merged; "" if it is proven that they can.

    config, metadata: its ModelConfig and ModelMetadataResponse (Any: protobuf classes carry no types).
    """
    inputs, outputs = config.input, config.output
    shapes = [tensor.shape for tensor in [*metadata.inputs, *metadata.outputs]]
    against = {
        "it does not batch": config.max_batch_size < 2,
        "its requests are parts of sequences": config.HasField("sequence_batching"),
        "it is decoupled": config.model_transaction_policy.decoupled,
        "it is an ensemble, whose models are not checked": config.HasField("ensemble_scheduling"),
        "it has a response cache, which looks up unmerged requests": config.response_cache.enable,
        "it has tensors for a whole batch (batch_input or batch_output)": bool(
            config.batch_input or config.batch_output
        ),
        "it has ragged inputs": any(tensor.allow_ragged_batch for tensor in inputs),
        "it has shape tensors": any(tensor.is_shape_tensor for tensor in [*inputs, *outputs]),
        "a tensor has no batch axis": not metadata.outputs or any(list(shape[:1]) != [-1] for shape in shapes),
    }
    return next((reason for reason, holds in against.items() if holds), "")


def fits(answer: Layout, outputs: Mapping[str, tuple[str, tuple[int, ...]]]) -> bool:
    """Does an answer match the model's metadata? outputs: datatype and shape by name, with the batch axis."""
    for part in answer.parts:
        declared = outputs.get(part.name)
        if declared is None:
            return False
        datatype, shape = declared
        if not part.element and datatype != "BYTES":
            continue  # the classification extension: the request decides the shape
        if len(part.dims) != len(shape) - 1:
            return False
        if any(size not in (-1, dim) for dim, size in zip(part.dims, shape[1:], strict=True)):
            return False
    return True


def carried(passed: Fields, keys: frozenset[str] | None, caller_key: bytes = b"") -> Fields:
    """The metadata that members of one batch must have in common, which the merged request has.

    passed:      the metadata that the request would have alone.
    keys:        `MergeSettings.metadata`.
    caller_key:  `MergeSettings.caller_key`, whose values must be equal also if it is one of `PER_CALL`.
    """
    if not passed:
        return ()
    if keys is not None:
        return tuple([field for field in passed if field[0].decode() in keys or field[0].startswith(_PASSES)])
    return tuple(
        [
            field
            for field in passed
            if (field[0] not in PER_CALL and not field[0].startswith(PER_CALL_PREFIXES)) or field[0] == caller_key
        ]
    )
