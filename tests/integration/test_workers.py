"""Worker processes that share a port: they answer together, die alone, and end without anybody noticing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from command_line import children, command, free_address, is_running, run
from patience import HANG, ask_until
from traffic import OK, UNAVAILABLE, Traffic, config, http, traffic, until, until_readyz, write
from tritonclient.grpc import service_pb2 as pb
from v2_calls import call, channel_to, infer

from gateway.triton import LocalTriton

ADDER = {"adder": {"variants": {"only": {"upstream": "one", "model": "add_one_a"}}}}
OTHER = {"adder": {"variants": {"other": {"upstream": "one", "model": "add_one_b"}}}}
WAITER = {"waiter": {"variants": {"only": {"upstream": "one", "model": "slow"}}}}


def write_config(triton: LocalTriton, folder: Path, **more: object) -> Path:
    content = config({"one": triton.grpc_address}, {**ADDER, **WAITER}, **more)
    content["listen"] = free_address()  # workers can't share a port that the kernel chooses
    return write(folder / "g.yaml", content)


@contextlib.asynccontextmanager
async def many(address: str, count: int = 8) -> AsyncIterator[list[Traffic]]:
    """Callers with a connection each, which the supervisor spreads over the workers."""
    async with contextlib.AsyncExitStack() as exits:
        yield [await exits.enter_async_context(traffic(address, callers=1)) for _ in range(count)]


def connections(pid: int, address: str) -> int:
    """Established connections to the address that this process holds."""
    port = int(address.rpartition(":")[2])
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]  # grpcio uses the latter for all
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    inodes = {row[9] for row in rows if row[3] == "01" and int(row[1].rpartition(":")[2], 16) == port}
    held = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            held.add(os.readlink(fd))
    return len({f"socket:[{inode}]" for inode in inodes} & held)


async def until_all_up(admin: str, workers: str = "2") -> None:
    """Wait until every worker serves; readiness alone means that there is one."""
    await until_readyz(admin, True, within=60)
    give_up = time.monotonic() + 60
    while workers != "1" and not all((await http(admin, "/state"))[1]["workers"].values()):
        assert time.monotonic() < give_up
        await asyncio.sleep(0.05)


async def until_in_flight(admin: str, calls: int) -> None:
    """Wait until so many are on their way to Triton."""

    async def in_flight() -> int:
        _, state = await http(admin, "/state")
        return sum(endpoint["in_flight"] for endpoint in state["upstreams"]["one"])

    await ask_until(in_flight, lambda count: count >= calls)


async def until_counted(admin: str, least: int) -> int:
    """Wait until so many requests are in the metrics; answers how many."""
    return await ask_until(lambda: requests_counted(admin), lambda counted: counted >= least)


async def requests_counted(admin: str) -> int:
    _, text = await http(admin, "/metrics")
    return sum(int(float(value)) for value in re.findall(r"^gateway_requests_total\{.*\} (\S+)$", text, re.M))


async def test_workers_answer_together_and_one_that_dies_is_replaced(triton: LocalTriton, tmp_path: Path) -> None:
    file = write_config(triton, tmp_path, telemetry={"access_log": {"destination": "stdout", "sample": 1}})
    async with command("serve", "--config", str(file), "--workers", "2", folder=tmp_path) as supervisor:
        address, admin = await supervisor.until_serving()
        await until_all_up(admin)
        first, second = children(supervisor.pid)
        async with many(address, 10) as callers:
            for calls in callers:
                await calls.more(5)
            assert connections(first, address) == connections(second, address) == 5
            before = await until_counted(admin, 50)

            os.kill(first, signal.SIGKILL)
            for calls in callers:
                await calls.more(5)
            assert (await http(admin, "/readyz"))[0] == 200  # the other one serves
            await until(lambda: len(children(supervisor.pid)) == 2, 5, "another worker")
            assert second in children(supervisor.pid)
        failed = [ended for calls in callers for ended in calls.failed]
        assert {ended.code for ended in failed} <= {UNAVAILABLE}
        assert all(len(calls.failed) <= 1 for calls in callers)  # what was in flight there, and nothing later
        assert any(not calls.failed for calls in callers)

        answered = [ended for calls in callers for ended in calls.calls if ended.code is OK]
        counted = await until_counted(admin, before + 50 - 2 * len(failed))  # the dead one's too
        assert counted <= len(answered) + len(failed)
        _, state = await http(admin, "/state")
        assert state["workers"].keys() == {"0", "1"}

        supervisor.signal(signal.SIGTERM)
        assert await supervisor.wait() == 0
    logged = [json.loads(line)["worker"] for line in supervisor.output.splitlines() if line.startswith("{")]
    assert set(logged) == {"0", "1"}


async def test_calls_of_connections_that_a_hanging_worker_was_handed_are_answered_by_another(
    triton: LocalTriton, tmp_path: Path
) -> None:
    """It hangs and is killed: what it had not taken is not lost with it, and what comes meanwhile goes past it."""
    file = write_config(triton, tmp_path)
    async with command("serve", "--config", str(file), "--workers", "2", folder=tmp_path) as supervisor:
        address, admin = await supervisor.until_serving()
        await until_all_up(admin)
        hanging, _ = children(supervisor.pid)
        os.kill(hanging, signal.SIGSTOP)
        async with contextlib.AsyncExitStack() as exits:
            channels = [await exits.enter_async_context(channel_to(address)) for _ in range(8)]
            calls = [asyncio.ensure_future(call(channel, infer("adder"), timeout=60)) for channel in channels]
            # The others are with the one that hangs.
            await until(lambda: sum(each.done() for each in calls) >= 4, HANG, "calls past it")
            os.kill(hanging, signal.SIGKILL)
            await asyncio.gather(*calls)
            assert {each.result().code for each in calls} == {OK}


PIPED = {
    "piped": {
        "pipeline": {
            "inputs": [{"name": "IN", "datatype": "FP32", "shape": [1]}],
            "outputs": [{"name": "OUT", "datatype": "FP32", "shape": [1]}],
            "steps": [{"call": "adder", "inputs": {"IN": "IN"}, "outputs": {"OUT": "OUT"}}],
        }
    }
}


async def pipeline_statistics(address: str) -> tuple[int, int, int]:
    """As told by whichever worker the kernel gives a new connection to: answered, failed, rows."""
    async with channel_to(address) as channel:
        outcome = await call(channel, pb.ModelStatisticsRequest(name="piped"), "ModelStatistics")
    (entry,) = pb.ModelStatisticsResponse.FromString(outcome.body).model_stats
    return entry.inference_stats.success.count, entry.inference_stats.fail.count, entry.inference_count


async def test_a_pipelines_statistics_are_those_of_all_workers(triton: LocalTriton, tmp_path: Path) -> None:
    """Whoever is asked: tools take differences of two answers, which may come from two workers."""
    content = config({"one": triton.grpc_address}, {**ADDER, **PIPED})
    content["listen"] = free_address()
    file = write(tmp_path / "g.yaml", content)
    async with command("serve", "--config", str(file), "--workers", "2", folder=tmp_path) as supervisor:
        address, admin = await supervisor.until_serving()
        await until_all_up(admin)
        for number in range(1, 21):
            async with channel_to(address) as channel:
                assert (await call(channel, infer("piped", [[1.0], [2.0]]))).code is OK
            assert await pipeline_statistics(address) == (number, 0, 2 * number)
        async with channel_to(address) as channel:
            assert (await call(channel, infer("piped", [[1.0, 2.0]]))).code is not OK
        assert {await pipeline_statistics(address) for _ in range(10)} == {(20, 1, 40)}

        before = children(supervisor.pid)
        os.kill(before[0], signal.SIGKILL)
        await until(lambda: len(now := children(supervisor.pid)) == 2 and before[0] not in now, 5, "another worker")
        await until_all_up(admin)
        assert {await pipeline_statistics(address) for _ in range(10)} == {(20, 1, 40)}


async def test_sighup_reaches_every_worker(triton: LocalTriton, tmp_path: Path) -> None:
    file = write_config(triton, tmp_path)
    async with command("serve", "--config", str(file), "--workers", "2", folder=tmp_path) as supervisor:
        address, admin = await supervisor.until_serving()
        await until_all_up(admin)
        async with many(address, 6) as callers:
            write(file, {**config({"one": triton.grpc_address}, OTHER), "listen": address})
            supervisor.signal(signal.SIGHUP)
            for calls in callers:
                await calls.until(lambda c=calls: bool(c.calls) and c.calls[-1].variant == "other", 3, "the new config")
        assert not any(calls.failed for calls in callers)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_sigterm_costs_no_call(triton: LocalTriton, tmp_path: Path, workers: str) -> None:
    """Not ready at once, accepting for drain_delay, then finishing what is in flight."""
    server = {"drain_delay": "4s", "drain": "200s"}
    file = write_config(triton, tmp_path, server=server)
    async with command("serve", "--config", str(file), "--workers", workers, folder=tmp_path) as running:
        address, admin = await running.until_serving()
        await until_all_up(admin, workers)
        async with channel_to(address) as channel:
            slow = asyncio.ensure_future(call(channel, infer("waiter", [[5000]], "INT32")))
            await until_in_flight(admin, 1)
            running.signal(signal.SIGTERM)
            await until_readyz(admin, False, within=HANG)
            async with channel_to(address) as late:
                assert (await call(late, infer("adder"))).code is OK
            assert (await slow).code is OK
        assert await running.wait() == 0  # long before all of its time is over
    assert "Traceback" not in running.errors


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_ctrl_c_lets_calls_finish_too(triton: LocalTriton, tmp_path: Path, workers: str) -> None:
    """A terminal sends SIGINT to the whole group of processes."""
    file = write_config(triton, tmp_path)
    async with command("serve", "--config", str(file), "--workers", workers, folder=tmp_path, group=True) as running:
        address, admin = await running.until_serving()
        await until_all_up(admin, workers)
        async with channel_to(address) as channel:
            slow = asyncio.ensure_future(call(channel, infer("waiter", [[3000]], "INT32")))
            await until_in_flight(admin, 1)
            os.killpg(running.pid, signal.SIGINT)
            assert (await slow).code is OK
        assert await running.wait() == 0
    assert "Traceback" not in running.errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_second_signal_lets_calls_finish_and_a_third_ends_at_once(
    triton: LocalTriton, tmp_path: Path, workers: str, number: signal.Signals
) -> None:
    """systemd sends SIGTERM to every process of a service, and the supervisor sends its own to the workers."""
    file = write_config(triton, tmp_path)
    async with command("serve", "--config", str(file), "--workers", workers, folder=tmp_path, group=True) as running:
        address, admin = await running.until_serving()
        await until_all_up(admin, workers)
        processes = [running.pid, *children(running.pid)]
        async with channel_to(address) as channel, channel_to(address) as other:
            slow = asyncio.ensure_future(call(channel, infer("waiter", [[3000]], "INT32")))
            await until_in_flight(admin, 1)  # the model has one instance
            long = asyncio.ensure_future(call(other, infer("waiter", [[15_000]], "INT32")))
            await until_in_flight(admin, 2)
            for pid in processes:
                os.kill(pid, number)
            await running.until_said("draining")
            os.kill(running.pid, number)
            assert (await slow).code is OK
            os.kill(running.pid, number)
            assert (await long).code is not OK
            await running.wait()
        assert not any(map(is_running, processes))


async def test_no_worker_outlives_its_supervisor(triton: LocalTriton, tmp_path: Path) -> None:
    file = write_config(triton, tmp_path)
    async with command("serve", "--config", str(file), "--workers", "2", folder=tmp_path) as supervisor:
        _, admin = await supervisor.until_serving()
        await until_all_up(admin)
        workers = children(supervisor.pid)
        assert len(workers) == 2
        supervisor.signal(signal.SIGKILL)
        await until(lambda: not any(map(is_running, workers)), 5, "the workers' end")


async def test_the_successor_of_a_killed_supervisor_starts_at_once(triton: LocalTriton, tmp_path: Path) -> None:
    """Whatever drains still, and whatever connections linger: some of one worker, which did not share the port."""
    file = write_config(triton, tmp_path, server={"drain_delay": "20s"})
    arguments = ("serve", "--config", str(file), "--workers")
    async with command(*arguments, "1", folder=tmp_path) as alone:
        address, _ = await alone.until_serving()
        async with channel_to(address) as channel:
            assert (await call(channel, infer("adder"))).code is OK
            alone.signal(signal.SIGKILL)  # its side ends first, and lingers
            await alone.wait()
    async with command(*arguments, "2", folder=tmp_path) as first:
        _, admin = await first.until_serving()
        await until_all_up(admin)
        workers = children(first.pid)
        async with channel_to(address) as channel:
            # One after the other, since the model takes one at a time: the short one behind the long one would be cut.
            short = asyncio.ensure_future(call(channel, infer("waiter", [[3000]], "INT32"), timeout=60))
            await until_in_flight(admin, 1)
            long = asyncio.ensure_future(call(channel, infer("waiter", [[50_000]], "INT32"), timeout=60))
            await until_in_flight(admin, 2)
            first.signal(signal.SIGKILL)
            await first.wait()
            async with command(*arguments, "2", folder=tmp_path) as second:
                assert (await second.until_serving())[0] == address
                assert any(map(is_running, workers))  # one has the long call still
                assert (await short).code is OK
                long.cancel()
                second.signal(signal.SIGTERM)


async def test_workers_import_what_the_supervisor_imports(triton: LocalTriton, tmp_path: Path) -> None:
    """The console command has no current directory among its places for modules, `python -m` has."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("yaml", "gateway", "grpc"):
        (here / f"{name}.py").write_text("raise SystemExit('a file of the user')")
    file = write_config(triton, tmp_path)
    script = Path(sys.executable).with_name("inference-gateway")
    arguments = (str(script), "serve", "--config", str(file), "--workers", "2")
    async with command(*arguments, folder=tmp_path, start=(), cwd=here) as running:
        address, admin = await running.until_serving()
        await until_all_up(admin)
        async with channel_to(address) as channel:
            assert (await call(channel, infer("adder"))).code is OK
    assert "a file of the user" not in running.errors


class TestAConfigThatIsBrokenOnDisk:
    """It can't replace the one in force, but a new worker has no other."""

    async def test_ends_a_gateway_that_has_no_worker_up(self, triton: LocalTriton, tmp_path: Path) -> None:
        file = write_config(triton, tmp_path)
        async with command("serve", "--config", str(file), "--workers", "2", folder=tmp_path) as supervisor:
            await supervisor.until_serving()
            file.write_text("listen: [")  # workers take longer than this to read it
            assert await supervisor.wait() == 1
        assert "giving up" in supervisor.errors
        assert "g.yaml:1" in supervisor.errors

    async def test_leaves_the_workers_alone_that_are_up(self, triton: LocalTriton, tmp_path: Path) -> None:
        file = write_config(triton, tmp_path)
        good = file.read_text()
        async with command("serve", "--config", str(file), "--workers", "2", folder=tmp_path) as supervisor:
            address, admin = await supervisor.until_serving()
            await until_all_up(admin)
            victim, survivor = children(supervisor.pid)
            file.write_text("listen: [")
            os.kill(victim, signal.SIGKILL)
            async with channel_to(address) as channel:
                enough = 3  # to give up if no other worker were up
                await until(lambda: supervisor.errors.count("ended with code 2") >= enough, 60, "failed starts")
                assert (await call(channel, infer("adder"))).code is OK
            assert survivor in children(supervisor.pid)
            assert (await http(admin, "/readyz"))[0] == 200
            file.write_text(good)
            said = supervisor.errors.count("serving gRPC")
            await until(lambda: supervisor.errors.count("serving gRPC") > said, 10, "the slot's new worker")


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "{}:{}".format(*server.getsockname())


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("flag", ["--listen", "--admin-listen"])
async def test_a_taken_port_ends_the_start_with_a_message(
    triton: LocalTriton, tmp_path: Path, taken: str, flag: str, workers: str
) -> None:
    file = write_config(triton, tmp_path)
    arguments = ("serve", "--config", str(file), "--workers", workers, flag, taken, "--log-level", "error")
    code, _, errors = await run(*arguments, folder=tmp_path)
    assert code == 1
    assert taken in errors
    assert "choose another" in errors
    assert len(errors.splitlines()) == 1


async def test_workers_do_not_join_those_of_another_gateway(triton: LocalTriton, tmp_path: Path) -> None:
    """The kernel would share a port between any processes of one user that ask for it."""
    file = write_config(triton, tmp_path)
    async with command("serve", "--config", str(file), "--workers", "2", folder=tmp_path) as first:
        address, admin = await first.until_serving()
        await until_all_up(admin)
        for workers in ("1", "2"):
            arguments = ("serve", "--config", str(file), "--workers", workers, "--listen", address)
            code, _, errors = await run(*arguments, folder=tmp_path)
            assert code == 1
            assert address in errors
