"""Score the h2spec cases of the gateway's transport beside proxies that people know: `python tests/hostile/compare.py`.

Each proxy is run if it is installed (`haproxy`, `nghttpx`, `envoy` on PATH; for envoy also ENVOY=FILE), with one worker
and a plain gRPC server of grpcio behind it. Prints a Markdown table: the score of each, then every case that somebody
fails. `--seconds` is how long silence must last to count as no answer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
from frames import connect
from h2spec_cases import CASES, Case, Skip, run
from processes import target

HAPROXY = """
global
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend front
  bind 127.0.0.1:{port} proto h2
  default_backend back
backend back
  server only 127.0.0.1:{backend} proto h2
"""

ENVOY = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: front
          codec_type: HTTP2
          route_config:
            virtual_hosts:
            - {{name: all, domains: ["*"], routes: [{{match: {{prefix: "/"}}, route: {{cluster: back}}}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: back
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment:
      cluster_name: back
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {backend}}}}}}}
"""


def haproxy(program: str, folder: Path, port: int, backend: int) -> list[str]:
    file = folder / "haproxy.cfg"
    file.write_text(HAPROXY.format(port=port, backend=backend))
    return [program, "-db", "-q", "-f", str(file)]


def nghttpx(program: str, folder: Path, port: int, backend: int) -> list[str]:
    front, back = f"-f127.0.0.1,{port};no-tls", f"-b127.0.0.1,{backend};;proto=h2"
    return [
        program,
        front,
        back,
        "-n1",
        "--conf=/dev/null",
        "--accesslog-file=/dev/null",
        f"--errorlog-file={folder}/x",
    ]


def envoy(program: str, folder: Path, port: int, backend: int) -> list[str]:
    file = folder / "envoy.yaml"
    file.write_text(ENVOY.format(port=port, backend=backend))
    return [program, "-c", str(file), "--concurrency", "1", "--log-level", "off", "--disable-hot-restart"]


PROXIES: dict[str, Callable[[str, Path, int, int], list[str]]] = {
    "haproxy": haproxy,
    "nghttpx": nghttpx,
    "envoy": envoy,
}


@contextmanager
def backend() -> Iterator[int]:
    """A plain gRPC server that echoes."""
    echo = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_registered_method_handlers("inference.GRPCInferenceService", {"ServerLive": echo})
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


@contextmanager
def proxied(name: str, program: str, upstream: int) -> Iterator[int]:
    """Run a proxy; gives its port once it listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = PROXIES[name](program, Path(folder), port, upstream)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for _ in range(100):
                time.sleep(0.1)
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
            yield port
        finally:
            process.terminate()
            process.wait(10)


def score(port: int, case: Case, seconds: float) -> str:
    """Empty if it passed."""
    with connect(port) as peer:
        try:
            verdict = run(case, peer, seconds)
        except Skip as reason:
            return f"skipped: {reason}"
    return "" if verdict.passed else ", ".join(verdict.came[-3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    seconds = parser.parse_args().seconds
    programs = {name: os.environ.get(name.upper()) or shutil.which(name) for name in PROXIES}
    results: dict[str, dict[str, str]] = {}
    with ExitStack() as exits:
        upstream = exits.enter_context(backend())
        ports = {"gateway wire": exits.enter_context(target()).port}
        for name, program in programs.items():
            if program:
                ports[name] = exits.enter_context(proxied(name, program, upstream))
        for name, port in ports.items():
            results[name] = {case.id: score(port, case, seconds) for case in CASES}
    print_table(results)


def print_table(results: dict[str, dict[str, str]]) -> None:
    """results: by server, then by case, what came instead of what was wanted."""
    _print_row("case", "clause", "sent", *results)
    _print_row(*["---"] * (3 + len(results)))
    counts = [Counter(_verdict(of[case.id]) for case in CASES if "strict" not in case.id) for of in results.values()]
    for verdict in ("passed", "failed", "skipped"):
        _print_row(f"**{verdict}**", "", f"of {counts[0].total()}", *(str(count[verdict]) for count in counts))
    for case in CASES:
        came = [of[case.id] for of in results.values()]
        if any(came):
            _print_row(case.id, case.clause, case.sent, *(one or "ok" for one in came))


def _verdict(came: str) -> str:
    return "skipped" if came.startswith("skipped") else "failed" if came else "passed"


def _print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
