"""v2 (pure): does a request name shared memory, that is, memory of the server's own host, for one of its tensors?

Only what protobuf itself would read as such a parameter counts: contents of tensors may have the same bytes.
Field numbers: grpc_service.proto (triton-inference-server/common).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gateway.v2.peek import MAX_FIELDS, RAW_INPUT, fields, is_raw

RESERVED: Final = "gateway-tensors."
"""How the names begin of the regions that gateways share with their Tritons; the rest of a name can't be guessed."""

_BEGINNING: Final = b"shared_memory"
_INPUT, _REQUESTED_OUTPUT = 0x2A, 0x32
_PARAMETERS: Final = {
    _INPUT: 0x22,
    _REQUESTED_OUTPUT: 0x12,
}  # field 4 of InferInputTensor, 2 of InferRequestedOutputTensor
_KEY: Final = 0x0A


def is_reserved(name: str) -> bool:
    """Is it the name, or the key, of a region that only gateways may use?"""
    return name.lstrip("/").startswith(RESERVED)


def uses_shared_memory(body: bytes, raw_at: int) -> bool:
    """body: a whole ModelInferRequest. raw_at: where its raw tensors begin, if they do (`Head.raw`).

    :raises MalformedMessage: if a tensor is no message, which it is only looked for if the words are somewhere in it.
    """
    end = raw_at if is_raw(body, raw_at, RAW_INPUT) else len(body)
    if body.find(_BEGINNING, 0, end) < 0:
        return False
    return any(key.startswith(_BEGINNING) for key in _keys(body, end))


def _keys(body: bytes, end_of_tensors: int) -> Iterator[bytes]:
    """The names of the parameters of all tensors. Of a key that is written twice each counts, to be safe."""
    for tag, _, begin, end in fields(body, 0, end_of_tensors, MAX_FIELDS):
        wanted = _PARAMETERS.get(tag)
        if wanted is None or _BEGINNING not in body[begin:end]:
            continue
        for inner, _, at, stop in fields(body, begin, end, MAX_FIELDS):
            if inner == wanted:
                yield from (body[b:e] for key, _, b, e in fields(body, at, stop, MAX_FIELDS) if key == _KEY)
