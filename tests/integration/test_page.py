"""The admin page in a real browser: what an on-call person sees, and that everybody can."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from browser import MISSING, Browser, browser
from command_line import command, free_address
from traffic import http, until_readyz
from v2_calls import call, channel_to, infer
from v2_gateways import Script, gateway_of, transparent_to

from gateway.app import Gateway
from gateway.config import load
from gateway.hooks import BanditNow, ExperimentNow, GuardrailNow, RolloutNow
from gateway.telemetry.history import ModelPoint, Point
from gateway.triton import LocalTriton

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

ODD_NAME = "<b>odd&name"
TAB, ENTER, RIGHT = "\ue004", "\ue007", "\ue014"
MODEL = "document.getElementById('model-photos')"


@pytest.fixture(scope="module")
async def chromium(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    async with browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


class Scene:
    """A gateway whose second upstream can be taken away, and its page."""

    def __init__(self, gateway: Gateway, page: Browser, script: contextlib.AsyncExitStack) -> None:
        self.gateway = gateway
        self.page = page
        self._second = script

    async def end_second(self) -> None:
        await self._second.aclose()

    async def call(self, *models: str) -> None:
        """Call models, and have the page's numbers count it."""
        traffic = self.gateway._telemetry.traffic
        assert traffic
        traffic.look()
        async with channel_to(self.gateway.listen) as channel:
            for model in models:
                await call(channel, infer(model))
        traffic.look()

    async def open(self) -> None:
        await self.page.open(f"http://{self.gateway.admin_address}/")
        await self.page.until(f"{MODEL} !== null")


def config_of(first: str, second: str, **more: Any) -> dict[str, Any]:
    model = {"upstream": "first", "model": "add_one_a"}
    return {
        "listen": "127.0.0.1:0",
        "admin": {"listen": "127.0.0.1:0"},
        "telemetry": {"access_log": {"destination": "none"}},
        "upstreams": {
            "first": {"endpoints": [first]},
            "second": {"endpoints": [second], "probe_interval": "200ms"},
        },
        "models": {
            "photos": {
                "variants": {"onnx": model, "tensorrt": {"upstream": "second", "model": "photos_trt"}},
                "split": {"tensorrt": 75, "onnx": 25},
            },
            ODD_NAME: {"variants": {"only": model}},
        },
        **more,
    }


@pytest.fixture
async def scene(triton: LocalTriton, chromium: Browser, tmp_path: Path) -> AsyncIterator[Scene]:
    async with contextlib.AsyncExitStack() as second:
        address = await second.enter_async_context(Script().serve())
        file = tmp_path / "gateway.yaml"
        file.write_text(yaml.safe_dump(config_of(triton.grpc_address, address)))
        async with gateway_of(load(file, {})) as gateway:
            await chromium.open("about:blank")
            await chromium.complaints()  # of the page before, whose gateway has gone
            await chromium.resize(1280, 900)
            await chromium.prefer("light")
            yield Scene(gateway, chromium, second)


def table_of(label: str) -> str:
    """JavaScript: a table's rows as lists of texts."""
    rows = f"document.querySelectorAll('[aria-label=\"{label}\"] tbody tr')"
    return f"[...{rows}].map(row => [...row.cells].map(cell => cell.innerText.trim()))"


async def test_models_that_nobody_configured_are_shown_where_all_may_be_called(
    triton: LocalTriton, chromium: Browser
) -> None:
    async with transparent_to(triton.grpc_address) as gateway, channel_to(gateway.listen) as channel:
        traffic = gateway._telemetry.traffic
        assert traffic
        traffic.look()
        await call(channel, infer("add_one_a"))
        await call(channel, infer("nobody"))
        traffic.look()
        await chromium.open(f"http://{gateway.admin_address}/")
        label = "Models of Triton, by their own names"
        await chromium.until(f"{table_of(label)}.length > 5")
        rows = {row[0]: row for row in await chromium.run(f"return {table_of(label)}")}
        assert rows["add_one_a"][1] == "✓ ready"
        assert rows["add_one_a"][4].endswith("s")  # ms, or s on a busy machine
        assert rows["add_one_b"][1:4] == ["✓ ready", "0", "–"]
        assert [row[0] for row in await chromium.run(f"return {table_of('Called by other names')}")] == ["other"]
        assert "No public model" not in await chromium.text()
        assert not await chromium.complaints()


async def test_models_variants_and_endpoints_are_shown_with_their_numbers(scene: Scene) -> None:
    await scene.call(*["photos"] * 40)
    await scene.open()
    rows = {row[0]: row for row in await scene.page.run(f"return {table_of('Variants of photos')}")}
    assert rows["tensorrt"][1:3] == ["✓ ready", "75%"]
    assert rows["onnx"][-2:] == ["add_one_a", "first 1 of 1"]
    now = {name: float(row[3].rstrip("%")) for name, row in rows.items()}
    assert sum(now.values()) == pytest.approx(100, abs=0.2)
    assert now["tensorrt"] > now["onnx"]
    assert rows["tensorrt"][5] == "0"
    assert rows["tensorrt"][7].endswith("ms")
    (endpoint,) = await scene.page.run(f"return {table_of('Endpoints of first')}")
    assert endpoint[1:3] == ["✓ ready", "0"]
    assert await scene.page.run("return document.getElementById('status').innerText") == (
        "Serving. Nothing needs attention."
    )


async def test_an_endpoint_that_goes_down_shows_without_a_reload(scene: Scene) -> None:
    await scene.open()
    await scene.end_second()
    await scene.page.until(f"{MODEL}.innerText.includes('on its fallback')")
    notices = await scene.page.run("return document.querySelector('#attention ul').innerText")
    assert "model photos variant tensorrt (75%) is unavailable; its calls fall back to another" in notices
    assert "upstream second every endpoint is down" in notices
    assert "need attention" in await scene.page.run("return document.getElementById('status').innerText")
    (endpoint,) = await scene.page.run(f"return {table_of('Endpoints of second')}")
    assert endpoint[1].startswith("✕ down")


async def test_a_refused_config_shows_with_its_findings(scene: Scene, tmp_path: Path) -> None:
    watcher = scene.gateway._watcher
    watcher._load = lambda: load(tmp_path / "gateway.yaml", {})
    (tmp_path / "gateway.yaml").write_text("workers: many\n")
    await watcher.look(poked=True)
    await scene.open()
    (latest, first) = await scene.page.run(f"return {table_of('Recent changes of the config')}")
    assert (latest[1], first[1]) == ("✕ refused", "✓ in force")
    assert "workers" in latest[4]
    assert "file was refused" in await scene.page.run("return document.getElementById('attention').innerText")


def an_hour() -> Iterator[Point]:
    """Of two models: one with a split that moves, errors now and then and a gap; one that began a minute ago."""
    for minute in range(60):
        share = minute / 59
        calls = 600 + 200 * math.sin(minute / 6)
        variants = {"onnx": calls * (1 - share), "tensorrt": calls * share}
        errors = 30.0 if minute % 20 == 7 else 0.0
        p99 = None if 30 <= minute < 35 else 20 + minute / 3
        models = {"photos": ModelPoint(calls, errors, 8.0, p99, 4 + minute % 5, variants)}
        if minute == 59:
            models[ODD_NAME] = ModelPoint(3, 0, 5.0, 5.0, 1, {"only": 3})
        yield Point(1e9 + 60 * minute, 60.0, models, {"first/add_one_a": 16, "second/photos_trt": 0})


def hour_of(scene: Scene) -> None:
    traffic = scene.gateway._telemetry.traffic
    assert traffic
    for point in an_hour():
        traffic._history.add(point)


async def test_the_last_hour_is_drawn_and_said_in_words(scene: Scene) -> None:
    hour_of(scene)
    await scene.open()
    await scene.page.until(f"{MODEL}.querySelectorAll('svg').length === 5")
    said = await scene.page.run(f"return [...{MODEL}.querySelectorAll('svg')].map(each => each.ariaLabel)")
    assert said[0].startswith("Calls/s over the last hour: ")
    assert said[1] == "Errors/s over the last hour: 0, most 0.5"
    assert said[2] == "p99 over the last hour: 39.7 ms, most 39.7 ms"
    assert said[3] == "In flight over the last hour: 8, most 8, limit 16"
    assert said[4] == "Shares over the last hour: onnx 0%, tensorrt 100%"
    p99 = await scene.page.run(f"return {MODEL}.querySelectorAll('path.line')[2].getAttribute('d')")
    assert p99.count("M") == 2  # a gap where nothing was answered
    assert await scene.page.run(f"return {MODEL}.querySelectorAll('.limit').length") == 1
    assert await scene.page.run(f"return {MODEL}.querySelector('.legend').innerText") == "onnx\ntensorrt"
    only = "document.getElementById('model-%3Cb%3Eodd%26name')"
    assert await scene.page.run(f"return {only}.querySelectorAll('svg').length") == 4  # one variant has all of it
    assert await scene.page.complaints() == []


async def test_what_is_wrong_with_a_config_is_in_sight_in_a_narrow_window(scene: Scene, tmp_path: Path) -> None:
    watcher = scene.gateway._watcher
    watcher._load = lambda: load(tmp_path / "gateway.yaml", {})
    (tmp_path / "gateway.yaml").write_text("workers: many\n")
    await watcher.look(poked=True)
    await scene.page.resize(360, 800)
    await scene.open()
    finding = "document.querySelector('[aria-label=\"Recent changes of the config\"] td:last-child li')"
    where = await scene.page.run(f"const at = {finding}.getBoundingClientRect(); return [at.left, at.right]")
    assert 0 <= where[0] < where[1] <= 360


async def test_a_gateway_that_is_gone_is_said_so(scene: Scene) -> None:
    await scene.open()
    await scene.gateway._exits.aclose()
    await scene.page.until("document.getElementById('status').innerText.includes('has not answered since')")
    assert await scene.page.run(f"return {MODEL} !== null")  # what was known last stays


async def test_nothing_comes_from_elsewhere_and_the_policy_is_kept(scene: Scene) -> None:
    await scene.open()
    loaded = await scene.page.run(
        "return performance.getEntriesByType('resource').map(each => new URL(each.name).host)"
    )
    assert set(loaded) == {scene.gateway.admin_address}
    assert await scene.page.complaints() == []
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://{scene.gateway.admin_address}/") as answer,
    ):
        policy = answer.headers["Content-Security-Policy"]
        text = await answer.text()
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "<script>" not in text
    assert "style=" not in text


async def test_names_are_texts_whatever_is_in_them(scene: Scene) -> None:
    await scene.open()
    assert ODD_NAME in await scene.page.text()
    assert await scene.page.run("return document.querySelectorAll('main b').length") == 0


async def test_names_can_be_filtered_and_the_rest_comes_back(scene: Scene) -> None:
    await scene.open()
    field = "document.querySelector('[name=filter]')"
    await scene.page.run(f"{field}.focus()")
    await scene.page.press("o", "d", "d")
    await scene.page.until(f"{MODEL} === null")
    assert ODD_NAME in await scene.page.text()
    await scene.page.run(f"{field}.value = ''; {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")
    await scene.page.until(f"{MODEL} !== null")


async def test_an_update_leaves_focus_and_scrolling_alone(scene: Scene) -> None:
    await scene.open()
    await scene.page.resize(390, 844)
    region = "document.querySelector('[aria-label=\"Variants of photos\"]')"
    await scene.page.run(f"{region}.focus(); {region}.scrollLeft = 60; window.before = {region}")
    await scene.page.run("window.asOf = document.getElementById('updated').innerText")
    await scene.call("photos")
    await scene.page.until("document.getElementById('updated').innerText !== window.asOf")
    await scene.page.until(f"{MODEL}.innerText.includes('100%')")
    assert await scene.page.run(f"return document.activeElement === {region} && window.before === {region}")
    assert await scene.page.run(f"return {region}.scrollLeft") == 60


async def test_a_thousand_models_are_bounded_and_can_be_found(scene: Scene) -> None:
    """What needs attention is shown first; the filter finds the rest."""
    await scene.open()
    await scene.page.run(
        """
        const ask = window.fetch
        window.fetch = async (path, options) => {
          const answer = await (await ask(path, options)).json()
          const model = answer.models?.photos
          for (let number = 0; model && number < 1000; number++) answer.models[`m-${number}`] = model
          answer.attention?.push({severity: "error", kind: "model", name: "m-999", text: "no variant can answer"})
          return {ok: true, json: async () => answer}
        }
        document.dispatchEvent(new Event("visibilitychange"))
        """
    )
    await scene.page.until("document.querySelectorAll('#models article').length === 100")
    assert await scene.page.run("return document.querySelector('#models article').id") == "model-m-999"
    assert "100 of 1002 models are shown" in await scene.page.text()
    await scene.page.run("document.querySelector('[name=filter]').focus()")
    await scene.page.press(*"m-77")
    await scene.page.until("document.querySelectorAll('#models article').length === 11")


async def test_everything_is_reached_by_the_keyboard(scene: Scene) -> None:
    await scene.open()
    await scene.page.press(TAB)
    assert await scene.page.run("return document.activeElement.innerText") == "Skip to the state"
    await scene.page.press(ENTER)
    await scene.page.until("document.activeElement.id === 'main'")
    await scene.page.run("document.querySelector('[name=window]:checked').focus()")
    await scene.page.press(RIGHT)
    assert await scene.page.run("return document.querySelector('[name=window]:checked').value") == "15m"


PIPELINE = {
    "inputs": [{"name": "IN", "datatype": "FP32", "shape": [-1]}],
    "outputs": [{"name": "OUT", "datatype": "FP32", "shape": [-1]}],
    "steps": [{"call": "adder", "inputs": ["IN"], "outputs": ["OUT"]}],
}


async def test_an_ab_behind_a_pipeline_is_on_the_pipeline_s_card(
    triton: LocalTriton, chromium: Browser, tmp_path: Path
) -> None:
    variants = {name: {"upstream": "first", "model": f"add_one_{name}"} for name in "ab"}
    adder = {"variants": variants, "split": {"a": 75, "b": 25}}
    content = config_of(triton.grpc_address, "127.0.0.1:1")
    content["models"] = {"photos": {"pipeline": PIPELINE}, "adder": adder}
    file = tmp_path / "gateway.yaml"
    file.write_text(yaml.safe_dump(content))
    async with gateway_of(load(file, {})) as gateway, contextlib.AsyncExitStack() as nothing:
        scene = Scene(gateway, chromium, nothing)
        await chromium.resize(1280, 900)
        await scene.call(*["photos"] * 40)
        await scene.open()
        rows = {row[1]: row for row in await chromium.run(f"return {table_of('Variants behind photos')}")}
        note = await chromium.run("return document.getElementById('model-adder').innerText")
    assert [row[:4] for row in rows.values()] == [["adder", "a", "✓ ready", "75%"], ["adder", "b", "✓ ready", "25%"]]
    shares = {name: float(row[4].rstrip("%")) for name, row in rows.items()}
    assert sum(shares.values()) == pytest.approx(100, abs=0.2)
    assert shares["a"] > shares["b"]
    assert sum(int(row[5]) for row in rows.values()) == 40
    assert [row[6] for row in rows.values()] == ["0", "0"]
    assert "Called by photos; the numbers here are without these." in note


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
async def test_axe_finds_no_fault(scene: Scene, scheme: str, width: int) -> None:
    """Landmarks, names, roles, contrast: WCAG A and AA, and axe's best practices, with notices of each kind shown."""
    await scene.page.prefer(scheme)
    await scene.page.resize(width, 900)
    hour_of(scene)
    await scene.call("photos", "nobody", ODD_NAME)
    await scene.end_second()
    await asyncio.sleep(0.5)
    await scene.open()
    await scene.page.until("document.querySelector('.notices .error') !== null")
    await scene.page.run((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
    await scene.page.run("axe.run().then(found => { window.found = found })")
    await scene.page.until("window.found")
    shown = "return window.found.violations.map(each => [each.id, each.nodes.map(node => node.failureSummary)])"
    assert await scene.page.run(shown) == []
    assert await scene.page.run("return window.found.passes.some(each => each.id === 'color-contrast')")


async def test_a_rollout_is_shown_with_its_step_its_guardrails_and_its_history(scene: Scene) -> None:
    told = [
        RolloutNow(
            "int8-in-spring", "photos", "onnx", "tensorrt", "running", 2, 3, 0.25, 1.0, "the step has passed",
            ("600 s of its soak time are left",), (GuardrailNow("errors", "undecided", 0.04, "<b>at most</b>"),),
            1234, True, 0.5, 0.0, "", ((1.0, "running", 0.01, "the variant is ready"), (2.0, "running", 0.25, "<i>")),
        )
    ]  # fmt: skip
    scene.gateway.shown._rollouts = lambda: told
    await scene.open()
    card = "document.getElementById('rollout-int8-in-spring')"
    await scene.page.until(f"{card} !== null")
    text = await scene.page.run(f"return {card}.innerText")
    assert "Step 2 of 3, 25% of units, 1,234 seen. Waits: 600 s of its soak time are left." in text
    guardrails = await scene.page.run(f"return {table_of('Guardrails of int8-in-spring')}")
    assert guardrails == [["errors", "… undecided", "0.0400", "<b>at most</b>"]]
    history = await scene.page.run(f"return {table_of('History of int8-in-spring')}")
    assert [row[1:] for row in history] == [["running", "25%", "<i>"], ["running", "1%", "the variant is ready"]]
    await scene.page.run((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
    await scene.page.run("axe.run().then(found => { window.found = found })")
    await scene.page.until("window.found")
    assert await scene.page.run("return window.found.violations.map(each => each.id)") == []


async def test_a_bandit_is_shown_with_the_shares_of_its_epochs_and_what_is_wrong(scene: Scene) -> None:
    history = ((1.0, 0, {"onnx": 0.5, "tensorrt": 0.5}), (2.0, 1234, {"onnx": 0.125, "tensorrt": 0.875}))
    bandit = BanditNow(2, 20, history[-1][2], 2.0, 0.0, True, 0.5, "the store is away: <b>", "nobody comes", history)
    told = [ExperimentNow("spring", "photos", 3, {"onnx": 100, "tensorrt": 200}, 0.5, False, "", bandit)]
    scene.gateway.shown._experiments = lambda: told
    await scene.open()
    card = "document.getElementById('experiment-spring')"
    await scene.page.until(f"{card} !== null")
    text = await scene.page.run(f"return {card}.innerText")
    assert "A bandit in epoch 2 of 20: better arms get more of the units that come to take part." in text
    assert "Another one is due: nobody comes." in text
    assert "the store is away: <b>" in text
    epochs = await scene.page.run(f"return {table_of('Epochs of spring')}")
    assert [[row[0], *row[2:]] for row in epochs] == [["2", "1,234", "12.5%", "87.5%"], ["1", "–", "50%", "50%"]]
    await scene.page.run((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
    await scene.page.run("axe.run().then(found => { window.found = found })")
    await scene.page.until("window.found")
    assert await scene.page.run("return window.found.violations.map(each => each.id)") == []


async def test_a_narrow_window_never_scrolls_sideways_as_a_whole(scene: Scene) -> None:
    hour_of(scene)
    await scene.page.resize(360, 800)
    await scene.call("photos", "nobody")
    await scene.open()
    assert await scene.page.run("return document.documentElement.scrollWidth") <= 360


async def test_several_workers_are_one_page(triton: LocalTriton, chromium: Browser, tmp_path: Path) -> None:
    async with Script().serve() as second:
        content = config_of(triton.grpc_address, second, listen=free_address(), workers=2)
        file = tmp_path / "gateway.yaml"
        file.write_text(yaml.safe_dump(content))
        async with command("serve", "--config", str(file), folder=tmp_path) as supervisor:
            address, admin = await supervisor.until_serving()
            await until_readyz(admin, True, within=20)
            await asyncio.sleep(1)
            for _ in range(6):  # a connection each, so that the kernel spreads them
                async with channel_to(address) as channel:
                    await call(channel, infer("photos"))
            await chromium.resize(1280, 900)
            await chromium.open(f"http://{admin}/")
            await chromium.until("document.getElementById('facts').innerText.includes('Workers\\n2')")
            # Which variants the six were drawn for is chance; that one of them was is not.
            await chromium.until(f"[...{MODEL}.querySelectorAll('meter')].some((meter) => meter.value > 0)")
            state = await _state_when_it_has(admin, calls=6)
    assert state["models"]["photos"]["ready"] is True
    assert state["workers"].keys() == {"0", "1"}


async def _state_when_it_has(admin: str, calls: int) -> Any:
    """A worker tells of its calls a moment after their callers have their answers."""
    counted = 0
    for _ in range(600):
        _, state = await http(admin, "/state")
        counted = state["traffic"]["windows"][0]["models"]["photos"]["calls"]
        if counted == calls:
            return state
        await asyncio.sleep(0.1)
    raise AssertionError(f"{counted} calls are counted of {calls}")
