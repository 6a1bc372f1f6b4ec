"""What all services of the gateway declare, as one descriptor set: for grpcurl, Postman and code generators."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_health.v1 import health_pb2
from tritonclient.grpc import service_pb2

_OURS: Final = "gateway.binpb"  # made with the modules of gateway/v1; unlike those it has the comments


def descriptor_set() -> bytes:
    """A `google.protobuf.FileDescriptorSet`: gateway.v1 with its comments, the V2 protocol and health, with imports.

    :raises OSError: if the package was installed without gateway.v1.
    """
    declared = FileDescriptorSet.FromString((files("gateway.v1") / _OURS).read_bytes())
    known = {file.name for file in declared.file}
    for file in _with_imports([service_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR]):
        if file.name not in known:
            known.add(file.name)
            declared.file.append(FileDescriptorProto.FromString(file.serialized_pb))
    return bytes(declared.SerializeToString(deterministic=True))


def _with_imports(declared: Iterable[Any]) -> Iterable[Any]:
    """Each file after those that it imports. Any: `FileDescriptor`, of which there are several implementations."""
    for file in declared:
        yield from _with_imports(file.dependencies)
        yield file
