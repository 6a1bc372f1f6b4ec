"""Pure: what must be equal in two requests so that one answer is right for both.

Everything that reaches Triton counts, by its bytes: version, parameters, inputs with datatype, shape and contents,
requested outputs with their parameters, and the metadata that goes along. The name is the public model's, whose table
the key is for; the variant that answers is beside it there. What does not count: the request's `id`, which each caller
gets back as his own, and metadata that differs from call to call by its nature (`carried`), which is not sent then.

Two serializers may write one request in two ways. Then it has two keys, which costs an execution and is never wrong.
The key is a SHA-256: callers choose the bytes, and who could make two requests collide would choose others' answers.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

from gateway.rpc.metadata import Fields
from gateway.v2.peek import Head

_SHARED_MEMORY: Final = b"shared_memory_"  # how the parameters begin that say where tensors are, which is no content
_SEQUENCE: Final = b"sequence_"


def maybe_key(body: bytes, head: Head, sent: Fields) -> bytes | None:
    """The key of a whole ModelInferRequest; None if its answer may be for nobody else.

    sent:  the metadata that goes upstream with it.

    None is for shared memory, whose contents are not in the request; for sequences, whose answers depend on those
    before; and for scalars in places where no serializer writes them. Contents that happen to hold one of the words go
    alone, too.
    """
    if head.strays or _SHARED_MEMORY in body or any(_SEQUENCE in entry for entry in head.entries):
        return None
    key = hashlib.sha256()
    _add(key, head.model_version.encode())
    for field in sent:
        _add(key, field[0])
        _add(key, field[1])
    key.update(b"\xff" * 8)  # no length: the metadata end here
    key.update(memoryview(body)[head.front :])
    return key.digest()


def _add(key: Any, part: bytes) -> None:
    key.update(len(part).to_bytes(8, "little"))
    key.update(part)
