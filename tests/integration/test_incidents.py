"""The incidents of docs/operations.md, caused on processes: what an operator is told to look for is there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import pytest
from certificates import Authority, read
from command_line import Command, command, run
from patience import ask_until
from prometheus_client.parser import text_string_to_metric_families
from runbook import as_the_page_says, incidents, needs_tools, of_kubernetes, unknown_to_kubectl
from traffic import OK, config, http, traffic, until, write
from triton_fixture import FAST_START
from v2_calls import Outcome, call, channel_to, infer, numbers

from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

BIN = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

MODELS = {
    "adder": {
        "variants": {
            "fp32": {"upstream": "gpu", "model": "add_one_a"},
            "int8": {"upstream": "cpu", "model": "add_one_b"},
        }
    },
    "speech": {"variants": {"only": {"upstream": "gpu", "model": "accumulate"}}},
    "embed": {"variants": {"only": {"upstream": "cpu", "model": "slow"}}},
    "broken": {"variants": {"new": {"upstream": "cpu", "model": "fails"}}},
}


@dataclass
class Site:
    """A gateway in a process of its own, with what it tells."""

    process: Command
    listen: str
    admin: str
    file: Path

    async def attention(self) -> set[str]:
        _, state = await http(self.admin, "/state")
        return {f"{each['severity']} {each['name']}: {each['text']}" for each in state["attention"]}

    async def until_attention(self, *expected: str) -> None:
        """Wait until all of it is told; a process is looked at from outside."""
        await ask_until(self.attention, lambda told: {*expected} <= told)

    async def metric(self, name: str, **labels: str) -> float:
        """The sum over the series with these labels."""
        _, text = await http(self.admin, "/metrics")
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    async def runs(self, incident: str, names: Mapping[str, str] = MappingProxyType({})) -> None:
        """The commands of the page print what it says. names: what is called otherwise here, by its name there."""
        log = self.process.errors + self.process.output
        await as_the_page_says(incident, self.admin, self.file.parent, names, log=log)

    def access(self, **values: Any) -> list[dict[str, Any]]:
        """The lines of the access log with these values."""
        lines = [json.loads(line) for line in self.process.output.splitlines() if line.startswith("{")]
        return [line for line in lines if values.items() <= line.items()]


@pytest.fixture(scope="module")
async def gpu(triton_repository: Path) -> AsyncIterator[LocalTriton]:
    """The pool that things happen to."""
    server = LocalTriton(triton_repository, models=["add_one_a", "accumulate"], extra=FAST_START)
    await server.start()
    yield server
    await server.kill()
    await server.aclose()


@contextlib.asynccontextmanager
async def serving(folder: Path, upstreams: dict[str, Any], models: dict[str, Any], **more: Any) -> AsyncIterator[Site]:
    content = config(upstreams, models, **{"telemetry": {"access_log": {"destination": "stdout"}}, **more})
    file = write(folder / "gateway.yaml", content)
    async with command("serve", "--config", str(file), folder=folder) as process:
        listen, admin = await process.until_serving()
        yield Site(process, listen, admin, file)


@pytest.fixture(scope="module")
async def site(gpu: LocalTriton, triton: LocalTriton, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A GPU pool and a CPU pool."""
    upstreams = {"gpu": gpu.grpc_address, "cpu": triton.grpc_address}
    folder = tmp_path_factory.mktemp("site")
    async with serving(folder, upstreams, MODELS, server={"default_deadline": "1s"}) as running:
        yield running


async def gpu_endpoint(site: Site) -> dict[str, Any]:
    _, state = await http(site.admin, "/state")
    [endpoint] = state["upstreams"]["gpu"]
    return dict(endpoint)


async def until_ready(site: Site) -> None:
    await ask_until(lambda: gpu_endpoint(site), lambda endpoint: endpoint["state"] == "ready")


async def test_gateways_gone(triton: LocalTriton, tmp_path: Path) -> None:
    """Nobody is there, for callers and for scrapes; back is back at once, but not with a file that it would refuse."""
    file, models = tmp_path / "gateway.yaml", {"adder": MODELS["adder"]}
    for life in ("killed", "started again"):
        upstreams = dict.fromkeys(("gpu", "cpu"), triton.grpc_address)
        async with serving(tmp_path, upstreams, models) as site:
            async with channel_to(site.listen) as channel:
                assert (await call(channel, infer("adder"))).code is OK, life
            assert await site.metric("gateway_build_info") == 1  # what GatewaysGone looks at
            site.process.signal(signal.SIGKILL)
            await site.process.wait()
            async with channel_to(site.listen) as channel:
                gone = await call(channel, infer("adder"))
            assert (gone.code.name, "Connection refused" in gone.text) == ("UNAVAILABLE", True)
            with pytest.raises(OSError, match="Cannot connect"):
                await http(site.admin, "/metrics")
            await site.runs("gateways-gone")
    file.write_text(file.read_text().replace("upstream: cpu", "upstream: cpuu"))
    code, _, errors = await run("serve", "--config", str(file), folder=tmp_path)
    assert (code, "models.adder.variants.int8.upstream: no upstream 'cpuu'" in errors) == (2, True)


async def test_gpu_pool_gone(site: Site, gpu: LocalTriton) -> None:
    """Every call on its fallback counts and has a line; the state and the log name pool, variant and reason."""
    endpoint = f"gpu/{gpu.grpc_address}"
    async with traffic(site.listen) as calls:
        await calls.more(20)
        await gpu.kill()
        try:
            await site.until_attention(
                "error gpu: every endpoint is down",
                "error speech: no variant can answer",
                "warning adder: variant fp32 (100%) is unavailable; its calls fall back to another",
                f"warning {endpoint}: is down: Failed to connect: Connection refused",
            )
            await site.runs("gpu-pool-gone", {"imagenet": "adder"})
            before = await site.metric("gateway_fallbacks_total", from_variant="fp32", variant="int8")
            await calls.more(50)
            assert await site.metric("gateway_fallbacks_total", from_variant="fp32", variant="int8") >= before + 50
            assert await site.metric("gateway_endpoint_up", upstream="gpu") == 0
            assert await site.metric("gateway_upstream_usable_endpoints", upstream="gpu") == 0
            assert (await http(site.admin, "/readyz"))[0] == 200
        finally:
            await gpu.start()
        await calls.until(lambda: calls.calls[-1].variant == "fp32", 10, "the pool is back")
    assert calls.variants()["int8"] > 50
    assert not calls.failed, calls.why()
    assert {"adder"} == {line["model"] for line in site.access(logged="fallback", variant="int8", code="OK")}
    told = [line for line in site.process.errors.splitlines() if gpu.grpc_address in line]
    assert any(f"endpoint {endpoint} is down: Failed to connect: Connection refused" in line for line in told)
    assert len(told) < 15  # not one for each call, nor for each probe


async def test_one_triton_slow(site: Site, gpu: LocalTriton) -> None:
    """The calls that it holds show at once; it is down after some probes, and back by itself."""
    address = gpu.grpc_address
    assert gpu.pid is not None

    os.kill(gpu.pid, signal.SIGSTOP)
    try:
        async with traffic(site.listen, callers=2, timeout=1) as calls:
            while (await gpu_endpoint(site))["in_flight"] != 2:
                assert len(calls.calls) < 20, calls.why()
                await asyncio.sleep(0.05)
            await site.runs("one-triton-slow")
            await site.process.until_said(f"endpoint gpu/{address} is down: ")  # by a probe or by a PING
            assert {ended.code.name for ended in calls.failed} <= {"DEADLINE_EXCEEDED"}
    finally:
        os.kill(gpu.pid, signal.SIGCONT)
    where = {"logged": "error", "variant": "fp32", "endpoint": address}
    await until(lambda: len(site.access(**where)) >= 2, 5, "a line of each")
    ended = site.access(**where)
    assert {line["code"] for line in ended} <= {"DEADLINE_EXCEEDED", "CANCELLED"}  # whichever was here first
    await until_ready(site)


async def test_bad_model_version(site: Site, triton: LocalTriton) -> None:
    """Triton's own text, with model, variant and endpoint in the log, and the endpoint in a metric."""
    async with channel_to(site.listen) as channel:
        outcome = await call(channel, infer("broken", [b"the new version is broken"], "BYTES"))
    assert outcome.code is grpc.StatusCode.INTERNAL
    assert "the new version is broken" in outcome.text
    assert await site.metric("gateway_attempts_total", address=triton.grpc_address, meaning="server") == 1
    where = {"model": "broken", "variant": "new", "endpoint": triton.grpc_address}
    await until(lambda: bool(site.access(logged="error", **where)), 5, "its line")
    assert site.access(**where)[0]["error"] == outcome.text
    of_triton = {"triton-gpu-0:8000": triton.http_address, "efficientnet_fp32": "fails", "cannot be reshaped": "broken"}
    await site.runs("bad-model-version", {**of_triton, "imagenet": "broken", "fp32": "new", '"gpu"': '"cpu"'})


async def test_overload(site: Site) -> None:
    """Triton's own queue never gets full; those for whom there is no room are told at once, and the others wait."""
    async with channel_to(site.listen) as channel:
        request = infer("embed", [[100]], "INT32")
        for _ in range(10):  # how fast the model answers is not known before
            assert (await call(channel, request)).code is grpc.StatusCode.OK
        outcomes: list[Outcome] = await asyncio.gather(*(call(channel, request) for _ in range(4)))
        assert {outcome.code for outcome in outcomes} == {grpc.StatusCode.OK}
        outcomes = await asyncio.gather(*(call(channel, request) for _ in range(300)))
        _, state = await http(site.admin, "/state")
    refused = [outcome for outcome in outcomes if outcome.code is grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert refused
    assert await site.metric("gateway_queue_full_total", model="embed", where="upstream") == 0
    assert all("grpc-status-details-bin" in outcome.trailers for outcome in refused)
    (limit,) = state["limits"]
    assert limit["model"] == "slow"
    assert limit["refused"]["queue_full"] > 0
    upstream_model = {"upstream": limit["upstream"], "upstream_model": "slow"}
    counted = await site.metric("gateway_limit_refusals_total", reason="queue_full", **upstream_model)
    assert counted == limit["refused"]["queue_full"]
    assert await site.metric("gateway_limit_calls", **upstream_model) >= 1
    await site.runs("overload", {'upstream_model="embed"': 'upstream_model="slow"'})


async def test_config_rejected(site: Site) -> None:
    """Calls go on; `/config` names line and key; the good file is heard of as well."""
    good = site.file.read_text()
    bad = good.replace("default_deadline: 1s", "default_deadline: 5 sec")
    site.file.write_text(bad.replace("model: add_one_b", "modle: add_one_b"))
    await site.process.until_said("the new config is refused, the old one stays")
    _, told = await http(site.admin, "/config")
    assert not told["changes"][0]["accepted"]
    findings = told["changes"][0]["findings"]
    assert any("models.adder.variants.int8.modle" in each for each in findings)
    assert await site.metric("gateway_config_reloads_total", result="refused") == 1
    assert any("file was refused" in each for each in await site.attention())
    await site.runs("config-rejected", {"imagenet": "adder"})
    code, _, errors = await run("check", str(site.file), folder=site.file.parent)
    assert (code, errors.removeprefix("inference-gateway: ").splitlines()) == (2, findings)
    async with channel_to(site.listen) as channel:
        assert (await call(channel, infer("adder"))).code is OK
    site.file.write_text(good)
    site.process.signal(signal.SIGHUP)
    await until(lambda: site.process.errors.count("is in force") > 1, 5, "the good one again")


async def test_sequence_lost(site: Site, gpu: LocalTriton) -> None:
    """The caller is told to start again, until it does; nothing is summed from a wrong state."""

    def step(start: bool = False) -> Any:
        return infer("speech", [[5]], "INT32", parameters={"sequence_id": 4711, "sequence_start": start})

    async with channel_to(site.listen) as channel:
        assert numbers((await call(channel, step(start=True))).response) == [5]
        assert numbers((await call(channel, step())).response) == [10]
        await gpu.kill()
        try:
            for number in range(2):
                lost = await call(channel, step())
                assert (lost.code.name, lost.text.partition(":")[0]) == (
                    "UNAVAILABLE",
                    "sequence 4711 of model 'speech' is lost",
                )
                if not number:
                    await until(
                        lambda: "4711 of model 'speech' is lost" in site.process.output, 60, "the access log's line"
                    )
                    await site.runs("sequence-lost")
        finally:
            await gpu.start()
        await until_ready(site)
        assert (await call(channel, step())).code is not OK  # its state is gone, though the server is back
        assert numbers((await call(channel, step(start=True))).response) == [5]


async def test_certificate_expired(triton: LocalTriton, tmp_path: Path) -> None:
    """Clients see it, and so do the log, `check`, the metric, and a gateway that has it at an upstream."""
    authority = Authority(tmp_path)
    old = authority.issue("localhost", days=0)
    await asyncio.sleep(1.1)  # until it has
    behind, front = tmp_path / "behind", tmp_path / "front"
    behind.mkdir()
    front.mkdir()
    tls = {"cert": old.certificate, "key": old.key}
    models = {"adder": {"variants": {"only": {"upstream": "cpu", "model": "add_one_a"}}}}
    async with serving(behind, {"cpu": triton.grpc_address}, models, server={"tls": tls}) as site:
        await site.process.until_said("warning: server.tls.cert: the certificate expired on ")
        assert await site.metric("gateway_certificate_expiry_timestamp_seconds", key="server.tls.cert") < time.time()
        credentials = grpc.ssl_channel_credentials(read(old.ca))
        async with grpc.aio.secure_channel(
            site.listen, credentials, [("grpc.ssl_target_name_override", "localhost")]
        ) as channel:
            refused = await call(channel, infer("adder"))
        assert (refused.code.name, "certificate has expired" in refused.text) == ("UNAVAILABLE", True)
        code, output, _ = await run("check", str(site.file), folder=behind)
        assert (code, "the certificate expired on " in output) == (0, True)
        await site.runs("certificate-expired", {"gateway:9001": site.listen})
        upstream = {"endpoints": [site.listen], "tls": {"ca": old.ca, "server_name": "localhost"}}
        async with serving(
            front, {"far": upstream}, {"adder": {"variants": {"only": {"upstream": "far", "model": "adder"}}}}
        ) as other:
            await other.process.until_said(r"endpoint far/\S+ is down: .*certificate has expired")
            assert (await http(other.admin, "/readyz"))[0] == 503


async def test_clock_skew(site: Site) -> None:
    """Both clocks are said side by side."""
    await site.runs("clock-skew")


@needs_tools
def test_the_tools_that_the_page_takes_are_here() -> None:
    """Where they are not, no test runs its commands."""


@pytest.mark.skipif(shutil.which("kubectl", path=BIN) is None, reason="kubectl is not here")
@pytest.mark.parametrize("command", of_kubernetes())
async def test_kubectl_knows_every_command_and_flag_of_the_incidents(command: str, tmp_path: Path) -> None:
    assert await unknown_to_kubectl(command, tmp_path) == ""


@pytest.mark.parametrize("incident", incidents())
def test_every_command_of_an_incident_is_run_by_a_test(incident: str) -> None:
    sources = [file.read_text() for file in Path(__file__).parents[1].glob("*/test_*.py")]
    assert any(re.search(rf'(?:runs|as_the_page_says)\(\s*"{incident}"', source) for source in sources)


async def test_disk_full(triton: LocalTriton, tmp_path: Path) -> None:
    """The access log can't be written: told once, and no call fails."""
    content = config(
        {"cpu": triton.grpc_address},
        {"adder": {"variants": {"only": {"upstream": "cpu", "model": "add_one_a"}}}},
        telemetry={"access_log": {"destination": "stdout", "sample": 1}},
    )
    file = write(tmp_path / "gateway.yaml", content)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        async with command("serve", "--config", str(file), folder=tmp_path, output=full) as process:
            listen, _ = await process.until_serving()
            async with traffic(listen) as calls:
                await calls.more(200)
            await process.until_said("access log: lines are lost while the stream can't be written")
            assert not calls.failed, calls.why()
            assert process.errors.count("No space left on device") == 1
    finally:
        os.close(full)
