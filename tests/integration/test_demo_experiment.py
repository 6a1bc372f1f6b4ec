"""`inference-gateway demo --experiment`: on the real models, one variant goes live and a broken one does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from command_line import command, free_address, run

from gateway import demo_experiment
from gateway.config import load
from gateway.demo_experiment import ScenarioSettings, config


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_int8_is_promoted_and_nan_taken_back_and_no_user_fails(tmp_path: Path) -> None:
    addresses = ("--listen", free_address(), "--admin-listen", free_address())
    async with command("demo", "--experiment", "short", *addresses, folder=tmp_path) as demo:
        assert await demo.wait(280) == 0, demo.output + demo.errors
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


@pytest.mark.parametrize("is_short", [False, True], ids=["whole", "short"])
def test_check_has_nothing_to_say_of_its_config(tmp_path: Path, is_short: bool) -> None:
    settings = ScenarioSettings(tmp_path, "127.0.0.1:0", "127.0.0.1:0", is_short)
    file = tmp_path / "gateway.yaml"
    file.write_text(yaml.safe_dump(dict(config(settings, "127.0.0.1:9", tmp_path, demo_experiment._CASES))), "utf-8")
    assert not load(file, {}).warnings


async def test_a_config_that_it_would_not_use_is_refused(tmp_path: Path) -> None:
    code, output, errors = await run("demo", "--experiment", "--config", "own.yaml", folder=tmp_path)
    assert (code, output) == (2, "")
    assert "--experiment has a config of its own" in errors
