"""What experiments say so far is on the page, made beside the gateway, and shown in a real browser."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from browser import MISSING, Browser, browser
from command_line import command, free_address
from played_triton import played
from runbook import as_the_page_says
from test_workers import until_all_up
from traffic import config, http, write

from gateway.app import Gateway, Place
from gateway.config import load
from gateway.store import ExposureRow, OutcomeRow
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


def fill(url: str, slower: float = 0.0) -> None:
    """Units of whom those on int8 buy more, and wait as long as the others, or longer."""
    draw, store = random.Random(3), Store(url, KEY)
    rows: list[Any] = []
    for number in range(UNITS):
        arm, unit, at = ("fp32", "int8")[number % 2], f"user {number}", BEGAN + 600.0 * number
        rows.append(ExposureRow("spring", arm, unit, at, False))
        bought = float(draw.random() < (0.2 if arm == "fp32" else 0.35))
        rows.append(OutcomeRow(f"b{number}", "spring", "bought", bought, at + 1.0, unit))
        waited = draw.lognormvariate(-3, 0.3) * (1.0 + slower * (arm == "int8"))
        rows.append(OutcomeRow(f"l{number}", "spring", "latency", waited, at + 1.0, unit))
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
    for _ in range(1000):
        found = (await http(running.admin_address, "/verdicts"))[1]["verdicts"]
        if found:
            return dict(found[0])
        await asyncio.sleep(0.1)
    raise AssertionError("no verdict in time")


async def _until_scraped(admin: str, what: str) -> str:
    """The first scrape with this in it: workers look at what one of them has found."""
    for _ in range(1000):
        scraped = str((await http(admin, "/metrics"))[1])
        if what in scraped:
            return scraped
        await asyncio.sleep(0.1)
    raise AssertionError(f"no {what} in time")


async def _until_attention(admin: str) -> str:
    """What is said of a guardrail where people look first; the supervisor asks workers every few seconds."""
    for _ in range(1000):
        attention = (await http(admin, "/state"))[1]["attention"]
        found = [str(each["text"]) for each in attention if "guardrail" in each["text"]]
        if found:
            assert len(found) == 1
            return found[0]
        await asyncio.sleep(0.1)
    raise AssertionError("nothing is said of it in time")


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


async def test_a_verdict_tells_the_way_to_it_and_its_guardrails(tmp_path: Path) -> None:
    async with serving(tmp_path) as (running, _):
        verdict = await until_told(running)
        assert verdict["trouble"] is None
        assert (verdict["answer"], verdict["arm"], verdict["units"]) == ("treatment", "int8", UNITS)
        (guardrail,) = verdict["guardrails"]
        assert (guardrail["outcome"], guardrail["state"], guardrail["worse_by"]["size"]) == ("latency", "held", 0.1)
        times = [point[0] for point in verdict["primary"][0]["path"]]
        assert times == sorted(times)
        assert len(times) > 10


@pytest.mark.timeout(300)  # three waits, of which each may be long where the machine has other work
async def test_a_breached_guardrail_is_on_every_scrape_of_several_workers_and_in_the_log_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/seen.db"
    fill(url, slower=0.5)
    async with played() as triton:
        content = config_of(triton.address, url)
        content |= {"listen": free_address(), "admin": {"listen": free_address()}, "workers": 2}
        file = write(tmp_path / "gateway.yaml", content)
        async with command("serve", "--config", str(file), folder=tmp_path) as started:
            await started.until_serving()
            await until_all_up(content["admin"]["listen"])
            for _ in range(1000):
                found = (await http(content["admin"]["listen"], "/verdicts"))[1]["verdicts"]
                if found:
                    break
                await asyncio.sleep(0.1)
            assert [(each["trouble"], each["arm"]) for each in found] == [(None, "fp32")]
            assert found[0]["guardrails"][0]["breached_at"] is not None
            scraped = await _until_scraped(content["admin"]["listen"], 'state="breached"} 1.0')
            of_arm = 'experiment="spring",outcome="latency"'
            assert f'gateway_experiment_guardrail_state{{arm="int8",{of_arm},state="breached"}} 1.0' in scraped
            assert f'gateway_experiment_guardrail_distance{{arm="int8",{of_arm}}} -0.' in scraped
            of_arm = 'experiment="spring",outcome="bought"'
            assert f'gateway_experiment_verdict{{arm="int8",{of_arm},verdict="better"}} 1.0' in scraped
            age = re.search(r'gateway_experiment_verdict_age_seconds{experiment="spring"} (\S+)', scraped)
            assert age is not None
            assert float(age[1]) < 120.0
            notice = await _until_attention(content["admin"]["listen"])
            assert notice.startswith("experiment spring: guardrail breached: latency of 'int8': ")
            assert (started.output + started.errors).count(
                "experiment spring: guardrail breached: latency of 'int8'"
            ) == 1
            here = {"int8-in-spring": "spring", "'onnx'": "'fp32'"}
            await as_the_page_says("experiment-guardrail", content["admin"]["listen"], tmp_path, here, within=60)
            started.signal(signal.SIGTERM)
            assert await started.wait() == 0
