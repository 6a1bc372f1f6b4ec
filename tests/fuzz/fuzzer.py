"""Fuzzes by coverage, with atheris: `make fuzz`. Grown corpora are kept in .cache/fuzz, findings in the corpus itself.

    fuzzer.py --seconds 600 [TARGET...]    fuzz these targets, or all, as many at once as there are cores
    fuzzer.py --seconds 60 --keep 24       and then add the 24 smallest inputs that reach something new to the corpus

Findings are exceptions that a target does not catch, hangs, memory, and inputs that take more than 50 ms of CPU. An
input seems slower than it is while coverage is counted, so a fresh process measures it again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
GROWN = ROOT / ".cache" / "fuzz"
LONGEST = 4096  # bytes of an input
MOST_SECONDS = 0.05  # of CPU that an input may take
HANG_SECONDS = 20
MOST_SLOW = 20  # inputs that seem slow, of one run

Parts = list[bytes]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--keep", type=int, default=0)
    parser.add_argument("targets", nargs="*")
    arguments = parser.parse_args()
    targets = importlib.import_module("targets")
    names = arguments.targets or list(targets.TARGETS)
    print(f"{len(names)} targets, {arguments.seconds} s each", flush=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda name: _watched(name, arguments.seconds, arguments.keep), names))
    return int(any(found))


def _watched(name: str, seconds: int, keep: int) -> list[str]:
    """Fuzz one target in a process of its own. Returns its findings."""
    grown, slow = GROWN / name, GROWN / "slow" / name
    before = set(CORPUS.glob(f"{name}/*"))
    for folder in (grown, slow, CORPUS / name):
        folder.mkdir(parents=True, exist_ok=True)
    done = _fuzz(name, f"-max_total_time={seconds}", str(grown), str(CORPUS / name))
    for file in _judged(name, sorted(slow.iterdir())):
        file.rename(CORPUS / name / f"slow-{file.name}")
    findings = sorted(str(file.relative_to(ROOT)) for file in set(CORPUS.glob(f"{name}/*")) - before)
    if keep:
        _keep(name, grown, keep)
    runs = re.findall(r"^#(\d+)\s.*?cov: (\d+)", done.stderr, re.MULTILINE)
    print(f"{name:16} runs, edges: {', '.join(runs[-1]) if runs else 'none'}; findings: {findings}", flush=True)
    if done.returncode or findings or not runs:
        print(*done.stderr.splitlines()[-40:], sep="\n", flush=True)
    return findings or (["it ended with an error"] if done.returncode else [] if runs else ["nothing was counted"])


def _fuzz(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    limits = (f"-max_len={LONGEST}", f"-timeout={HANG_SECONDS}", "-rss_limit_mb=3072")
    command = [sys.executable, __file__, "--inside", name, *limits, f"-artifact_prefix={CORPUS / name}/", *options]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def _judged(name: str, files: Sequence[Path]) -> Iterator[Path]:
    """Those that are slow where nothing counts coverage."""
    for file in files:
        ran = subprocess.run([sys.executable, __file__, "--cost", name, str(file)], capture_output=True, check=True)
        if float(ran.stdout) > MOST_SECONDS:
            yield file
        else:
            file.unlink()


def _keep(name: str, grown: Path, most: int) -> None:
    """Add to the corpus what reaches code that the corpus does not; the smallest inputs of it."""
    new = GROWN / "new" / name
    new.mkdir(parents=True, exist_ok=True)
    for old in CORPUS.glob(f"{name}/*"):
        (new / old.name).write_bytes(old.read_bytes())
    had = set(new.iterdir())
    _fuzz(name, "-merge=1", str(new), str(grown))
    for file in sorted(set(new.iterdir()) - had, key=lambda file: file.stat().st_size)[:most]:
        (CORPUS / name / file.name[:12]).write_bytes(file.read_bytes())


# In the process that fuzzes


def _inside(name: str) -> None:
    import atheris  # noqa: PLC0415  (in a folder of its own, which only `make fuzz` has)

    # First, so that atheris comes before the finder by which GATEWAY_NO_EXTENSIONS chooses the sources; behind it, it
    # sees no import, and nothing is counted.
    importlib.import_module("gateway")
    with atheris.instrument_imports(include=["gateway"]):
        targets = importlib.import_module("targets")
    target, slow = targets.TARGETS[name], GROWN / "slow" / name

    def one(data: bytes) -> None:
        began = time.process_time()
        target(data)
        if time.process_time() - began > MOST_SECONDS and len(os.listdir(slow)) < MOST_SLOW:
            (slow / f"{hash(data) & 0xFFFFFFFF:08x}").write_bytes(data)

    extra = {}
    if name in SHAPES:

        def mutate(data: bytes, most: int) -> bytes:
            return bytes(atheris.Mutate(data, most))  # another function once it fuzzes, so not looked up before

        extra["custom_mutator"] = _mutator(*SHAPES[name], mutate)
    again = f"{sys.executable} {__file__} --inside {name}"  # which libFuzzer starts processes with, to merge
    atheris.Setup([again, *sys.argv[3:]], one, **extra)
    atheris.Fuzz()


def _mutator(
    split: Callable[[bytes], Parts], join: Callable[[Parts], bytes], mutate: Callable[[bytes, int], bytes]
) -> Callable[[bytes, int, int], bytes]:
    """Changes a part of an input, and half of the time writes the lengths around it anew: else most inputs would end at
    a length that is wrong."""

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        parts = split(data)
        if not parts or draw.random() < 0.3:
            return mutate(data, most)
        at = draw.randrange(len(parts))
        how = draw.random()
        if how < 0.6:
            parts[at] = mutate(parts[at], max(16, most - len(data)))
        elif how < 0.75:
            parts.insert(draw.randrange(len(parts) + 1), parts[at])
        elif how < 0.9:
            del parts[at]
        else:
            other = draw.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        return join(parts)[:most] if parts else b""

    return mutated


def _frames(data: bytes) -> Parts:
    """The byte that tells how the input is cut, then frames without their lengths."""
    parts, at = [data[:1]], 1
    while at + 9 <= len(data):
        end = at + 9 + int.from_bytes(data[at : at + 3], "big")
        parts.append(data[at + 3 : end])
        at = end
    return parts


def _of_frames(parts: Parts) -> bytes:
    return parts[0][:1].ljust(1, b"\0") + b"".join(
        max(0, len(part) - 6).to_bytes(3, "big") + part.ljust(6, b"\0") for part in parts[1:]
    )


def _counted(data: bytes) -> Parts:
    parts = []
    while data:
        size = int.from_bytes(data[:2], "big")
        parts.append(data[2 : 2 + size])
        data = data[2 + size :]
    return parts


def _of_counted(parts: Parts) -> bytes:
    return b"".join(min(len(part), 0xFFFF).to_bytes(2, "big") + part[:0xFFFF] for part in parts)


def _fields(data: bytes) -> Parts:
    """The top-level fields of a protobuf message: the tag and the value without its length."""
    from gateway.v2 import peek  # noqa: PLC0415  (not before it is instrumented)

    try:
        return [
            bytes([tag]) + data[value:end] if tag & 7 == 2 and tag < 0x80 else b"\0" + data[begin:end]
            for tag, begin, value, end in peek.fields(data, 0, len(data))
        ]
    except Exception:
        return []


def _of_fields(parts: Parts) -> bytes:
    from gateway.v2 import peek  # noqa: PLC0415  (not before it is instrumented)

    return b"".join(
        part[:1] + peek.encode_varint(len(part) - 1) + part[1:] if part and part[0] & 7 == 2 else part[1:]
        for part in parts
    )


def _prefixed(data: bytes) -> Parts:
    """The encoding, then messages: the flag and the body."""
    parts, at = [data[:1]], 1
    while at + 5 <= len(data):
        end = at + 5 + int.from_bytes(data[at + 1 : at + 5], "big")
        parts.append(data[at : at + 1] + data[at + 5 : end])
        at = end
    return parts


def _of_prefixed(parts: Parts) -> bytes:
    return parts[0][:1].ljust(1, b"\0") + b"".join(
        part[:1].ljust(1, b"\0") + len(part[1:]).to_bytes(4, "big") + part[1:] for part in parts[1:]
    )


def _lines(data: bytes) -> Parts:
    return data.split(b"\n")


_FRAMES, _COUNTED, _FIELDS = (_frames, _of_frames), (_counted, _of_counted), (_fields, _of_fields)
_LINES = (_lines, b"\n".join)
SHAPES: dict[str, tuple[Callable[[bytes], Parts], Callable[[Parts], bytes]]] = {
    "http2_server": _FRAMES,
    "http2_client": _FRAMES,
    "hpack_blocks": _COUNTED,
    "grpc_fields": _COUNTED,
    "grpc_messages": (_prefixed, _of_prefixed),
    "v2_request": _FIELDS,
    "v2_response": _FIELDS,
    "v2_stream": _COUNTED,
    "typed_request": _FIELDS,
    "config": _LINES,
    "experiments": _LINES,
    "captures": _LINES,
}
"""How the inputs of a target are taken apart and put together."""


def _cost(name: str, file: str) -> None:
    targets = importlib.import_module("targets")
    print(targets.seconds_of(targets.TARGETS[name], Path(file).read_bytes()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        _inside(sys.argv[2])
    elif sys.argv[1:2] == ["--cost"]:
        _cost(*sys.argv[2:4])
    else:
        sys.exit(main())
