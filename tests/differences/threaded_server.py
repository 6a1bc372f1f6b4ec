"""Triton's ModelInfer on grpcio's server of threads: `python threaded_server.py PORT`.

It outlives whatever a proxy passes on to it. A server on grpc.aio, as `perf.scripted_server` is, does not: one call
whose :path is not UTF-8 ends the loop by which it takes calls, and then it listens no more (grpcio 1.85).
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def ModelInfer(self, request: Any, context: Any) -> Any:
        return pb.ModelInferResponse(model_name=request.model_name, id=request.id)


def main(port: str) -> None:
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main(*sys.argv[1:])
