"""`inference-gateway demo --experiment`: on the real models, one variant goes live and a broken one does not."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
from pathlib import Path

import pytest
import yaml
from command_line import command, descendants, free_address, is_running, run
from rich.console import Console
from traffic import until
from tritonclient import grpc as triton_client

from gateway.config import load
from gateway.demo import experiment, showcase
from gateway.demo.experiment import NotAsExpected, ScenarioSettings, config


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_last_of_make_run_int8_is_promoted_and_nan_taken_back_and_no_user_fails(tmp_path: Path) -> None:
    """Beside what `make run` shows and serves, until Ctrl-C."""
    address = free_address()
    addresses = ("--listen", address, "--admin-listen", free_address())
    async with command("demo", "--with-experiment", *addresses, folder=tmp_path, group=True) as demo:
        await demo.until_said("Last, INT8 goes live")
        assert "espresso" in demo.output
        with triton_client.InferenceServerClient(address) as client:  # what is shown serves meanwhile
            assert client.is_model_ready("imagenet")
        await demo.until_said("stop Ctrl-C")
        os.killpg(demo.pid, signal.SIGINT)
        assert await demo.wait() == 0
        output, errors = demo.output, demo.errors
    assert not errors
    assert re.search(r"to-nan: rolled back, 0 % of users: 'nan' is broken", output)
    assert re.search(r"to-int8: running, 40 % of users", output)
    assert re.search(r"to-int8: promoted, 100 % of users", output)
    assert "failures that a user saw: 0, answers with NaN: 0" in output
    found = re.search(r"'int8' has the best label of FP32 in (\S+) % of \d+ copies; without a gateway: (\S+) %", output)
    assert found
    assert float(found[1]) == pytest.approx(float(found[2]), abs=5)
    assert "\x1b" not in output


@pytest.mark.slow
async def test_ctrl_c_in_the_middle_of_it_ends_all(tmp_path: Path) -> None:
    addresses = ("--listen", free_address(), "--admin-listen", free_address())
    async with command("demo", "--with-experiment", *addresses, folder=tmp_path, group=True) as demo:
        await demo.until_said("to-nan: waiting")
        processes = descendants(demo.pid)
        os.killpg(demo.pid, signal.SIGINT)
        assert await demo.wait() == 0
        assert "draining" in demo.output
        assert "promoted" not in demo.output
        assert not demo.errors
        await until(lambda: not any(map(is_running, processes)), 5, "the end of every process")


async def test_what_goes_wrong_in_it_is_told_and_the_demo_stays_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object) -> None:
        raise NotAsExpected("Not as expected: to-int8 is running after 100 s")

    monkeypatch.setattr(showcase, "play", fails)
    told = io.StringIO()
    asked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    await showcase._show_experiment(Console(file=told, width=100), tmp_path, asked)
    assert "experiment: Not as expected: to-int8 is running after 100 s" in told.getvalue()
    assert "A busy machine needs longer" in told.getvalue()


@pytest.mark.parametrize("is_short", [False, True], ids=["whole", "short"])
def test_check_has_nothing_to_say_of_its_config(tmp_path: Path, is_short: bool) -> None:
    settings = ScenarioSettings(tmp_path, "127.0.0.1:0", "127.0.0.1:0", is_short)
    file = tmp_path / "gateway.yaml"
    file.write_text(yaml.safe_dump(dict(config(settings, "127.0.0.1:9", tmp_path, experiment._CASES))), "utf-8")
    assert not load(file, {}).warnings


async def test_a_config_that_it_would_not_use_is_refused(tmp_path: Path) -> None:
    code, output, errors = await run("demo", "--experiment", "--config", "own.yaml", folder=tmp_path)
    assert (code, output) == (2, "")
    assert "--experiment has a config of its own" in errors
