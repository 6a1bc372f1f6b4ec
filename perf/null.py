"""The null server: nginx that has Triton's answer to a ModelInfer in its config, and sends it at once.

It says how far the limit is: nothing that these callers call over a socket can be much faster for them. What is no
ModelInfer it passes on to Triton, except for ServerMetadata: its own names no extensions, so that perf_analyzer looks
for no statistics of requests that Triton never gets.
"""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2 as pb

from perf import models
from perf.children import Child

_SERVICE = "/inference.GRPCInferenceService/"

# nginx counts the requests of all its servers, so the status has a port of its own and is asked for seldom.
_CONFIG = b"""
daemon off;
worker_processes 1;
pid %(folder)s/nginx.pid;
error_log stderr warn;
events { worker_connections 8192; }
http {
  access_log off;
  default_type application/grpc;
  keepalive_requests 100000000;
  keepalive_timeout 1h;
  client_body_temp_path %(folder)s/body;
  proxy_temp_path %(folder)s/proxy;
  fastcgi_temp_path %(folder)s/fastcgi;
  uwsgi_temp_path %(folder)s/uwsgi;
  scgi_temp_path %(folder)s/scgi;
  server {
    listen 127.0.0.1:%(port)d http2;
    http2_max_concurrent_streams 1024;
    location / { grpc_pass grpc://127.0.0.1:%(triton)d; }
    location = %(service)sModelInfer { add_trailer grpc-status 0; return 200 "%(answer)s"; }
    location = %(service)sServerMetadata { add_trailer grpc-status 0; return 200 "%(metadata)s"; }
  }
  server {
    listen 127.0.0.1:%(status)d;
    location / { stub_status; }
  }
}
"""


def null_server(program: str, folder: Path, ports: tuple[int, int], triton: int) -> Child:
    """Its process, not yet entered. program: nginx. ports: gRPC, and nginx's status (HTTP)."""
    filled = {
        b"folder": str(folder).encode(),
        b"port": ports[0],
        b"status": ports[1],
        b"triton": triton,
        b"service": _SERVICE.encode(),
        b"answer": quoted(_framed(_answer(triton))),
        b"metadata": quoted(_framed(pb.ServerMetadataResponse(name="null server").SerializeToString())),
    }
    file = folder / "null.conf"
    file.write_bytes(_CONFIG % filled)
    return Child([program, "-p", str(folder), "-c", str(file), "-e", "stderr"], ports[0], folder / "null.log")


def answered(status: int) -> int:
    """Requests that it has answered since its start. status: the port of nginx's status."""
    with urllib.request.urlopen(f"http://127.0.0.1:{status}/", timeout=10) as response:
        return requests_in(response.read().decode())


def requests_in(status: str) -> int:
    """source: nginx, ngx_http_stub_status_module: a line of connections accepted and handled, and of requests."""
    found = re.search(r"^ \d+ \d+ (\d+) *$", status, re.MULTILINE)
    if found is None:
        raise ValueError(f"this is no status of nginx: {status!r}")
    return int(found[1])


def quoted(value: bytes) -> bytes:
    """As nginx reads it between double quotes. It would take `$` for the beginning of a variable, which fails."""
    return value.replace(b"\\", b"\\\\").replace(b'"', b'\\"')


def _framed(message: bytes) -> bytes:
    """A message as gRPC sends it: not compressed, with its length."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def _answer(triton: int) -> bytes:
    """What Triton answers to a request of the scenarios with tiny tensors."""
    request = pb.ModelInferRequest(model_name=models.TINY_A, raw_input_contents=[bytes(4 * models.TINY)])
    request.inputs.add(name="x", datatype="FP32", shape=[1, models.TINY])
    with grpc.insecure_channel(f"127.0.0.1:{triton}") as channel:
        infer = channel.unary_unary(f"{_SERVICE}ModelInfer")
        return bytes(infer(request.SerializeToString(), timeout=30))
