"""A process that may open no more files: callers are refused and told, whoever asks how it is gets an answer."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
from command_line import command, free_address
from patience import ask_until
from traffic import http
from v2_calls import call, channel_to, infer

from gateway.triton import LocalTriton

CONFIG = """
listen: {listen}
admin: {{listen: "127.0.0.1:0"}}
upstreams: {{one: {{endpoints: ["{triton}"]}}}}
models: {{adder: {{variants: {{only: {{upstream: one, model: add_one_a}}}}}}}}
server: {{max_connections: {most}}}
"""
LIMIT = 160


@contextlib.contextmanager
def storm(address: str, connections: int) -> Iterator[list[socket.socket]]:
    """That many connections at once, which say nothing."""
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as exits:
        sockets = [exits.enter_context(socket.socket()) for _ in range(connections)]
        for each in sockets:
            each.setblocking(False)
            each.connect_ex((host, int(port)))
        yield sockets


async def refused(admin: str, reason: str) -> int:
    _, text = await http(admin, "/metrics")
    found = re.search(rf'^gateway_connections_refused_total\{{reason="{reason}"\}} (\S+)$', text, re.M)
    return int(float(found[1])) if found else 0


async def test_out_of_descriptors_calls_go_on_and_health_answers(triton: LocalTriton, tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text(CONFIG.format(listen=free_address(), triton=triton.grpc_address, most=10_000))
    arguments = ("serve", "--config", str(file))
    async with command(*arguments, folder=tmp_path, descriptors=LIMIT) as running:
        address, admin = await running.until_serving()
        assert f"this process may open {LIMIT} files" in running.errors
        async with channel_to(address) as channel:
            assert (await call(channel, infer("adder"))).code is grpc.StatusCode.OK
            for _ in range(3):
                with storm(address, 400):
                    for _ in range(5):
                        assert (await http(admin, "/healthz"))[0] == 200
                        assert (await call(channel, infer("adder"))).code is grpc.StatusCode.OK
            assert await refused(admin, "descriptors") > 400
        async with channel_to(address) as later:
            # The others' descriptors are free once their end was heard of.
            await ask_until(lambda: call(later, infer("adder")), lambda outcome: outcome.code is grpc.StatusCode.OK)
        assert running.errors.count("connections were refused") == 1
        assert "no file descriptors left" in running.errors
        assert "Traceback" not in running.errors


async def test_connections_beyond_the_most_are_counted_and_told_once(triton: LocalTriton, tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text(CONFIG.format(listen=free_address(), triton=triton.grpc_address, most=5))
    async with command("serve", "--config", str(file), folder=tmp_path) as running:
        address, admin = await running.until_serving()
        with storm(address, 30):
            assert await ask_until(lambda: refused(admin, "max_connections"), lambda count: count >= 25) == 25
        assert running.errors.count("connections were refused") == 1
        assert "max_connections is 5" in running.errors


async def test_the_soft_limit_is_raised_to_what_connections_need(triton: LocalTriton, tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text(CONFIG.format(listen=free_address(), triton=triton.grpc_address, most=300))
    async with command("serve", "--config", str(file), folder=tmp_path, descriptors=(LIMIT, 2000)) as running:
        address, admin = await running.until_serving()
        with storm(address, 250):
            await asyncio.sleep(0.3)
            assert await refused(admin, "descriptors") == 0
        assert "files and sockets" not in running.errors
