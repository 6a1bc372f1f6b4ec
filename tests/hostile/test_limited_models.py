"""Who takes long over his own call keeps no place at a model whose calls are limited from others."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from frames import data, message
from processes import Served, gateway, head, request
from upstreams import INFER, FakeTriton, infer_request

CONFIG = """
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
telemetry: {{access_log: {{destination: none}}}}
upstreams: {{main: {{endpoints: ["127.0.0.1:{port}"]}}}}
models:
  m: {{variants: {{only: {{upstream: main, model: a, limit: 2}}}}}}
"""
SOON = (b"grpc-timeout", b"5S")


@pytest.fixture
def served() -> Iterator[Served]:
    """At most two calls at once."""
    with FakeTriton().served() as port, gateway(port, given=CONFIG) as running:
        assert running.ask(INFER, infer_request()).status == "0"
        yield running


@pytest.mark.parametrize("model", ["m", "a"], ids=["public", "direct"])
def test_slow_uploads_keep_no_places(served: Served, model: str) -> None:
    body = message(infer_request(size=400_000, model=model))
    uploads = [served.connect() for _ in range(3)]
    for upload in uploads:
        upload.send(head(INFER))
        for at in range(0, 98_304, 16_384):
            upload.send(data(1, body[at : at + 16_384]))
    over = threading.Event()

    def drip() -> None:
        for at in range(98_304, 200_000, 1_500):
            for upload in uploads:
                upload.send(data(1, body[at : at + 1_500]))
            if over.wait(0.5):
                return

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        assert {served.ask(INFER, infer_request(), SOON).status for _ in range(8)} == {"0"}
    finally:
        over.set()
        thread.join()
        for upload in uploads:
            upload.sock.close()


def test_slow_readers_keep_no_places(served: Served) -> None:
    readers = [served.connect(buffer=4096) for _ in range(3)]
    for reader in readers:
        reader.send(request(INFER, infer_request(id_="6000000")))
    try:
        assert {served.ask(INFER, infer_request(), SOON).status for _ in range(8)} == {"0"}
    finally:
        for reader in readers:
            reader.sock.close()
