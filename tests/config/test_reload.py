"""The watcher hands on what changed, keeps what works, and never ends by itself. Nothing sleeps: looks are by hand."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from certificates import any_authority

from gateway.config import Config, ConfigError, Finding, Loaded, Watcher, load, restart_notices
from gateway.config.reload import Tracker

GOOD = "upstreams: {cpu: {endpoints: [triton:8001]}}\ndirect: {models: all}\n"


def attempts(most: int) -> str:
    """What makes another config of GOOD, without a restart."""
    return f"models: {{m: {{variants: {{a: {{upstream: cpu, model: x}}}}, attempts: {most}}}}}\n"


class Ear:
    """Hears what a watcher reports."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.config: Config | None = None
        self.raises: Exception | None = None

    async def changed(self, loaded: Loaded, notices: tuple[Finding, ...]) -> None:
        if self.raises is not None:
            raise self.raises
        self.config = loaded.config
        self.heard += ["changed", *map(str, notices)]

    def refused(self, findings: tuple[Finding, ...]) -> None:
        self.heard += ["refused", *map(str, findings)]

    def take(self) -> list[str]:
        heard, self.heard = self.heard, []
        return heard


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("g.yaml").write_text(GOOD)
    return Path("g.yaml")


def write(file: Path, text: str) -> None:
    file.write_text(text)


def remove(file: Path) -> None:
    file.unlink()


def watcher(file: Path, ear: Ear, period: float = 1.0) -> Watcher:
    def again() -> Loaded:
        return load(file, {})

    return Watcher(again, again(), ear.changed, ear.refused, period)


async def test_nothing_is_reported_while_nothing_changes(file: Path) -> None:
    ear = Ear()
    watching = watcher(file, ear)
    for _ in range(3):
        await watching.look()
    assert ear.take() == []


async def test_a_change_is_handed_on_when_it_has_settled(file: Path) -> None:
    """The first look sees that the file changed, the second that it is no longer being written."""
    ear = Ear()
    watching = watcher(file, ear)
    write(file, GOOD + attempts(5))
    await watching.look()
    assert ear.take() == []
    await watching.look()
    assert ear.take() == ["changed"]
    assert ear.config is not None
    assert ear.config.models["m"].attempts == 5
    await watching.look()
    assert ear.take() == []


async def test_a_file_that_is_still_written_is_not_read(file: Path) -> None:
    ear = Ear()
    watching = watcher(file, ear)
    for size in range(5):
        write(file, GOOD + "#" * size + "\n" + attempts(4))
        await watching.look()
    assert ear.take() == []


async def test_a_bad_file_keeps_the_old_config_and_says_so_once(file: Path) -> None:
    ear = Ear()
    watching = watcher(file, ear)
    write(file, GOOD + "sequences: {most: 0}\n")
    for _ in range(4):
        await watching.look()
    assert ear.take() == ["refused", "g.yaml:3: sequences.most: is 0; needs: whole number (1 to 10000000)"]


async def test_going_back_to_the_good_file_is_reported(file: Path) -> None:
    """Its values are those in force, yet everybody who was told of the refusal must hear that it is over."""
    ear = Ear()
    watching = watcher(file, ear)
    for text in ("nonsense", GOOD):
        write(file, text)
        for _ in range(2):
            await watching.look()
    assert [heard for heard in ear.take() if ":" not in heard] == ["refused", "changed"]


async def test_a_comment_is_no_change(file: Path) -> None:
    ear = Ear()
    watching = watcher(file, ear)
    write(file, "# hello\n" + GOOD)
    for _ in range(3):
        await watching.look()
    assert ear.take() == []


async def test_a_poke_reads_at_once_and_always_reports(file: Path) -> None:
    """Who sends SIGHUP wants to hear that it was done."""
    ear = Ear()
    watching = watcher(file, ear)
    await watching.look(poked=True)
    assert ear.take() == ["changed"]
    write(file, "nonsense")
    await watching.look(poked=True)
    assert ear.take() == ["refused", "g.yaml:1: is 'nonsense'; a mapping with at least 'upstreams'"]


async def test_a_file_that_goes_away_is_a_refusal(file: Path) -> None:
    ear = Ear()
    watching = watcher(file, ear)
    remove(file)
    for _ in range(3):
        await watching.look()
    assert ear.take() == ["refused", "g.yaml: cannot be read: No such file or directory; needs a readable YAML file"]


def in_place(folder: Path, text: str) -> None:
    (folder / "g.yaml").write_text(text)


def by_rename(folder: Path, text: str) -> None:
    (folder / "new").write_text(text)
    os.replace(folder / "new", folder / "g.yaml")


def by_link(folder: Path, text: str) -> None:
    """As Kubernetes updates a mounted ConfigMap: g.yaml → ..data/g.yaml, ..data → ..v1; then ..data turns to ..v2."""
    version = folder / f"..{len(list(folder.iterdir()))}"
    version.mkdir()
    (version / "g.yaml").write_text(text)
    (folder / "..tmp").symlink_to(version.name)
    os.replace(folder / "..tmp", folder / "..data")


@pytest.mark.parametrize("replace", [in_place, by_rename, by_link])
async def test_every_way_of_replacing_a_file_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: Callable[[Path, str], None]
) -> None:
    """Also when length and time of the new file are those of the old one and only the link tells them apart."""
    monkeypatch.chdir(tmp_path)
    if replace is by_link:
        (tmp_path / "g.yaml").symlink_to("..data/g.yaml")
    replace(tmp_path, GOOD + attempts(1))
    os.utime("g.yaml", ns=(0, 0))
    ear = Ear()
    watching = watcher(Path("g.yaml"), ear)
    replace(tmp_path, GOOD + attempts(2))
    if replace is not in_place:
        os.utime("g.yaml", ns=(0, 0))
    for _ in range(2):
        await watching.look()
    assert ear.take() == ["changed"]


async def test_a_file_that_the_config_names_is_watched_too(file: Path, tmp_path: Path) -> None:
    write(tmp_path / "ca.pem", "old\n" + any_authority())
    write(file, GOOD.replace("[triton:8001]", "[triton:8001], tls: {ca: ca.pem}"))
    ear = Ear()
    watching = watcher(file, ear)
    write(tmp_path / "ca.pem", "new one\n" + any_authority())
    for _ in range(2):
        await watching.look()
    assert ear.take() == ["changed"]


async def test_what_needs_a_restart_is_a_notice(file: Path) -> None:
    ear = Ear()
    watching = watcher(file, ear)
    write(file, GOOD + "workers: 4\nserver: {control: none}\n")
    await watching.look(poked=True)
    assert ear.take() == [
        "changed",
        "g.yaml: notice: workers: changes from 1 to 4 only with a restart",
        "g.yaml: notice: server.control: changes from 'loopback' to 'none' only with a restart",
    ]
    write(file, GOOD + attempts(2))
    await watching.look(poked=True)
    assert ear.take() == ["changed"]


def test_notices_compare_with_what_the_process_was_started_with() -> None:
    def config(**values: object) -> Config:
        return Config.model_validate({"upstreams": {"u": {"endpoints": ["t:1"]}}, **values})

    new = config(listen="0.0.0.0:5", admin={"listen": "0.0.0.0:6"}, server={"max_message_bytes": "1MiB", "drain": 5})
    assert [notice.key for notice in restart_notices(config(), new, "f")] == [
        "listen",
        "admin.listen",
        "server.max_message_bytes",
        "server.drain",
    ]


async def test_a_config_that_cannot_be_applied_is_refused(file: Path) -> None:
    ear = Ear()
    watching = watcher(file, ear)
    ear.raises = ConfigError([Finding("g.yaml", 1, "upstreams", "no such certificate", "")])
    await watching.look(poked=True)
    ear.raises = RuntimeError("secret detail")
    await watching.look(poked=True)
    assert ear.take() == [
        "refused",
        "g.yaml:1: upstreams: no such certificate",
        "refused",
        "g.yaml: could not be taken over: RuntimeError; see the log of this process",
    ]


async def test_a_listener_that_fails_does_not_end_the_watching(file: Path) -> None:
    ear = Ear()

    def broken(findings: tuple[Finding, ...]) -> None:
        raise RuntimeError("no ear")

    first = load(file, {})
    watching = Watcher(lambda: load(file, {}), first, ear.changed, broken)
    write(file, "nonsense")
    await watching.look(poked=True)
    write(file, GOOD)
    await watching.look(poked=True)
    assert ear.take() == ["changed"]


async def test_run_looks_when_poked_and_ends_when_cancelled(file: Path) -> None:
    heard = asyncio.Event()

    async def changed(loaded: Loaded, notices: tuple[Finding, ...]) -> None:
        heard.set()

    first = load(file, {})
    watching = Watcher(lambda: load(file, {}), first, changed, lambda findings: None, period=3600)
    running = asyncio.create_task(watching.run())
    watching.poke()
    await asyncio.wait_for(heard.wait(), 60)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def test_a_touch_that_comes_back_is_no_reason_to_read() -> None:
    """Between two looks the file was another one; what counts is what it is now."""
    tracker = Tracker(("a",), "digest")
    looks = [tracker.is_due((mark,), poked=False) for mark in "aabaabb"]
    assert looks == [True, False, False, False, False, False, True]


async def test_a_change_before_the_first_look_is_not_missed(file: Path) -> None:
    """Between reading the config and watching it a gateway starts, which takes a while."""
    ear = Ear()
    first = load(file, {})
    write(file, GOOD + attempts(5))
    watching = Watcher(lambda: load(file, {}), first, ear.changed, ear.refused)
    await watching.look()
    assert ear.take() == ["changed"]


async def test_a_missing_file_that_appears_is_enough(file: Path, tmp_path: Path) -> None:
    """The config was refused for want of it, and need not be touched again."""
    ear = Ear()
    watching = watcher(file, ear)
    write(file, GOOD.replace("[triton:8001]", "[triton:8001], tls: {ca: ca.pem}"))
    await watching.look(poked=True)
    assert ear.take()[0] == "refused"
    write(tmp_path / "ca.pem", "here\n" + any_authority())
    for _ in range(3):
        await watching.look()
    assert ear.take() == ["changed"]


async def test_a_reload_stops_nobody_to_look_for_garbage(file: Path) -> None:
    """A collection holds every thread, and thousands of models would make it a second."""
    write(file, GOOD)
    stops: list[int] = []

    def collected(phase: str, told: dict[str, int]) -> None:
        if phase == "start":
            stops.append(told["generation"])

    def many() -> Loaded:
        kept.extend([number] for number in range(200_000))  # as many objects as make Python look
        return load(file, {})

    async def taken(loaded: Loaded, notices: tuple[Finding, ...]) -> None:
        kept.extend([number] for number in range(200_000))

    kept: list[list[int]] = []
    watcher = Watcher(many, load(file, {}), taken, lambda findings: None)
    gc.callbacks.append(collected)
    try:
        await watcher.look(poked=True)
    finally:
        gc.callbacks.remove(collected)
    assert len(kept) == 400_000
    assert not stops
    assert gc.isenabled()


async def test_a_config_that_is_read_for_too_long_is_told_and_taken_over_when_it_is_read(file: Path) -> None:
    """As with a step whose constructor hangs."""
    ear, told, release = Ear(), asyncio.Event(), threading.Event()

    def slowly() -> Loaded:
        assert release.wait(60)
        return load(file, {})

    def refused(findings: tuple[Finding, ...]) -> None:
        ear.refused(findings)
        told.set()

    watcher = Watcher(slowly, load(file, {}), ear.changed, refused, slow=0.01)
    looking = asyncio.ensure_future(watcher.look(poked=True))
    await asyncio.wait_for(told.wait(), 60)
    assert gc.isenabled()
    first, text = ear.take()
    assert first == "refused"
    assert "is still being read after 0.01 s" in text
    release.set()
    await looking
    assert ear.take() == ["changed"]
