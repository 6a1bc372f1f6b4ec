"""The unit for systemd: systemd itself understands it, it leaves little open, and its times fit the gateway's."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from deployment_files import ROOT

from gateway.cli import _parser
from gateway.config.serving import Server

FOLDER = ROOT / "deploy" / "systemd"
UNIT = FOLDER / "inference-gateway.service"

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")


def setting(name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)
    return str(value)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, whose program is one that is here."""
    file = tmp_path / UNIT.name
    file.write_text(UNIT.read_text().replace("/opt/inference-gateway/bin/inference-gateway", "/bin/true"))
    return file


def analyze(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@needs_systemd
def test_systemd_understands_every_line(unit: Path) -> None:
    assert analyze("verify", "--man=no", str(unit)) == (0, "")


@needs_systemd
def test_it_leaves_as_little_open_as_its_page_says(unit: Path) -> None:
    code, said = analyze("security", "--offline=yes", "--threshold=15", "--no-pager", str(unit))
    assert code == 0, said
    assert "1.4 OK" in said
    assert "gives it 1.4 of 10" in (FOLDER / "README.md").read_text()


def test_it_runs_a_command_that_there_is() -> None:
    words = shlex.split(setting("ExecStart"))
    assert _parser().parse_args(words[1:]).config == "/etc/inference-gateway/gateway.yaml"
    assert setting("ExecReload") == "kill -HUP $MAINPID"


def test_it_waits_until_calls_have_ended_and_stops_at_a_wrong_config() -> None:
    server = Server()
    wanted = server.drain_delay + server.drain + 5
    assert int(setting("TimeoutStopSec").removesuffix("s")) > wanted
    assert (setting("KillMode"), setting("Restart"), setting("RestartPreventExitStatus")) == ("mixed", "always", "2")


def test_it_may_open_a_file_for_each_connection() -> None:
    assert int(setting("LimitNOFILE")) > Server().max_connections + 64


def test_its_page_names_files_and_settings_that_are_there() -> None:
    page = (FOLDER / "README.md").read_text()
    for name in re.findall(r"deploy/systemd/(\S+?)(?:`| |$)", page, re.MULTILINE):
        assert not name or (FOLDER / name).exists(), name
    for name, value in re.findall(r"`([A-Z][a-z]\w+)=([^`]+)`", page):
        assert setting(name) == value
