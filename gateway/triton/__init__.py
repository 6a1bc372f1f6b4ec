"""The local Triton: its pinned files, its process, and the models that it can serve. See `server.LocalTriton`."""

from gateway.triton.host import TRITON, LocalTritonError, UnsuitableHost, has_gpu, install
from gateway.triton.server import LocalTriton, PortTaken, StartFailed

__all__ = [
    "TRITON",
    "LocalTriton",
    "LocalTritonError",
    "PortTaken",
    "StartFailed",
    "UnsuitableHost",
    "has_gpu",
    "install",
]
