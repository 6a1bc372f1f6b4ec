"""The config changes while calls go on: none is lost, and a wrong file changes nothing."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import command
from traffic import OK, Traffic, config, gateway, http, traffic, until, write
from triton_fixture import TritonFactory
from v2_calls import Metadata, call, channel_to, infer, numbers, stream

from gateway.app import Gateway
from gateway.triton import LocalTriton

A = {"upstream": "one", "model": "add_one_a"}
B = {"upstream": "one", "model": "add_one_b"}


def adder(variants: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"adder": {"variants": variants, **more}}


@pytest.fixture
async def second(triton_factory: TritonFactory) -> LocalTriton:
    """A server that configs add and remove; it goes on living."""
    return await triton_factory(["add_one_a", "accumulate"])


@pytest.fixture
async def running_config(triton: LocalTriton, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    content = config({"one": triton.grpc_address}, adder({"a": A}))
    return write(tmp_path / "g.yaml", content), content


async def take(running: Gateway, file: Path, content: dict[str, Any]) -> None:
    """Write a config, have it read as SIGHUP does, and wait until it is in force."""
    before = current(running)
    write(file, content)
    running.reload()
    await until(lambda: current(running) != before, 5, "the new config")


def current(running: Gateway) -> Any:
    return running.shown.config()["current"]["digest"]


async def test_no_call_fails_while_variants_upstreams_and_pipelines_come_and_go(
    triton: LocalTriton, second: LocalTriton, tmp_path: Path
) -> None:
    one, two = triton.grpc_address, second.grpc_address
    pipeline = {
        "pipeline": {
            "inputs": [{"name": "scores", "datatype": "FP32", "shape": [4]}],
            "outputs": [{"name": "label", "datatype": "BYTES", "shape": [1]}],
            "max_batch_size": 8,
            "steps": [{"call": "labels", "inputs": {"IN": "scores"}, "outputs": {"OUT": "scores"}}],
        }
    }
    labels = {"labels": {"variants": {"only": {"upstream": "one", "model": "classifier"}}}}
    top_k = {"step": "top_k", "with": {"k": 1}}
    best = {**labels, "best": {"pipeline": {**pipeline["pipeline"], "steps": [*pipeline["pipeline"]["steps"], top_k]}}}
    far = {"upstream": "two", "model": "add_one_a"}
    contents = [
        config({"one": one}, adder({"a": A})),
        config({"one": one}, adder({"a": A, "b": B}, split={"a": 1, "b": 3})),
        config({"one": [one, two]}, {**adder({"a": A}), **best}),
        config({"two": two}, adder({"far": far})),
        config({"one": one, "two": two}, {**adder({"far": far, "b": B}, split={"far": 1, "b": 1}), **best}),
        config({"one": {"endpoints": [one], "probe_interval": "500ms"}}, adder({"b": B}, fallback="forbid")),
    ]
    file = write(tmp_path / "g.yaml", contents[0])
    async with gateway(file) as running, traffic(running.listen) as calls:
        for content in (*contents[1:], contents[0], *contents[1:]):
            await take(running, file, content)
            await calls.more(60)
    assert not calls.failed, calls.why()
    assert calls.variants().keys() == {"a", "b", "far"}
    assert calls.endpoints().keys() == {one, two}


async def test_a_calls_config_is_the_one_that_it_began_with(
    triton: LocalTriton, running_config: tuple[Path, dict[str, Any]]
) -> None:
    """Its upstream and its model leave the config while it is there."""
    file, content = running_config
    content["models"]["waiter"] = {"variants": {"only": {"upstream": "one", "model": "slow"}}}
    write(file, content)
    elsewhere = config({"other": triton.grpc_address}, adder({"a": {"upstream": "other", "model": "add_one_a"}}))
    for seconds in (1, 4, 16):  # on a busy machine the call may end before the config has changed
        write(file, content)
        slow = infer("waiter", [[1000 * seconds]], "INT32")
        async with gateway(file) as running, channel_to(running.listen) as channel:
            calling = asyncio.ensure_future(call(channel, slow))
            await until(lambda: in_flight(running) == 1 or calling.done(), 5, "a call in flight")  # noqa: B023
            await take(running, file, elsewhere)
            was_there = not calling.done()
            assert (await calling).code is OK, calling
        if was_there:
            return
    raise AssertionError("no call was in flight all the time")


def in_flight(running: Gateway) -> int:
    state: Any = running.shown.state()
    return sum(endpoint["in_flight"] for endpoints in state["upstreams"].values() for endpoint in endpoints)


async def test_a_sequence_goes_on_where_it_is_when_its_variant_leaves_the_config(
    triton: LocalTriton, second: LocalTriton, tmp_path: Path
) -> None:
    def sums(name: str, address: str) -> dict[str, Any]:
        models = {"sums": {"variants": {name: {"upstream": name, "model": "accumulate"}}}}
        return config({name: address}, models)

    file = write(tmp_path / "g.yaml", sums("old", triton.grpc_address))
    async with gateway(file) as running, channel_to(running.listen) as channel:
        streaming = stream(channel)

        async def add(value: int, **parameters: bool) -> float:
            request = infer("sums", [[value]], "INT32", parameters={"sequence_id": 4711, **parameters})
            await streaming.write(request)
            answer = await streaming.read()
            assert not answer.error_message
            (total,) = numbers(answer.infer_response)
            return total

        assert await add(1, sequence_start=True) == 1
        await take(running, file, sums("new", second.grpc_address))
        assert await add(2) == 3
        assert await add(3, sequence_end=True) == 6
        await streaming.done_writing()


class TestABadFile:
    @pytest.fixture
    def broken(self, running_config: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
        return config(running_config[1]["upstreams"], adder({"a": {**A, "upstream": "oen"}, "b": B}))

    async def test_changes_nothing_and_is_told_everywhere(
        self,
        running_config: tuple[Path, dict[str, Any]],
        broken: dict[str, Any],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        file, content = running_config
        async with gateway(file) as running:
            before = current(running)
            async with traffic(running.listen) as calls:
                write(file, broken)
                running.reload()
                await until(lambda: running.shown.config()["last_refused"] is not None, 5, "the refusal")
                await calls.more(50)
            assert not calls.failed, calls.why()
            _, told = await http(running.admin_address, "/config")
            assert told["current"]["digest"] == before
            (finding,) = told["last_refused"]["findings"]
            assert "models.adder.variants.a.upstream" in finding
            assert "'oen'" in finding
            (refusal,) = [r for r in caplog.records if r.levelno == logging.ERROR]
            assert finding in refusal.getMessage()
            _, metrics = await http(running.admin_address, "/metrics")
            assert 'gateway_config_reloads_total{result="refused"} 1.0' in metrics

            await take(running, file, config(content["upstreams"], adder({"b": B})))
            async with traffic(running.listen) as calls:
                await calls.more(5)
            assert calls.variants().keys() == {"b"}

    async def test_is_refused_whatever_is_in_it(
        self, running_config: tuple[Path, dict[str, Any]], triton: LocalTriton
    ) -> None:
        file, _ = running_config
        async with gateway(file) as running:
            before = current(running)
            for number, text in enumerate(("", "\0", "listen: [", "&a [*a]", "models: {x: {}}"), 1):
                file.write_text(text)
                running.reload()
                await until(
                    lambda n=number: len(running.shown.config()["changes"]) == n + 1, 5, f"an answer to {text!r}"
                )
            file.unlink()
            running.reload()
            await until(lambda: len(running.shown.config()["changes"]) == 7, 5, "an answer to no file")
            assert current(running) == before
            assert running.shown.readiness()[0]


class TestASplit:
    async def test_follows_the_weights(self, running_config: tuple[Path, dict[str, Any]]) -> None:
        file, content = running_config
        async with gateway(file) as running, traffic(running.listen, pause=0) as calls:
            for share in (0.8, 0.1):
                models = adder({"a": A, "b": B}, split={"a": share * 10, "b": 10 - share * 10})
                await take(running, file, config(content["upstreams"], models))
                since = time.monotonic()
                await calls.more(400)
                counted = calls.variants(since)
                assert abs(counted["a"] / counted.total() - share) < 0.12  # five standard deviations

    async def test_moves_only_the_sticky_callers_that_must_move(
        self, running_config: tuple[Path, dict[str, Any]]
    ) -> None:
        file, content = running_config
        users = 100

        def user(number: int) -> Metadata:
            return [("x-user-id", f"user-{number % users}")]

        def of(split: dict[str, float]) -> dict[str, Any]:
            return config(content["upstreams"], adder({"a": A, "b": B}, split=split, sticky={"metadata": "x-user-id"}))

        async def assignment(running: Gateway) -> Sequence[str]:
            async with traffic(running.listen, callers=1, pause=0, metadata=user) as calls:
                await calls.more(2 * users)
            seen = [ended.variant for ended in calls.calls]
            assert seen[:users] == seen[users : 2 * users]
            return seen[:users]

        file = write(file, of({"a": 90, "b": 10}))
        async with gateway(file) as running:
            before = await assignment(running)
            await take(running, file, of({"a": 60, "b": 40}))
            after = await assignment(running)
        moved = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
        assert set(moved) == {("a", "b")}
        assert len(moved) < 0.5 * users  # 30 are expected


async def test_kubernetes_updates_and_sighup_lose_no_call_of_the_real_process(
    triton: LocalTriton, second: LocalTriton, tmp_path: Path
) -> None:
    """A new config every half second: the link `..data` turns to a new folder; every other time SIGHUP tells of it."""
    far = {"upstream": "two", "model": "add_one_a"}
    contents = [
        config({"one": triton.grpc_address}, adder({"a": A, "b": B}, split={"a": 1, "b": 1})),
        config({"one": triton.grpc_address, "two": second.grpc_address}, adder({"far": far, "b": B})),
        config({"two": second.grpc_address}, adder({"far": far})),
    ]
    mount = ConfigMap(tmp_path / "mount")
    mount.update(contents[0])
    async with command("serve", "--config", str(mount.file), folder=tmp_path) as gateway_process:
        address, admin = await gateway_process.until_serving()
        async with traffic(address) as calls:
            for number, content in enumerate(itertools.islice(itertools.cycle(contents), 1, 9)):
                mount.update(content)
                if number % 2:
                    gateway_process.signal(signal.SIGHUP)
                await asyncio.sleep(0.5)  # the rhythm of the changes is what is tested
            mount.update(contents[1])  # and no signal: the link alone tells
            await calls.until(lambda: set(variants_of_latest(calls)) == {"far"}, 5, "the last config")
            assert not calls.failed, calls.why()
        _, told = await http(admin, "/config")
        assert len(told["changes"]) >= 3  # of nine: the more, the quicker the machine is
        assert all(change["accepted"] for change in told["changes"])


def variants_of_latest(calls: Traffic) -> list[str]:
    return [ended.variant for ended in calls.calls[-20:]]


class ConfigMap:
    """A folder as the kubelet mounts a ConfigMap: FILE → ..data/FILE, ..data → a folder per version."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._versions = itertools.count()
        self.file = folder / "gateway.yaml"
        self.file.symlink_to(Path("..data") / "gateway.yaml")

    def update(self, content: dict[str, Any]) -> None:
        version = self._folder / f"..2026_{next(self._versions)}"
        version.mkdir()
        write(version / "gateway.yaml", content)
        link = self._folder / "..data_tmp"
        link.symlink_to(version.name)
        os.replace(link, self._folder / "..data")
