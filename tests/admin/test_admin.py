"""The admin plane over real HTTP, on a port and on a unix socket."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import threading
import time

import aiohttp
import grpc
import h2.config
import h2.connection
import h2.errors
import h2.events
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_prometheus

from gateway.admin import Admin, CannotListen, ConfigHistory
from gateway.hooks import ConfigChanged
from gateway.telemetry.metrics import Metrics, MetricsSettings


class Source(ConfigHistory):
    """The gateway's state, set by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.reasons = True, []

    def is_live(self):
        return self.live

    def readiness(self):
        return not self.reasons, self.reasons

    def state(self):
        return {"ready": True, "models": {}, "upstreams": {"cpu": []}}


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def scrape():
    return Metrics(MetricsSettings("1.2.3")).scrape


@pytest.fixture
async def get(source, scrape):
    """GET on a running admin plane: status, headers, and JSON or text."""
    async with Admin(source, "127.0.0.1:0", scrape.render) as admin, aiohttp.ClientSession() as session:

        async def get(path, **headers):
            async with session.get(f"http://{admin.address}{path}", headers=headers) as answer:
                body = await (answer.json() if answer.content_type == "application/json" else answer.text())
                return answer.status, answer.headers, body

        yield get


async def test_healthz_says_whether_the_process_should_be_restarted(get, source):
    assert (await get("/healthz"))[::2] == (200, {"live": True})
    source.live = False
    assert (await get("/healthz"))[::2] == (503, {"live": False})


async def test_readyz_names_what_is_not_ready(get, source):
    assert (await get("/readyz"))[::2] == (200, {"ready": True, "reasons": []})
    source.reasons = ["model 'photos': no endpoint of 'gpu' or 'cpu' is ready"]
    assert (await get("/readyz"))[::2] == (503, {"ready": False, "reasons": source.reasons})


async def test_health_does_not_depend_on_readiness(get, source):
    source.reasons = ["draining"]
    assert (await get("/healthz"))[0] == 200


@pytest.mark.parametrize(
    ("accept", "content_type", "parse"),
    [
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text", parse_openmetrics),
        ("text/plain;version=0.0.4", "text/plain", parse_prometheus),
        ("*/*", "text/plain", parse_prometheus),
    ],
)
async def test_metrics_come_in_the_format_that_is_accepted(accept, content_type, parse, get):
    status, headers, body = await get("/metrics", Accept=accept)
    assert status == 200
    assert headers["Content-Type"].startswith(content_type)
    assert "charset=utf-8" in headers["Content-Type"]
    assert "gateway_build_info" in " ".join(family.name for family in parse(body))


async def test_a_slow_scrape_does_not_hold_up_the_loop(source):
    """A health check is answered while a scrape is being made."""
    entered, release = threading.Event(), threading.Event()

    def render(accept):
        entered.set()
        assert release.wait(30)
        return b"", "text/plain"

    async with Admin(source, "127.0.0.1:0", render) as admin, aiohttp.ClientSession() as session:
        scraping = asyncio.create_task(session.get(f"http://{admin.address}/metrics"))
        assert await asyncio.to_thread(entered.wait, 30)
        async with session.get(f"http://{admin.address}/healthz") as answer:
            assert answer.status == 200
        assert not scraping.done()
        release.set()
        async with await scraping as answer:
            assert answer.status == 200


async def test_config_shows_what_is_in_force_and_why_the_last_one_was_refused(get, source):
    assert (await get("/config"))[2] == {"current": None, "last_refused": None, "changes": []}
    source.config_changed(ConfigChanged("gateway.yaml", "d1", True, (), 1.0))
    source.config_changed(ConfigChanged("gateway.yaml", "d2", False, ("line 3: 'weigth' is unknown",), 2.0))
    _, _, body = await get("/config")
    assert (body["current"]["digest"], body["current"]["source"]) == ("d1", "gateway.yaml")
    assert body["last_refused"]["findings"] == ["line 3: 'weigth' is unknown"]
    assert [change["accepted"] for change in body["changes"]] == [False, True]


async def test_config_keeps_the_latest_changes_only(get, source):
    for number in range(50):
        source.config_changed(ConfigChanged("gateway.yaml", f"d{number}", True, (), 1.0))
    changes = (await get("/config"))[2]["changes"]
    assert [change["digest"] for change in changes] == [f"d{number}" for number in range(49, 29, -1)]


async def test_state_is_shown_as_it_is_now(get, source):
    status, headers, body = await get("/state")
    assert status == 200
    assert body == {**source.state(), "attention": body["attention"]}
    (notice,) = body["attention"]
    assert (notice["kind"], notice["name"], notice["severity"]) == ("upstream", "cpu", "error")
    assert headers["Cache-Control"] == "no-store"


async def test_nothing_else_is_served(get):
    assert (await get("/page"))[0] == 404
    assert (await get("/models"))[0] == 404


async def test_a_fault_of_our_own_is_still_told(source, scrape, caplog):
    async with Admin(source, "127.0.0.1:0", scrape.render) as admin, aiohttp.ClientSession() as session:
        source.live = property()  # what can't be shown as JSON
        async with session.get(f"http://{admin.address}/healthz") as answer:
            assert answer.status == 500
    (record,) = caplog.records
    assert record.exc_info


async def test_nothing_can_be_changed(source, scrape):
    async with Admin(source, "127.0.0.1:0", scrape.render) as admin, aiohttp.ClientSession() as session:
        for path in ("/healthz", "/readyz", "/metrics", "/config", "/state"):
            async with session.post(f"http://{admin.address}{path}") as answer:
                assert answer.status == 405


@pytest.mark.parametrize("pieces", [[24], [1, 23], [10, 14]], ids=["whole", "one byte first", "in two parts"])
async def test_an_http2_client_is_told_which_protocol_is_spoken(source, scrape, caplog, pieces):
    """As a gRPC client begins that was given the admin port: RFC 9113's preface and SETTINGS."""
    client = h2.connection.H2Connection()
    client.initiate_connection()
    data = client.data_to_send()
    async with Admin(source, "127.0.0.1:0", scrape.render) as admin:
        host, _, port = admin.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        for piece in [*pieces, len(data)]:
            writer.write(data[:piece])
            data = data[piece:]
            await writer.drain()
            await asyncio.sleep(0.01)
        events = client.receive_data(await reader.read())
        writer.close()
    (ended,) = events  # no SETTINGS: C-core would take them for a success
    assert isinstance(ended, h2.events.ConnectionTerminated)
    assert ended.error_code == h2.errors.ErrorCodes.HTTP_1_1_REQUIRED
    assert b"admin plane" in ended.additional_data
    assert not caplog.records


async def test_a_grpc_client_with_the_wrong_port_comes_again_ever_more_slowly(source, scrape):
    """Its pauses grow only while no connection is a success, which C-core takes the first SETTINGS for."""
    came = 0
    async with Admin(source, "127.0.0.1:0", scrape.render) as admin:
        host, _, port = admin.address.rpartition(":")

        async def passed_on(reader, writer):
            nonlocal came
            came += 1
            inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
            inner_writer.write(await reader.read(1 << 16))
            writer.write(await inner_reader.read())
            writer.close()
            inner_writer.close()

        async with await asyncio.start_server(passed_on, "127.0.0.1", 0) as counted:
            address = f"127.0.0.1:{counted.sockets[0].getsockname()[1]}"
            began = time.monotonic()
            async with grpc.aio.insecure_channel(address) as channel:
                call = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
                for _ in range(3):
                    with pytest.raises(grpc.aio.AioRpcError):
                        await call(b"", timeout=0.5)
                    await asyncio.sleep(0.2)
            seconds = time.monotonic() - began  # 2.1, or more on a busy machine
    assert 1 <= came <= 2 + seconds  # after 1 s, 1.6 s, …


@pytest.mark.parametrize(
    "sent",
    [b"GET / HTTP/1.1\r\nno header\r\n\r\n", b"\x16\x03\x01\x00\xf4\x01\x00\x00\xf0", b"PRI\r\n\r\n", b"P" * 20_000],
    ids=["a broken header", "TLS", "nearly HTTP/2", "a long line"],
)
async def test_what_is_no_http_is_refused_without_a_stack_in_the_log(source, scrape, caplog, sent):
    async with Admin(source, "127.0.0.1:0", scrape.render) as admin:
        host, _, port = admin.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent + b"\r\n\r\n")
        assert b" 400 " in await asyncio.wait_for(reader.readline(), 60)
        writer.close()
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")]


async def test_a_worker_is_asked_over_a_unix_socket(source, scrape, tmp_path):
    path = tmp_path / "worker-0.sock"
    connector = aiohttp.UnixConnector(str(path))
    async with Admin(source, f"unix:{path}", scrape.render) as admin:
        assert admin.address == f"unix:{path}"
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        async with aiohttp.ClientSession(connector=connector) as session, session.get("http://admin/readyz") as answer:
            assert await answer.json() == {"ready": True, "reasons": []}
    assert not path.exists()


async def test_a_socket_left_by_a_killed_process_is_replaced(source, scrape, tmp_path):
    path = tmp_path / "worker-0.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with Admin(source, f"unix:{path}", scrape.render):
        pass


async def test_nothing_listens_before_entering_and_after_leaving(source, scrape):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    admin = Admin(source, f"127.0.0.1:{port}", scrape.render)
    async with aiohttp.ClientSession() as session:
        for _ in range(2):
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.get(f"http://127.0.0.1:{port}/healthz")
            async with admin, session.get(f"http://127.0.0.1:{port}/healthz") as answer:
                assert answer.status == 200


async def test_a_taken_port_is_a_clear_error(source, scrape):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(CannotListen, match=f"the admin address {address} is taken by another process"):
            async with Admin(source, address, scrape.render):
                pass


async def test_a_folder_that_does_not_exist_is_a_clear_error(source, scrape, tmp_path):
    with pytest.raises(CannotListen, match=r"cannot listen on unix:.*no/admin\.sock"):
        async with Admin(source, f"unix:{tmp_path}/no/admin.sock", scrape.render):
            pass


@pytest.mark.parametrize("listen", ["", "9000", ":9000", "host:", "host:http", "host:70000", "unix:"])
def test_an_address_that_is_none_says_how_to_write_one(listen, source, scrape):
    with pytest.raises(ValueError, match=r"write HOST:PORT, \[IPV6\]:PORT or unix:PATH"):
        Admin(source, listen, scrape.render)


async def test_ipv6_is_written_in_brackets(source, scrape):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with Admin(source, "[::1]:0", scrape.render) as admin, aiohttp.ClientSession() as session:
        assert admin.address.startswith("[::1]:")
        async with session.get(f"http://{admin.address}/healthz") as answer:
            assert answer.status == 200


async def test_the_page_may_run_its_own_scripts_and_nothing_else(get):
    status, headers, body = await get("/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "script-src 'self'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    for path in (
        "/page/page.js",
        "/page/dom.js",
        "/page/plots.js",
        "/page/sections.js",
        "/page/page.css",
        "/page/icon.svg",
    ):
        assert (await get(path))[0] == 200, path
    assert (await get("/page/../server.py"))[0] == 404
    assert "http://" not in body
    assert "https://" not in body
