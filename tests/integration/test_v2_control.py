"""RPCs that change a server: by whom they may be called, and that they reach every endpoint or none."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from triton_fixture import FAST_START, TritonFactory
from tritonclient.grpc import service_pb2 as pb
from v2_calls import call, channel_to, infer
from v2_gateways import Script, gateway_of

from gateway.api.calls import is_loopback
from gateway.api.control import RPCS
from gateway.app import Gateway
from gateway.config import load
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

CONTROL = {
    "RepositoryModelLoad": pb.RepositoryModelLoadRequest(model_name="add_two"),
    "RepositoryModelUnload": pb.RepositoryModelUnloadRequest(model_name="add_two"),
    "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(),
    "SystemSharedMemoryRegister": pb.SystemSharedMemoryRegisterRequest(name="r", key="/r", byte_size=1),
    "SystemSharedMemoryUnregister": pb.SystemSharedMemoryUnregisterRequest(),
    "CudaSharedMemoryStatus": pb.CudaSharedMemoryStatusRequest(),
    "CudaSharedMemoryRegister": pb.CudaSharedMemoryRegisterRequest(name="r", byte_size=1),
    "CudaSharedMemoryUnregister": pb.CudaSharedMemoryUnregisterRequest(),
    "TraceSetting": pb.TraceSettingRequest(),
    "LogSettings": pb.LogSettingsRequest(),
}


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("ipv4:127.0.0.1:5000", True),
        ("ipv4:127.8.8.8:5000", True),
        ("ipv6:%5B::1%5D:5000", True),
        ("ipv6:[::1]:5000", True),
        ("ipv6:%5B::ffff:127.0.0.1%5D:5000", True),
        ("unix:/run/socket", True),
        ("unix:", True),
        ("ipv4:10.1.2.3:5000", False),
        ("ipv4:1.127.0.0:5000", False),
        ("ipv6:%5B::ffff:10.0.0.1%5D:5000", False),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", False),
        ("ipv4:127.evil", False),
        ("", False),
    ],
)
def test_only_this_host_is_loopback(peer: str, expected: bool) -> None:
    assert is_loopback(peer) is expected


def own_address() -> str | None:
    """An address of this host that is not loopback; asking for a route sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def config_file(folder: Path, listen: str, control: str, *endpoints: str) -> Path:
    file = folder / "gateway.yaml"
    file.write_text(
        f"""
        listen: {listen}:0
        admin: {{listen: "127.0.0.1:0"}}
        server: {{control: {control}}}
        telemetry: {{access_log: {{destination: none}}}}
        upstreams: {{main: {{endpoints: [{", ".join(endpoints)}]}}}}
        direct: {{models: all}}
        models: {{adder: {{variants: {{only: {{upstream: main, model: add_one_a}}}}}}}}
        """
    )
    return file


@pytest.mark.parametrize("method", CONTROL)
async def test_callers_from_elsewhere_are_refused_and_told_the_setting(
    method: str, triton: LocalTriton, tmp_path: Path
) -> None:
    host = own_address()
    if host is None:
        pytest.skip("this host has no address but loopback")
    file = config_file(tmp_path, host, "loopback", triton.grpc_address)
    async with gateway_of(load(file, {})) as gateway, channel_to(gateway.listen) as channel:
        outcome = await call(channel, CONTROL[method], method)
        assert (await call(channel, infer("adder"))).code is grpc.StatusCode.OK
    assert outcome.code is grpc.StatusCode.PERMISSION_DENIED
    assert "server.control" in outcome.text
    assert triton.grpc_address not in outcome.text


async def test_all_lets_callers_from_elsewhere_in(triton: LocalTriton, tmp_path: Path) -> None:
    host = own_address()
    if host is None:
        pytest.skip("this host has no address but loopback")
    file = config_file(tmp_path, host, "all", triton.grpc_address)
    async with gateway_of(load(file, {})) as gateway, channel_to(gateway.listen) as channel:
        assert (await call(channel, CONTROL["LogSettings"], "LogSettings")).code is grpc.StatusCode.OK


async def test_none_refuses_this_host_too(triton: LocalTriton, tmp_path: Path) -> None:
    file = config_file(tmp_path, "127.0.0.1", "none", triton.grpc_address)
    async with gateway_of(load(file, {})) as gateway, channel_to(gateway.listen) as channel:
        outcome = await call(channel, CONTROL["LogSettings"], "LogSettings")
    assert outcome.code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        *((method, CONTROL[method]) for method in CONTROL if "Status" in method or "Sett" in method),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="nobody")),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="nobody")),
        ("SystemSharedMemoryRegister", pb.SystemSharedMemoryRegisterRequest(name="r", key="/none", byte_size=8)),
        ("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest(name="none")),
        ("CudaSharedMemoryRegister", pb.CudaSharedMemoryRegisterRequest(name="r", byte_size=8)),
        ("TraceSetting", pb.TraceSettingRequest(model_name="nobody")),
    ],
)
async def test_answers_and_errors_are_tritons(triton: LocalTriton, bare: Gateway, method: str, request_: Any) -> None:
    async with channel_to(triton.grpc_address) as direct, channel_to(bare.listen) as channel:
        expected, through = await call(direct, request_, method), await call(channel, request_, method)
    assert (through.code, through.text) == (expected.code, expected.text)
    parse = RPCS[method].answer.FromString  # the bytes of a map come in any order
    assert parse(through.body) == parse(expected.body)


@pytest.mark.parametrize("name", ["adder", "best-label"])
async def test_a_public_model_is_not_loaded_but_its_variants_are(gateway: Gateway, name: str) -> None:
    async with channel_to(gateway.listen) as channel:
        outcome = await call(channel, pb.RepositoryModelLoadRequest(model_name=name), "RepositoryModelLoad")
    assert outcome.code is grpc.StatusCode.INVALID_ARGUMENT
    assert name in outcome.text


async def test_a_callers_upstream_is_the_one_that_changes(gateway: Gateway, other_triton: LocalTriton) -> None:
    request = pb.LogSettingsRequest()
    request.settings["log_verbose_level"].uint32_param = 0
    async with channel_to(gateway.listen) as channel:
        fine = await call(channel, request, "LogSettings", metadata=[("gateway-upstream", "other")])
        wrong = await call(channel, request, "LogSettings", metadata=[("gateway-upstream", "none")])
    assert fine.code is grpc.StatusCode.OK
    assert wrong.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "main, other" in wrong.text


# Two endpoints


@pytest.fixture
async def pair(
    triton_factory: TritonFactory, triton_repository: Path, tmp_path: Path
) -> AsyncIterator[tuple[Gateway, LocalTriton, LocalTriton]]:
    """Two Tritons behind one upstream; the second one's repository has nothing but `add_one_b`."""
    shutil.copytree(triton_repository / "add_one_b", tmp_path / "models" / "add_one_b")
    second = LocalTriton(tmp_path / "models", models=["add_one_b"], extra=FAST_START)
    try:
        first, _ = await asyncio.gather(triton_factory(["add_one_a"]), second.start())
        file = config_file(tmp_path, "127.0.0.1", "loopback", first.grpc_address, second.grpc_address)
        async with gateway_of(load(file, {})) as gateway:
            yield gateway, first, second
    finally:
        await second.kill()
        await second.aclose()


async def is_ready(address: str, model: str) -> bool:
    async with channel_to(address) as channel:
        outcome = await call(channel, pb.ModelReadyRequest(name=model), "ModelReady")
    return bool(pb.ModelReadyResponse.FromString(outcome.body).ready)


async def setting(address: str, key: str) -> int:
    async with channel_to(address) as channel:
        outcome = await call(channel, pb.LogSettingsRequest(), "LogSettings")
    return int(pb.LogSettingsResponse.FromString(outcome.body).settings[key].uint32_param)


async def test_a_load_that_one_endpoint_refuses_is_undone_on_the_others(
    pair: tuple[Gateway, LocalTriton, LocalTriton],
) -> None:
    gateway, first, _ = pair
    async with channel_to(gateway.listen) as channel:
        outcome = await call(channel, pb.RepositoryModelLoadRequest(model_name="add_two"), "RepositoryModelLoad")
    assert outcome.code is grpc.StatusCode.INTERNAL
    assert "failed to load 'add_two'" in outcome.text
    assert "was undone on the others" in outcome.text
    assert not await is_ready(first.grpc_address, "add_two")


async def test_settings_reach_every_endpoint_or_none(pair: tuple[Gateway, LocalTriton, LocalTriton]) -> None:
    gateway, first, second = pair
    request = pb.LogSettingsRequest()
    request.settings["log_verbose_level"].uint32_param = 1
    async with channel_to(gateway.listen) as channel:
        assert (await call(channel, request, "LogSettings")).code is grpc.StatusCode.OK
        assert [await setting(t.grpc_address, "log_verbose_level") for t in (first, second)] == [1, 1]
        request.settings["log_verbose_level"].uint32_param = 0
        await second.kill()
        outcome = await call(channel, request, "LogSettings")
    assert outcome.code is grpc.StatusCode.UNAVAILABLE
    assert "nothing was changed" in outcome.text
    assert await setting(first.grpc_address, "log_verbose_level") == 1


async def test_a_change_is_carried_through_when_its_caller_goes_away(tmp_path: Path) -> None:
    """One endpoint has loaded the model when the caller's time ends, and the other refuses later: it is undone."""
    asked, go_on, undone = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def not_ready(body: bytes, context: Any) -> bytes:
        return b""

    async def load_it(body: bytes, context: Any) -> bytes:
        return b""

    async def refuse_late(body: bytes, context: Any) -> bytes:
        asked.set()
        await go_on.wait()
        await context.abort(grpc.StatusCode.INTERNAL, "failed to load")
        return b""

    async def unload(body: bytes, context: Any) -> bytes:
        undone.set()
        return b""

    quick = Script(others={"ModelReady": not_ready, "RepositoryModelLoad": load_it, "RepositoryModelUnload": unload})
    late = Script(others={"ModelReady": not_ready, "RepositoryModelLoad": refuse_late})
    async with quick.serve() as first, late.serve() as second:
        file = config_file(tmp_path, "127.0.0.1", "loopback", first, second)
        async with gateway_of(load(file, {})) as gateway, channel_to(gateway.listen) as channel:
            request = pb.RepositoryModelLoadRequest(model_name="add_one_a")
            seconds = 0.1
            while not asked.is_set():  # what ends on its way changes nothing
                outcome = await call(channel, request, "RepositoryModelLoad", timeout=seconds)
                assert outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED
                seconds *= 2
            go_on.set()
            await asyncio.wait_for(undone.wait(), 60)


async def test_a_loaded_model_can_be_called_at_once_and_an_unloaded_one_not(
    triton_factory: TritonFactory, tmp_path: Path
) -> None:
    triton = await triton_factory([])
    file = config_file(tmp_path, "127.0.0.1", "loopback", triton.grpc_address)
    async with gateway_of(load(file, {})) as gateway, channel_to(gateway.listen) as channel:
        assert (await call(channel, infer("adder"))).code is grpc.StatusCode.UNAVAILABLE
        loaded = await call(channel, pb.RepositoryModelLoadRequest(model_name="add_one_a"), "RepositoryModelLoad")
        assert loaded.code is grpc.StatusCode.OK
        assert (await call(channel, infer("adder"))).code is grpc.StatusCode.OK
        assert (await call(channel, infer("add_one_a"))).code is grpc.StatusCode.OK
        await call(channel, pb.RepositoryModelUnloadRequest(model_name="add_one_a"), "RepositoryModelUnload")
        assert (await call(channel, infer("adder"))).code is grpc.StatusCode.UNAVAILABLE
