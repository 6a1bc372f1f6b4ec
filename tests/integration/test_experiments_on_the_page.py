"""What experiments say so far is on the page, made beside the gateway, and shown in a real browser."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from browser import MISSING, Browser, browser
from command_line import command, free_address
from played_triton import played
from test_workers import until_all_up
from traffic import config, http, until, write

from gateway.app import Gateway, Place
from gateway.config import load
from gateway.experimentation.verdicts import Verdicts
from gateway.store import ExposureRow, OutcomeRow, Stop
from gateway.store.database import Store

KEY = "a key that nobody guesses"
SPRING = {
    "model": "net",
    "arms": {"fp32": 1, "int8": 1},
    "outcomes": {
        "bought": {"kind": "binary", "better": "higher"},
        "latency": {"kind": "duration", "better": "lower"},
    },
    "primary": "bought",
    "guardrails": {"latency": {"worse_by": "10%"}},
    "smallest_effect": "5%",
    "units": 2000,
}
UNITS = 2000
BEGAN = time.time() - 14 * 86_400.0  # within `store.retention`, and a unit every ten minutes since
ARTICLE = "document.getElementById('experiment-spring')"


def fill(url: str) -> None:
    """Units of whom those on int8 buy more, and wait as long as the others."""
    draw, store = random.Random(3), Store(url, KEY)
    rows: list[Any] = []
    for number in range(UNITS):
        arm, unit, at = ("fp32", "int8")[number % 2], f"user {number}", BEGAN + 600.0 * number
        rows.append(ExposureRow("spring", arm, unit, at, False))
        bought = float(draw.random() < (0.2 if arm == "fp32" else 0.35))
        rows.append(OutcomeRow(f"b{number}", "spring", "bought", bought, at + 1.0, unit))
        rows.append(OutcomeRow(f"l{number}", "spring", "latency", draw.lognormvariate(-3, 0.3), at + 1.0, unit))
    store.write(rows)
    store.close()


def config_of(triton: str, url: str) -> dict[str, Any]:
    variants = {name: {"upstream": "main", "model": f"net_{name}"} for name in ("fp32", "int8")}
    models = {"net": {"variants": variants, "sticky": {"metadata": "x-user"}}}
    store = {"url": url, "unit_key": KEY}
    return config({"main": triton}, models, experiments={"spring": SPRING}, store=store)


@contextlib.asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[Gateway, str]]:
    url = f"sqlite:///{folder}/seen.db"
    fill(url)
    async with played() as triton:
        file = write(folder / "gateway.yaml", config_of(triton.address, url))
        loaded = load(file, {})
        async with Gateway(loaded, lambda: load(file, {}), os.environ, Place(loaded.config.admin.listen)) as running:
            yield running, url


async def until_told(running: Gateway) -> dict[str, Any]:
    for _ in range(600):
        found = (await http(running.admin_address, "/verdicts"))[1]["verdicts"]
        if found:
            return dict(found[0])
        await asyncio.sleep(0.1)
    raise AssertionError("no verdict in a minute")


async def told(verdicts: Verdicts) -> dict[str, Any]:
    await until(lambda: bool(verdicts.latest(["spring"])), 60, "a verdict", lambda: "")
    return dict(verdicts.latest(["spring"])[0])


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
async def test_an_experiment_is_on_the_page_with_its_verdict_and_guardrails(tmp_path: Path) -> None:
    async with serving(tmp_path) as (running, _), browser(tmp_path) as page:
        await page.open(f"http://{running.admin_address}/")
        await page.until(f"{ARTICLE}?.querySelector('svg.plot') !== null && {ARTICLE} !== null", 60)
        text = str(await page.run(f"return {ARTICLE}.innerText"))
        assert "int8 is better" in text
        assert "Move traffic to 'int8'" in text
        assert "bought of int8 less fp32: +0.1" in text
        assert "Units since" in text
        cells = "[...document.querySelectorAll('[aria-label=\"Arms of spring\"] tbody tr')].map(each => each.innerText)"
        assert [each.split() for each in await page.run(f"return {cells}")] == [
            ["fp32", "1,000", "50%", "50%"],
            ["int8", "1,000", "50%", "50%"],
        ]
        labels = f"return [...{ARTICLE}.querySelectorAll('svg')].map(each => each.getAttribute('aria-label'))"
        assert await page.run(labels) == [
            "bought of int8 less fp32 over time, with its interval",
            "latency of int8 beside what is allowed",
        ]
        await _is_drawn(page)
        assert await page.complaints() == []


async def _is_drawn(page: Browser) -> None:
    """The plots have a size, and lie within their article."""
    boxes = f"return [...{ARTICLE}.querySelectorAll('svg')].map(each => each.getBoundingClientRect().toJSON())"
    outer = await page.run(f"return {ARTICLE}.getBoundingClientRect().toJSON()")
    for box in await page.run(boxes):
        assert box["width"] > 100
        assert box["height"] > 10
        assert box["bottom"] <= outer["bottom"]


async def test_a_verdict_tells_how_it_ended_and_goes_with_its_experiment(tmp_path: Path) -> None:
    async with serving(tmp_path) as (running, url):
        verdict = await until_told(running)
        assert verdict["trouble"] is None
        assert (verdict["answer"], verdict["arm"], verdict["units"]) == ("treatment", "int8", UNITS)
        (guardrail,) = verdict["guardrails"]
        assert (guardrail["outcome"], guardrail["state"], guardrail["worse_by"]["size"]) == ("latency", "held", 0.1)
        times = [point[0] for point in verdict["primary"][0]["path"]]
        assert times == sorted(times)
        assert len(times) > 10
        store = Store(url, KEY)
        store.stop(Stop("spring", "int8", BEGAN + 600.0 * UNITS))
        store.close()
        verdicts = Verdicts(str(tmp_path / "gateway.yaml"), os.environ)
        found = await told(verdicts)
        assert found["stopped"]["arm"] == "int8"
        assert verdicts.latest(["another"]) == []
        await verdicts.aclose()


async def test_of_several_workers_the_supervisor_has_it_made(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/seen.db"
    fill(url)
    async with played() as triton:
        content = config_of(triton.address, url)
        content |= {"listen": free_address(), "admin": {"listen": free_address()}, "workers": 2}
        file = write(tmp_path / "gateway.yaml", content)
        async with command("serve", "--config", str(file), folder=tmp_path) as started:
            await started.until_serving()
            await until_all_up(content["admin"]["listen"])
            for _ in range(600):
                found = (await http(content["admin"]["listen"], "/verdicts"))[1]["verdicts"]
                if found:
                    break
                await asyncio.sleep(0.1)
            assert [(each["trouble"], each["arm"]) for each in found] == [(None, "int8")]
            started.signal(signal.SIGTERM)
            assert await started.wait() == 0


async def test_what_is_wrong_is_told_in_place_of_a_verdict_and_none_is_made_while_memory_is_scarce(
    tmp_path: Path,
) -> None:
    verdicts = Verdicts(str(tmp_path / "nowhere.yaml"), os.environ)
    found = await told(verdicts)
    assert found["name"] == "spring"
    assert "nowhere.yaml" in found["trouble"]
    await verdicts.aclose()
    scarce = Verdicts("", os.environ, is_scarce=lambda: True)
    assert scarce.latest(["spring"]) == []
    assert scarce._task is None
