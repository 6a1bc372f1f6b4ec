"""Rollouts in running gateways: steps, rollbacks under load, restarts, several replicas, a database that goes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest
from played_triton import PlayedTriton, answers, fails_at_once, hangs, played, playing
from runbook import as_the_page_says
from traffic import OK, Traffic, config, gateway, http, traffic, until, write
from tritonclient.grpc import service_pb2 as pb
from v2_calls import infer

from gateway.app import Gateway
from gateway.cli import main
from gateway.store.database import Store

STEPS = [{"share": "20%", "soak": "1s", "units": 0}, {"share": "50%", "soak": "1s", "units": 0}]
ERRORS = {"kind": "ratio", "better": "lower", "measure": "error", "worse_by": 0.05}

IN_THE_RUNBOOK = {"int8-in-spring": "spring", "'int8'": "'new'"}
"""What its incidents name, and how it is called here."""


def plan(old: str, new: str, url: str, *, model: dict[str, Any] | None = None, **rollout: Any) -> dict[str, Any]:
    """A config with a rollout from one Triton's model to another's."""
    variants = {"old": {"upstream": "a", "model": "net"}, "new": {"upstream": "b", "model": "net"}}
    moves = {"name": "spring", "from": "old", "to": "new", "steps": STEPS, **rollout}
    net = {"variants": variants, "sticky": {"metadata": "x-user"}, **(model or {}), "rollout": moves}
    return config({"a": old, "b": new}, {"net": net}, store={"url": url, "unit_key": "a key that nobody guesses"})


@pytest.fixture
def url(tmp_path: Path) -> str:
    """PostgreSQL is what replicas have in their tests."""
    return f"sqlite:///{tmp_path}/rollouts.db"


@contextlib.asynccontextmanager
async def tritons() -> AsyncIterator[tuple[PlayedTriton, PlayedTriton]]:
    async with played() as old, played() as new:
        yield old, new


@contextlib.asynccontextmanager
async def load(running: Gateway, users: int = 400, model: str = "net", **more: Any) -> AsyncIterator[Traffic]:
    """Calls of many units, while it lasts."""
    async with traffic(
        running.listen, infer(model), metadata=lambda number: [("x-user", f"user {number % users}")], **more
    ) as calls:
        yield calls


def state(running: Gateway) -> Any:
    (found,) = running._rollouts.now()
    return found


async def until_it_is(running: Gateway, phase: str, within: float = 30.0) -> Any:
    await until(lambda: state(running).phase == phase, within, phase, lambda: str(state(running)))
    return state(running)


async def test_a_good_variant_goes_through_its_steps_to_all_units_and_stays_there(tmp_path: Path, url: str) -> None:
    async with tritons() as (old, new):
        file = write(tmp_path / "gateway.yaml", plan(old.address, new.address, url))
        async with gateway(file) as running, load(running) as calls:
            await until_it_is(running, "promoted")
            await until(
                lambda: [each[2] for each in state(running).history] == [0.2, 0.5, 1.0], 10, "its history is read"
            )
            await asyncio.sleep(0.1)
            assert {each.variant for each in await calls.more(50)} == {"new"}
        async with gateway(file) as running, load(running) as again:
            assert {each.variant for each in await again.more(50)} == {"new"}  # from the first call on
        assert not calls.failed, calls.why()


async def test_a_variant_that_fails_every_call_is_taken_back_and_nobody_fails_after_that(
    tmp_path: Path, url: str
) -> None:
    async with tritons() as (old, new):
        file = write(tmp_path / "gateway.yaml", plan(old.address, new.address, url))
        new.behaviour = fails_at_once
        async with gateway(file) as running, load(running) as calls:
            found = await until_it_is(running, "rolled back")
            decided = time.monotonic()
            assert "'new' is broken" in found.reason
            assert await calls.more(100)
            late = [each for each in calls.since(decided + 0.5) if each.code is not OK]
            assert not late, late
            await as_the_page_says("rollout-rolled-back", running.admin_address, tmp_path, IN_THE_RUNBOOK)
        assert {each.code for each in calls.failed} == {grpc.StatusCode.INTERNAL}
        async with gateway(file) as running, load(running) as again:
            assert {each.variant for each in await again.more(50)} == {"old"}  # it stays ended
            assert state(running).phase == "rolled back"


async def test_one_user_who_waits_for_no_answer_moves_nobody_back_however_often_he_calls(
    tmp_path: Path, url: str
) -> None:
    """Nor does he keep others from what is new."""

    async def slow_for_him(request: Any, context: grpc.aio.ServicerContext) -> None:
        if dict(context.invocation_metadata() or ()).get("x-user") == "mallory":
            await hangs(request, context)
        await answers(request, context)

    his = [{"name": "his", "match": {"metadata": {"x-user": "mallory"}}, "variant": "new"}]
    steps = [{"share": "20%", "soak": "6s", "units": 0}]
    async with tritons() as (old, new):
        new.behaviour = slow_for_him
        settings = plan(old.address, new.address, url, model={"rules": his}, steps=steps)

        def calling() -> Any:
            return traffic(
                running.listen, infer("net"), callers=12, timeout=0.05, metadata=lambda _: [("x-user", "mallory")]
            )

        async with gateway(write(tmp_path / "gateway.yaml", settings)) as running, load(running, callers=2) as others:
            await until_it_is(running, "running")
            await others.more(50)
            async with calling() as flood:
                found = await until_it_is(running, "promoted")
            assert found.reason == "the step has passed"
            assert not others.failed, others.why()
            assert len(flood.failed) == len(flood.calls) > 100


async def test_a_broken_variant_is_found_by_the_one_caller_there_is(tmp_path: Path, url: str) -> None:
    """At two calls a second, and with answers of another in place of its own, which name what was wrong."""
    steps = [{"share": "99%", "soak": "10m", "units": 0}]
    async with played() as old, playing(OfNothing()) as new:
        model = {"answers": {"finite": "fallback"}, "sticky": None}
        settings = plan(old.address, new.address, url, model=model, steps=steps)
        async with (
            gateway(write(tmp_path / "gateway.yaml", settings)) as running,
            traffic(running.listen, infer("net"), callers=1, pause=0.3) as calls,
        ):
            found = await until_it_is(running, "rolled back")
            assert not calls.failed, calls.why()
        assert "wrong answers: NaN" in found.reason
        assert len(calls.calls) < 60


async def test_answers_of_who_stands_in_tell_nothing_of_the_new_variant(tmp_path: Path, url: str) -> None:
    """The old one's agree with its own, and would hide that the new one fails."""
    alike = {"kind": "numeric", "better": "lower", "measure": "disagreement", "reference": "old", "worse_by": 0.02}
    model = {"retry": {"on": ["server"]}, "shadow": {"old": {"share": 1}}}
    async with tritons() as (old, new):
        rollout = plan(old.address, new.address, url, model=model, guardrails={"alike": alike})
        new.behaviour = fails_at_once
        async with gateway(write(tmp_path / "gateway.yaml", rollout)) as running, load(running) as calls:
            await until_it_is(running, "rolled back")
        assert not calls.failed, calls.why()
    seen = Store(url, "a key that nobody guesses")
    arms = {each.unit: each.arm for each in seen.exposures("spring/1")}
    found = {arms[each.unit] for each in seen.outcomes("spring/1", {"alike": True})}
    seen.close()
    assert set(arms.values()) == {"old", "new"}
    assert found == {"old"}


async def test_a_variant_that_never_answers_is_taken_back(tmp_path: Path, url: str) -> None:
    async with tritons() as (old, new):
        file = write(tmp_path / "gateway.yaml", plan(old.address, new.address, url))
        new.behaviour = hangs
        async with gateway(file) as running, load(running, timeout=0.4, callers=12) as calls:
            found = await until_it_is(running, "rolled back")
            assert "unanswered" in found.reason
            await asyncio.sleep(0.1)
            assert {each.variant for each in await calls.more(50)} == {"old"}
        assert {each.code for each in calls.failed} == {grpc.StatusCode.DEADLINE_EXCEEDED}


async def post(admin: str, path: str, **headers: str) -> tuple[int, dict[str, str]]:
    async with aiohttp.ClientSession() as session, session.post(f"http://{admin}{path}", headers=headers) as answer:
        return answer.status, await answer.json() if answer.content_type == "application/json" else {}


async def test_people_move_it_by_command_and_by_the_admin_plane_and_see_where_it_is(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with tritons() as (old, new):
        steps = [{"share": share, "soak": "1h"} for share in ("25%", "50%")]
        file = write(tmp_path / "gateway.yaml", plan(old.address, new.address, url, steps=steps))

        async def told(*words: str, code: int = 0) -> str:
            assert await asyncio.to_thread(main, [*words, "--config", str(file)]) == code
            captured = capsys.readouterr()
            return captured.out if code == 0 else captured.err

        async with gateway(file) as running:
            admin = running.admin_address
            await until_it_is(running, "running")
            assert "spring: running, step 1 of 2, 0.25 of units get 'new'" in await told("rollout", "list")
            assert "spring: running, step 2 of 2, 0.5" in await told("rollout", "promote", "spring")
            await until(lambda: state(running).share == 0.5, 5, "the share")
            assert (await post(admin, "/rollouts/spring/pause"))[0] == 200
            assert "is paused" in (await post(admin, "/rollouts/spring/pause"))[1]["error"]
            assert (await post(admin, "/rollouts/none/pause"))[0] == 404
            assert (await post(admin, "/rollouts/spring/undo"))[0] == 404
            assert (await http(admin, "/rollouts/spring/abort"))[0] == 405
            for browser in ({"Origin": f"http://{admin}"}, {"Sec-Fetch-Site": "cross-site"}):
                assert (await post(admin, "/rollouts/spring/abort", **browser))[0] == 403
            await until_it_is(running, "paused", 5)
            await as_the_page_says("rollout-stuck", admin, tmp_path, IN_THE_RUNBOOK)
            shown = await told("rollout", "show", "spring")
            assert "paused, step 2, 0.5 of units: pause by 127.0.0.1 (admin)" in shown
            (seen,) = (await http(admin, "/state"))[1]["rollouts"]
            assert [each["share"] for each in seen["history"]][:2] == [0.25, 0.5]
            metrics = (await http(admin, "/metrics"))[1]
            assert 'gateway_rollout_share{rollout="spring"} 0.5' in metrics
            assert 'gateway_rollout_overdue_seconds{rollout="spring"} 0.0' in metrics
            assert 'gateway_rollout_store_age_seconds{rollout="spring"}' in metrics
            explained = ["explain", str(file), "--model", "net", "--metadata", "x-user=anna", "--admin", admin]
            assert await asyncio.to_thread(main, explained) == 0
            lines = capsys.readouterr().out
            assert "rollout spring is paused at a share of 0.5, says the store, since pause by" in lines
            assert "reason: rollout:spring" in lines
            assert "rollout spring: the first 0.5 of what 'old' would get goes to 'new'; 'anna' is at" in lines
            assert "rollout spring: paused, step 2 of 2; 0.5 of what" in lines
            assert "rolled back, 0 of units" in await told("rollout", "abort", "spring")
            await until_it_is(running, "rolled back", 5)
            refused = await told("rollout", "promote", "spring", code=1)
            assert "'spring' is rolled back; promote is for one that is" in refused
            assert "no rollout 'sprig'; known: spring" in await told("rollout", "show", "sprig", code=2)
            attention = (await http(admin, "/state"))[1]["attention"]
            assert any("rollout spring is rolled back: abort by" in each["text"] for each in attention)


async def is_slow(request: Any, context: grpc.aio.ServicerContext) -> None:
    await asyncio.sleep(0.08)


async def fails_often(request: Any, context: grpc.aio.ServicerContext) -> None:
    """Not often enough for the fast lane."""
    await answers(request, context)
    if random.random() < 0.3:
        await fails_at_once(request, context)


class OfNothing(PlayedTriton):
    """Answers with NaN."""

    async def infer(self, body: bytes, context: Any) -> bytes:
        answer = pb.ModelInferResponse.FromString(await super().infer(body, context))
        answer.outputs[0].datatype = "FP32"
        answer.raw_output_contents[0] = np.float32("nan").tobytes()
        return bytes(answer.SerializeToString())


SLOW = {"kind": "quantile", "quantile": 0.9, "better": "lower", "measure": "latency", "worse_by": "100%"}
BAD: dict[str, tuple[Callable[[], PlayedTriton], dict[str, Any], str]] = {
    "slow": (lambda: PlayedTriton(is_slow), {}, "guardrail breached: latency of 'new'"),
    "worse": (lambda: PlayedTriton(fails_often), {}, "guardrail breached: errors of 'new'"),
    "nan": (OfNothing, {}, "NaN or Inf"),
    "masked": (lambda: PlayedTriton(fails_at_once), {"retry": {"on": ["server"]}}, "'new' is broken"),
}


async def test_each_bad_variant_is_caught_by_what_is_meant_for_it_while_calls_go_on(tmp_path: Path) -> None:
    """One is slow, one fails now and then, one answers NaN, and one fails always, which the old one's answers hide."""
    async with contextlib.AsyncExitStack() as exits:
        old = await exits.enter_async_context(played())
        upstreams, models = {"old": old.address}, {}
        for name, (made, more, _) in BAD.items():
            new = await exits.enter_async_context(playing(made()))
            upstreams[name] = new.address
            models[name] = {
                "variants": {"old": {"upstream": "old", "model": "net"}, "new": {"upstream": name, "model": "net"}},
                "sticky": {"metadata": "x-user"},
                "rollout": {
                    "name": f"{name}-in-spring",
                    "from": "old",
                    "to": "new",
                    "steps": [{"share": "50%", "soak": "10m"}],
                    "guardrails": {"errors": ERRORS, "latency": SLOW},
                    "units": 300,
                },
                **more,
            }
        file = write(tmp_path / "g.yaml", config(upstreams, models, store={"url": f"sqlite:///{tmp_path}/e.db"}))
        running = await exits.enter_async_context(gateway(file))
        calls = {
            name: await exits.enter_async_context(load(running, 300, model=name, callers=2, pause=0.01)) for name in BAD
        }

        def phases() -> dict[str, str]:
            return {each.model: each.phase for each in running._rollouts.now()}

        await until(lambda: set(phases().values()) == {"rolled back"}, 240, "all are back", lambda: str(told(running)))
        reasons = {each.model: each.reason for each in running._rollouts.now()}
        for name, (_, _, reason) in BAD.items():
            assert reason in reasons[name]
        await asyncio.sleep(0.3)
        after = time.monotonic()
        for sent in calls.values():
            assert {each.variant for each in await sent.more(20)} == {"old"}
            assert {each.code for each in sent.since(after)} == {OK}
        assert not [calls[name].why() for name in ("slow", "nan", "masked") if calls[name].failed]


async def test_a_scrape_has_the_distance_of_each_guardrail_as_the_page_does(tmp_path: Path, url: str) -> None:
    guardrails = {"errors": {**ERRORS, "kind": "binary", "worse_by": 0.2}, "latency": {**SLOW, "worse_by": "10000%"}}
    async with tritons() as (old, new):
        steps = [{"share": "50%", "soak": "10m"}]
        told = plan(old.address, new.address, url, steps=steps, guardrails=guardrails, units=300)
        file = write(tmp_path / "gateway.yaml", told)
        async with gateway(file) as running:
            async with load(running, callers=2, pause=0.005) as calls:
                await until_it_is(running, "running")
                await calls.more(600)
            scraped = await until_alike(running.admin_address)
    assert scraped["errors"] == pytest.approx(0.2, abs=0.15)  # nothing fails, and 0.2 more would be a breach
    assert scraped["latency"] > 0.0


async def until_alike(admin: str) -> dict[str, float]:
    """The distances of both guardrails, once what was seen has been judged and the scrape and /state say the same."""
    end = time.monotonic() + 60
    while True:
        metrics, state = str((await http(admin, "/metrics"))[1]), (await http(admin, "/state"))[1]
        lines = re.findall(r'gateway_rollout_guardrail_distance{guardrail="(\w+)",rollout="spring"} (\S+)', metrics)
        scraped = {name: float(value) for name, value in lines}
        shown = {each["name"]: each["distance"] for each in state["rollouts"][0]["guardrails"]}
        if len(scraped) == 2 and scraped == shown:
            return scraped
        assert time.monotonic() < end, (scraped, shown)
        await asyncio.sleep(0.2)


def told(running: Gateway) -> list[tuple[str, ...]]:
    return [
        (each.name, each.phase, str(each.units), *each.waits, *(guard.text for guard in each.guardrails), each.trouble)
        for each in running._rollouts.now()
    ]


def test_commands_make_no_store_that_nobody_would_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "gateway.yaml", plan("127.0.0.1:9", "127.0.0.1:9", f"sqlite:///{tmp_path}/none.db"))
    for words in (["list"], ["show", "spring"], ["abort", "spring"]):
        assert main(["rollout", *words, "--config", str(file)]) == 1
        assert f"there is no store at {tmp_path}/none.db" in capsys.readouterr().err
    assert main(["explain", str(file), "--model", "net", "--metadata", "x-user=anna"]) == 0
    told = capsys.readouterr().out
    assert "rollout spring: there is no store" in told
    assert "1. old: model net on a" in told
    assert not (tmp_path / "none.db").exists()
