"""Experiments in a running gateway: units, exposures, reports, the verdict, and a store that goes and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from command_line import command, free_address
from patience import ask_until
from played_triton import fails_at_once, played
from postgres import Postgres
from runbook import as_the_page_says
from test_workers import until_all_up
from traffic import OK, config, gateway, http, until, write
from v2_calls import call, channel_to, infer, read_all, stream

from gateway.access.api_keys import hash_of
from gateway.app import Gateway
from gateway.cli import main
from gateway.experimentation.reports import Unknown, disagreements
from gateway.store import ExposureRow
from gateway.store.database import Store
from gateway.v1 import outcomes_pb2 as pb
from gateway.v1.outcomes_pb2_grpc import OutcomeServiceStub

KEY = "a key that nobody guesses"
SPRING = {
    "model": "net",
    "arms": {"a": 1, "b": 1},
    "outcomes": {
        "bought": {"kind": "binary", "better": "higher"},
        "latency": {"kind": "duration", "better": "lower", "measure": "latency"},
        "errors": {"kind": "ratio", "better": "lower", "measure": "error"},
    },
    "primary": "bought",
    "secondary": ["latency", "errors"],
    "smallest_effect": "5%",
    "units": 400,
}
VARIANTS = {name: {"upstream": "main", "model": "net"} for name in ("a", "b")}


def plan(address: str, url: str, **more: Any) -> dict[str, Any]:
    rules = [{"name": "testers", "match": {"metadata": {"x-tester": "1"}}, "variant": "b"}]
    models = {"net": {"variants": VARIANTS, "sticky": {"metadata": "x-user"}, "rules": rules}}
    experiments = {"spring": {**SPRING, **more}}
    return config({"main": address}, models, experiments=experiments, store={"url": url, "unit_key": KEY})


@contextlib.asynccontextmanager
async def serving(
    folder: Path, url: str, made: Callable[..., dict[str, Any]] = plan, **more: Any
) -> AsyncIterator[tuple[Gateway, Path]]:
    """made: makes the config, of Triton's address, the store's URL and `more`."""
    async with played() as triton:
        file = write(folder / "gateway.yaml", made(triton.address, url, **more))
        async with gateway(file) as running:
            yield running, file


async def ask(channel: grpc.aio.Channel, user: str, request: str = "", **metadata: str) -> str:
    """The variant that answers."""
    keys = [("x-user", user), *((key.replace("_", "-"), value) for key, value in metadata.items())]
    if request:
        keys.append(("x-request-id", request))
    answer = await call(channel, infer("net"), metadata=keys)
    assert answer.code is OK, answer.text
    return str(answer.trailers["gateway-variant"])


def bought(report: str, *, unit: str = "", request: str = "", value: bool = True, name: str = "bought") -> Any:
    who = {"unit": unit} if unit else {"request_id": request}
    return pb.Outcome(**who, name=name, binary=value, report_id=report)


async def tell(channel: grpc.aio.Channel, *outcomes: Any) -> bool:
    answer = await OutcomeServiceStub(channel).Report(pb.ReportRequest(outcomes=outcomes), timeout=60)
    return bool(answer.stored)


def seen(url: str) -> tuple[Counter[str], int]:
    """Units by arm, forced ones apart, and how many reports say that something was bought."""
    store = Store(url, KEY)
    try:
        exposures = store.exposures("spring")
        arms = Counter("forced" if each.is_forced else each.arm for each in exposures)
        units = {each.unit for each in exposures}
        return arms, sum(each.unit in units for each in store.outcomes("spring", {"bought": False}))
    finally:
        store.close()


async def until_seen(url: str, wanted: Callable[[Counter[str], int], bool]) -> tuple[Counter[str], int]:
    return await ask_until(lambda: asyncio.to_thread(seen, url), lambda found: wanted(*found))


async def test_units_stay_on_their_arm_and_are_told_of_once(tmp_path: Path, url: str) -> None:
    async with serving(tmp_path, url) as (running, _), channel_to(running.listen) as channel:
        users = [f"user {number}" for number in range(60)]
        arms = {user: await ask(channel, user) for user in users}
        assert [await ask(channel, user) for user in users] == list(arms.values())
        assert await ask(channel, "tester", x_tester="1") == "b"
        await call(channel, infer("net"))  # nobody
        wanted = Counter(arms.values()) + Counter(forced=1)
        found, _ = await until_seen(url, lambda found, _: found == wanted)
        state = json.loads(json.dumps((await http(running.admin_address, "/state"))[1]))
        assert (state["store"]["away"], state["experiments"][0]["exposures"]) == (None, 61)
    assert seen(url)[0] == found


async def test_reports_count_once_by_unit_or_request_early_late_or_again(tmp_path: Path, url: str) -> None:
    async with serving(tmp_path, url) as (running, _), channel_to(running.listen) as channel:
        assert await tell(channel, bought("1", request="r-ben"))  # before its call
        await ask(channel, "anna", "r-anna")
        await ask(channel, "ben", "r-ben")
        for _ in range(3):
            assert await tell(channel, bought("1", request="r-ben"), bought("2", unit="anna"), bought("2", unit="anna"))
        await tell(channel, bought("3", request="r-anna", value=False), bought("4", unit="nobody"))
        _, reports = await until_seen(url, lambda arms, _: arms.total() == 2)
        assert reports == 3
        store = (await http(running.admin_address, "/state"))[1]["store"]
        assert (store["reports"], store["duplicates"]) == (12, 8)
        scraped = (await http(running.admin_address, "/metrics"))[1]
        for result, count in (("accepted", 12), ("duplicate", 8), ("refused", 0)):
            assert f'gateway_experiment_reports_total{{result="{result}"}} {count}.0' in scraped
        for reason in ("full", "refused"):
            assert f'gateway_experiment_records_dropped_total{{reason="{reason}"}} 0.0' in scraped
        assert 'gateway_experiment_exposures_total{experiment="spring"} 2.0' in scraped


async def test_a_stream_of_reports_goes_on_after_a_wrong_one(tmp_path: Path, url: str) -> None:
    async with serving(tmp_path, url) as (running, _), channel_to(running.listen) as channel:
        await ask(channel, "anna")
        stream = OutcomeServiceStub(channel).ReportStream(timeout=60)
        outcomes = [bought("1", unit="anna"), bought("2", unit="anna", name="nothing"), bought("3", unit="anna")]
        for number, outcome in enumerate(outcomes):
            await stream.write(pb.ReportStreamRequest(id=str(number), request=pb.ReportRequest(outcomes=[outcome])))
        await stream.done_writing()
        answers = [answer async for answer in stream]
        assert [(each.id, each.response.stored, each.error.code) for each in answers] == [
            ("0", True, 0),
            ("1", False, 5),
            ("2", True, 0),
        ]
        assert (await until_seen(url, lambda arms, _: arms.total() == 1))[1] == 2


WRONG: dict[str, tuple[Any, grpc.StatusCode, str]] = {
    "no such outcome": (pb.Outcome(unit="a", name="x", binary=True), grpc.StatusCode.NOT_FOUND, "known: bought"),
    "not of that experiment": (
        pb.Outcome(unit="a", name="bought", binary=True, experiment="autumn"),
        grpc.StatusCode.NOT_FOUND,
        "'autumn' does not ask",
    ),
    "measured": (pb.Outcome(unit="a", name="latency", numeric=1), grpc.StatusCode.INVALID_ARGUMENT, "is measured"),
    "of nobody": (pb.Outcome(name="bought", binary=True), grpc.StatusCode.INVALID_ARGUMENT, "set unit or request_id"),
    "no value": (pb.Outcome(unit="a", name="bought"), grpc.StatusCode.INVALID_ARGUMENT, "has no value"),
    "not binary": (pb.Outcome(unit="a", name="bought", numeric=2), grpc.StatusCode.INVALID_ARGUMENT, "is binary"),
    "not finite": (
        pb.Outcome(unit="a", name="bought", numeric=float("nan")),
        grpc.StatusCode.INVALID_ARGUMENT,
        "finite",
    ),
    "in the future": (
        pb.Outcome(unit="a", name="bought", binary=True, at={"seconds": 99_999_999_999}),
        grpc.StatusCode.INVALID_ARGUMENT,
        "future",
    ),
}


async def test_a_caller_reports_for_experiments_on_his_models_and_for_no_others(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'evidence.db'}"
    access = {
        "api_keys": [{"caller": name, "sha256": hash_of(name).hex()} for name in ("ada", "all")],
        "grants": [
            {"callers": ["ada"], "models": ["net"], "rpcs": ["inference", "outcomes"]},
            {"callers": ["all"], "models": ["*"], "rpcs": ["inference", "outcomes"]},
        ],
    }
    async with played() as triton:
        content = plan(triton.address, url)
        content["models"]["secret"] = content["models"]["net"]
        content["experiments"]["hidden"] = {**SPRING, "model": "secret"}
        file = write(tmp_path / "gateway.yaml", {**content, "access": access})
        async with gateway(file) as running, channel_to(running.listen) as channel:
            report = OutcomeServiceStub(channel).Report
            ada, everything = (("x-api-key", "ada"),), (("x-api-key", "all"),)
            for model in ("net", "secret"):
                metadata = (*everything, ("x-user", "anna"))
                assert (await call(channel, infer(model), metadata=metadata)).code is OK
            seen = set()
            for name in ("hidden", "missing"):
                named = pb.Outcome(unit="anna", name="bought", binary=True, experiment=name)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await report(pb.ReportRequest(outcomes=[named]), metadata=ada, timeout=60)
                seen.add((refused.value.code(), (refused.value.details() or "").replace(name, "NAME")))
            assert len(seen) == 1
            for _ in range(2):
                assert (
                    await report(pb.ReportRequest(outcomes=[bought("1", unit="anna")]), metadata=ada, timeout=60)
                ).stored
            await report(pb.ReportRequest(outcomes=[bought("2", unit="anna")]), metadata=everything, timeout=60)
    store = Store(url, KEY)
    try:
        reports = {name: len(list(store.outcomes(name, {"bought": False}))) for name in ("spring", "hidden")}
    finally:
        store.close()
    assert reports == {"spring": 2, "hidden": 1}


async def test_a_wrong_report_is_refused_whole_and_says_what_would_be_right(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/e.db"
    async with serving(tmp_path, url) as (running, _), channel_to(running.listen) as channel:
        await ask(channel, "anna")
        for outcome, code, text in WRONG.values():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await tell(channel, bought("1", unit="anna"), outcome)
            assert (caught.value.code(), text in str(caught.value.details())) == (code, True), caught.value.details()
        assert (await until_seen(url, lambda arms, _: arms.total() == 1))[1] == 0


async def test_a_report_reads_like_an_answer_and_a_stop_is_followed(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(tmp_path, url) as (running, file), channel_to(running.listen) as channel:
        arms = {f"user {number}": await ask(channel, f"user {number}") for number in range(300)}
        reports = [bought(user, unit=user, value=arm == "b") for user, arm in arms.items()]
        assert await tell(channel, *reports)
        await until_seen(url, lambda found, reports: found.total() == reports == 300)
        command = ["experiment", "report", "spring", "--config", str(file)]
        page = tmp_path / "report.html"
        assert await asyncio.to_thread(main, [*command, "--html", str(page)]) == 0
        assert "spring, after 300 units: 'b' is better." in capsys.readouterr().out
        assert page.read_text().count("<svg") >= 2  # none over time, as all reports came after the last unit
        assert await asyncio.to_thread(main, [*command, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["answer"], told["arm"], len(told["looks"]) > 10) == ("treatment", "b", True)
        stop = ["experiment", "stop", "spring", "--config", str(file), "--winner", "b"]
        assert await asyncio.to_thread(main, stop) == 0
        losers = [user for user, arm in arms.items() if arm == "a"]

        async def all_moved() -> bool:
            return {await ask(channel, user) for user in losers[:10]} == {"b"}

        end = time.monotonic() + 60
        while not await all_moved():
            assert time.monotonic() < end
        assert await asyncio.to_thread(main, ["experiment", "list", "--config", str(file)]) == 0
        assert "everybody gets 'b'" in capsys.readouterr().out
        explained = ["explain", str(file), "--model", "net", "--metadata", f"x-user={losers[0]}"]
        assert await asyncio.to_thread(main, explained) == 0
        told = capsys.readouterr().out
        assert "experiment spring was stopped, and everybody gets 'b', says the store" in told
        assert "stopped:spring: variant b" in told


async def test_shares_that_change_under_one_name_are_told_as_the_runbook_says(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/spring.db"
    for arms in ({"a": 9, "b": 1}, {"a": 1, "b": 1}):
        async with serving(tmp_path, url, arms=arms) as (running, _), channel_to(running.listen) as channel:
            for number in range(300):
                await ask(channel, f"user {arms['a']} {number}")
            if arms["a"] == 1:
                here = {"int8-in-spring": "spring", "imagenet": "net", "onnx": "a", "int8": "b"}
                await as_the_page_says("experiment-invalid", running.admin_address, tmp_path, here, within=60)


async def test_two_gateways_agree_and_a_database_that_restarts_loses_nothing(
    tmp_path: Path, postgres: Postgres
) -> None:
    postgres.empty()
    url = postgres.url
    (tmp_path / "other").mkdir()
    async with (
        serving(tmp_path, url) as (one, _),
        serving(tmp_path / "other", url) as (other, _),
        channel_to(one.listen) as here,
        channel_to(other.listen) as there,
    ):
        arms = {f"user {number}": await ask(here, f"user {number}") for number in range(40)}
        assert {user: await ask(there, user) for user in arms} == arms
        assert await tell(here, bought("1", unit="user 1"))
        assert await tell(there, bought("1", unit="user 1"))
        await asyncio.to_thread(postgres.stop)
        try:
            await tell(there, bought("2", unit="user 2"))
            await until(lambda: is_away(one) and is_away(other), 30, "both notice")
            assert not await tell(here, bought("3", unit="user 3"), bought("2", unit="user 2"))
            later = {f"later {number}": await ask(there, f"later {number}") for number in range(10)}
        finally:
            await asyncio.to_thread(postgres.start)
        await until(lambda: not is_away(one) and not is_away(other), 30, "both are back")
        wanted = Counter(arms.values()) + Counter(later.values())
        found = await until_seen(url, lambda found, reports: found == wanted and reports == 3)
        assert found == (wanted, 3)


async def test_units_that_do_not_come_as_planned_raise_the_alarm_in_metrics_and_on_the_page(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/e.db"
    store = Store(url, KEY)
    units = [("a" if number < 300 else "b", f"user {number}") for number in range(400)]
    store.write([ExposureRow("spring", arm, unit, time.time(), False) for arm, unit in units])
    store.close()
    async with serving(tmp_path, url) as (running, _):
        name = "gateway_experiment_sample_ratio_mismatch"
        began = time.monotonic()
        while f'{name}{{experiment="spring"}} 1.0' not in (await http(running.admin_address, "/metrics"))[1]:
            assert time.monotonic() - began < 60
            await asyncio.sleep(0.2)
        attention = (await http(running.admin_address, "/state"))[1]["attention"]
        assert any("spring" in each["text"] for each in attention), attention


def test_commands_say_where_they_looked_for_the_store_and_make_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stop that is written to a new store in another working directory would be read by nobody."""
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "gateway.yaml", plan("127.0.0.1:9", "sqlite:///elsewhere.db"))
    for words in (["list"], ["report", "spring"], ["report", "spring", "--json"], ["stop", "spring"]):
        for more, name in ((), "elsewhere.db"), (("--store", f"sqlite:///{tmp_path}/own.db"), "own.db"):
            assert main(["experiment", *words, "--config", str(file), *more]) == 1
            assert f"there is no store at {tmp_path}/{name}: no gateway has made it" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.db"))


def is_away(running: Gateway) -> bool:
    now = running._evidence.store_now()
    return now is not None and now.is_away


async def test_a_store_that_is_never_there_costs_callers_nothing_and_what_is_dropped_is_counted(
    tmp_path: Path,
) -> None:
    async with played() as triton:
        told = plan(triton.address, "postgresql://gateway@127.0.0.1:9/none")
        told["store"]["queue"] = 1000
        file = write(tmp_path / "gateway.yaml", told)
        async with gateway(file) as running, channel_to(running.listen) as channel:
            await until(lambda: is_away(running), 20, "it is away")
            for number in range(10):
                await ask(channel, f"user {number}")
            many = [bought(f"{number}", unit="anna") for number in range(1000)]
            assert not await tell(channel, *many[:500])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await tell(channel, *many)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            store = (await http(running.admin_address, "/state"))[1]["store"]
            assert store["reports_refused"] == 1000
            assert "ConnectionError" in store["away"] or "OperationalError" in store["away"]
            await as_the_page_says("store-away", running.admin_address, tmp_path, {})
            assert not await tell(channel, *many[500:980])  # there is room for these, and then for few exposures
            for number in range(40):
                await ask(channel, f"another user {number}")
            await until_dropped(running.admin_address, 30)
            scraped = (await http(running.admin_address, "/metrics"))[1]
            assert 'gateway_experiment_reports_total{result="accepted"} 980.0' in scraped
            assert 'gateway_experiment_reports_total{result="refused"} 1000.0' in scraped
            assert "gateway_store_waiting 1000.0" in scraped
            assert "gateway_store_away 1.0" in scraped


async def until_dropped(admin: str, count: int) -> None:
    """Until at least so many records were, as the scrape and /state say alike."""
    end = time.monotonic() + 60
    while True:
        scraped = (await http(admin, "/metrics"))[1]
        dropped = (await http(admin, "/state"))[1]["store"]["dropped"]["full"]
        if dropped >= count and f'gateway_experiment_records_dropped_total{{reason="full"}} {dropped}.0' in scraped:
            return
        assert time.monotonic() < end, scraped
        await asyncio.sleep(0.1)


async def store_of(admin: str) -> tuple[str | None, int, int]:
    """Of all workers, as the supervisor has last heard from them."""
    store = (await http(admin, "/state"))[1]["store"]
    return (store["away"], store["reports"], store["duplicates"]) if store else ("none", 0, 0)


async def test_two_workers_of_one_command_write_to_one_file_and_restarts_change_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/experiments.db"
    async with played() as triton:
        told = plan(triton.address, url)
        told["listen"], told["admin"]["listen"], told["workers"] = free_address(), free_address(), 2
        file = write(tmp_path / "gateway.yaml", told)
        users = [f"user {number}" for number in range(12)]
        arms: list[dict[str, str]] = []
        for life in range(2):
            async with command("serve", "--config", str(file), folder=tmp_path) as started:
                await started.until_serving()
                await until_all_up(told["admin"]["listen"])
                arms.append({})
                for user in users:  # over many connections, so that both workers meet them
                    async with channel_to(told["listen"]) as channel:
                        arms[life][user] = await ask(channel, user)
                        assert await tell(channel, bought(user, unit=user))
                address, written = told["admin"]["listen"], (None, 12, 12 * life)
                await ask_until(lambda: store_of(address), lambda found: found == written)  # noqa: B023
                started.signal(signal.SIGTERM)
                assert await started.wait() == 0
        assert arms[0] == arms[1]
        assert seen(url) == (Counter(arms[0].values()), 12)


def test_diffs_shows_the_latest_disagreements_that_shadows_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = plan("127.0.0.1:9", "sqlite:///unused.db")
    told["models"]["net"]["shadow"] = {"b": {"share": 1, "keep": {"directory": str(tmp_path / "kept")}}}
    file = write(tmp_path / "gateway.yaml", told)
    command = ["experiment", "diffs", "spring", "--config", str(file)]
    assert main(command) == 0
    assert capsys.readouterr().out == "net: 0 kept\n"
    pair = {"model": "net", "variant": "a", "shadow": "b", "why": "output 'OUT' differs", "measures": {"absolute": 0.5}}
    lines = [json.dumps({**pair, "time": f"2026-01-0{day}", "request_id": f"r-{day}"}) for day in (1, 2, 3)]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "net-20260101T000000000000Z-x.jsonl").write_text("\n".join([*lines, '{"half a li']))
    (tmp_path / "kept" / "other-20260101T000000000000Z-x.jsonl").write_text(lines[0])
    assert main([*command, "--most", "2"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "net: 3 kept, the latest 2"
    assert [line.split()[0] for line in others] == ["2026-01-02", "2026-01-03"]
    assert "a and b: output 'OUT' differs  absolute 0.5  (request r-2" in others[0]
    with pytest.raises(Unknown, match="no experiment and no public model 'sprig'"):
        list(disagreements(str(file), "sprig", 1))


async def test_messages_of_streams_take_part_and_calls_that_fail_count_as_errors(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/experiments.db"
    async with played() as triton:
        file = write(tmp_path / "gateway.yaml", plan(triton.address, url))
        async with gateway(file) as running, channel_to(running.listen) as channel:
            streaming = stream(channel, [("x-user", "anna")])
            for _ in range(3):
                await streaming.write(infer("net"))
            await streaming.done_writing()
            assert len(await read_all(streaming)) == 3
            triton.behaviour = fails_at_once
            failed = await call(channel, infer("net"), metadata=[("x-user", "ben")])
            assert failed.code is grpc.StatusCode.INTERNAL
    store = Store(url, KEY)
    try:
        store.open()
        measured = {"latency": True, "errors": True}
        anna, ben = (store.hashed("unit", name) for name in ("anna", "ben"))
        assert {each.unit for each in store.exposures("spring")} == {anna, ben}
        told = Counter[tuple[str, str, bool]]()
        for each in store.outcomes("spring", measured):
            told[each.unit, each.name, each.value > 0.0] += each.times
        assert told == {(anna, "latency", True): 3, (anna, "errors", False): 3, (ben, "errors", True): 1}
    finally:
        store.close()
