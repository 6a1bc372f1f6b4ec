"""Telemetry: keeps requests of chosen models for replay, with their payloads. Off unless the config names a model.

May depend on config, fsspec and the V2 message classes. A call only hands its bytes over; a thread redacts, encodes
and writes them. What is kept is bounded: a share of the calls, a size per request, a ring of files per model, and the
bytes that wait for the thread. Of a caller's metadata only the keys that the config names are kept.

A file has one JSON object per line; docs/metrics.md lists its fields, and `replay` reads it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import queue
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from types import TracebackType
from typing import IO, Any
from urllib.parse import quote

import fsspec
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from gateway.config.serving import Capture
from gateway.forwarding.metadata import REPLAYED
from gateway.forwarding.topology import Take
from gateway.hooks import CallStarted
from gateway.v2.shapes import ImpossibleShape, elements_of

_log = logging.getLogger(__name__)

_WAITING_BYTES = 64 << 20  # bytes of requests that the thread has not written; further requests are dropped
_IDLE_SECONDS = 1.0  # between two checks whether a file is old enough to be closed
_QUIET_SECONDS = 10.0  # after a failed write, until the next one
_STOP_SECONDS = 5.0  # for the last writes at the end; an object store that hangs must not hold up a drained process

Job = tuple["_Ring", CallStarted, bytes, datetime]


class Captures:
    """Keeps requests between enter and exit; `apply` chooses the models."""

    def __init__(self, worker: str, draw: Callable[[], float] = random.random) -> None:
        """worker: unique among the processes of this host, for file names. draw: a number in [0, 1)."""
        self._writer = f"{socket.gethostname()}-{os.getpid()}-{worker}"
        self._draw = draw
        self._rings: Mapping[str, _Ring] = {}
        self._jobs: queue.SimpleQueue[Job | _Ring | None] = queue.SimpleQueue()
        self._handed = 0  # bytes given to the thread; only the event loop's thread counts
        self._done = 0  # bytes that the thread has finished; only that thread counts
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Captures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        """Write what is queued, and close the files."""
        self.apply(())
        if self._thread:
            self._jobs.put(None)
            self._thread.join(_STOP_SECONDS)

    def apply(self, settings: Sequence[Capture]) -> Mapping[str, Take]:
        """Follow new settings. Returns what to call for each model, by the name that callers use."""
        old, self._rings = self._rings, {}
        for each in settings:
            kept = old.get(each.model)
            self._rings[each.model] = kept if kept and kept.settings == each else _Ring(each, self._writer)
        for ring in old.values():
            if ring not in self._rings.values():
                self._jobs.put(ring)
        if self._rings and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
            self._thread.start()
        return {model: self._taker(ring) for model, ring in self._rings.items()}

    def _taker(self, ring: _Ring) -> Take:
        share, most = ring.settings.share, ring.settings.max_bytes

        def take(call: CallStarted, body: bytes) -> None:
            if not body or len(body) > most or REPLAYED in call.facts.metadata:
                return  # a replayed request was captured before, and would go round for ever
            if share < 1 and self._draw() >= share:
                return
            if self._handed - self._done + len(body) > _WAITING_BYTES:
                self._drop()
                return
            self._handed += len(body)
            self._jobs.put((ring, call, body, datetime.now(timezone.utc)))

        return take

    def _drop(self) -> None:
        if self._dropped == 0:
            _log.warning("capture: requests come faster than they can be written; some are left out")
        self._dropped += 1

    def _run(self) -> None:
        rings: set[_Ring] = set()
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                for ring in rings:
                    ring.close_if_old()
                continue
            if job is None:
                break
            if isinstance(job, _Ring):
                job.close()
                rings.discard(job)
                continue
            ring, call, body, at = job
            rings.add(ring)
            ring.write(call, body, at)
            self._done += len(body)
        for ring in rings:
            ring.close()


class _Ring:
    """The files of one model: when the last one is full or old, a new one begins, and the oldest is deleted.

    All writers of a folder share one ring, since all of its files count. Only the thread uses it.
    """

    def __init__(self, settings: Capture, writer: str) -> None:
        self.settings = settings
        self._writer = writer
        self._name = quote(settings.model, safe="")
        self._ours = re.compile(rf"{re.escape(self._name)}-\d{{8}}T\d{{12}}Z-.*\.jsonl")
        self._file: IO[bytes] | None = None
        self._path = ""  # of the open file, on its file system
        self._written = 0
        self._opened_at = 0.0
        self._quiet_until = 0.0

    def write(self, call: CallStarted, body: bytes, at: datetime) -> None:
        """Add one request. A folder that can't be written to is logged, and tried again after some seconds."""
        if time.monotonic() < self._quiet_until:
            return
        line = _line(self.settings, call, body, at)
        if line is None:
            return
        try:
            file = self._open_file(len(line), at)
            file.write(line)
            file.flush()
            if self._written == 0:
                self._drop_oldest()  # after the write: a file that can't grow must not cost a full one
            self._written += len(line)
        except Exception as error:  # each file system of fsspec raises errors of its own
            self._broken(error)

    def close_if_old(self) -> None:
        if time.monotonic() - self._opened_at > self.settings.file_age:
            self.close()

    def close(self) -> None:
        """Close the file; an object store shows it only then."""
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except Exception as error:
            self._broken(error)

    def _open_file(self, size: int, at: datetime) -> IO[bytes]:
        self.close_if_old()
        if self._file is not None and self._written + size > self.settings.file_bytes:
            self.close()
        if self._file is None:
            fs, folder = fsspec.core.url_to_fs(self.settings.directory)
            fs.makedirs(folder, exist_ok=True)
            name = f"{self._name}-{at:%Y%m%dT%H%M%S%f}Z-{self._writer}.jsonl"
            self._path = f"{folder}/{name}"
            self._file = fs.open(self._path, "wb")
            with contextlib.suppress(OSError):  # a file that is not on this host has no mode to set
                os.fchmod(self._file.fileno(), 0o600)
            self._written, self._opened_at = 0, time.monotonic()
        return self._file

    def _drop_oldest(self) -> None:
        """Delete the oldest files until there are no more than allowed."""
        fs, folder = fsspec.core.url_to_fs(self.settings.directory)
        fs.invalidate_cache(folder)
        names = sorted(path.rpartition("/")[2] for path in fs.ls(folder, detail=False))
        here = {self._path.rpartition("/")[2]}  # an object store does not list an open file
        ours = sorted(here.union(name for name in names if self._ours.fullmatch(name)))
        for name in ours[: max(0, len(ours) - self.settings.files)]:
            fs.rm_file(f"{folder}/{name}")

    def _broken(self, error: Exception) -> None:
        """Close the file after a failed write, and delete it if it is empty; a later request tries again."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):  # closing repeats the write that failed
                file.close()
            if self._written == 0:
                with contextlib.suppress(Exception):
                    fsspec.core.url_to_fs(self.settings.directory)[0].rm_file(self._path)
        _log.error(
            "capture: nothing of %s is kept in %s for %g s: %s",
            *(self.settings.model, self.settings.directory, _QUIET_SECONDS, error),
        )
        self._quiet_until = time.monotonic() + _QUIET_SECONDS


def _line(settings: Capture, call: CallStarted, body: bytes, at: datetime) -> bytes | None:
    """One line of a file; None if the request can't be parsed, since then it can't be redacted either."""
    redacted: list[str] = []
    if settings.redact:
        try:
            message = pb.ModelInferRequest.FromString(body)
        except DecodeError:
            return None
        redacted = redact(message, settings.redact)
        body = message.SerializeToString()
    metadata = call.facts.metadata
    fields = {
        "time": at.isoformat(timespec="milliseconds"),
        "method": call.method,
        "model": call.model,
        "request_id": call.request_id,
        "metadata": {key: metadata[key] for key in settings.metadata if key in metadata},
        "redacted": redacted,
        "request": base64.b64encode(body).decode(),
    }
    return json.dumps(fields).encode() + b"\n"


def redact(message: Any, names: Sequence[str]) -> list[str]:
    """Replace the values of these inputs by zeros (or empty texts), and remove parameters of these names.

    Shapes stay, so a redacted request can still be replayed.

    message: a ModelInferRequest (Any: its class carries no types), changed in place.
    returns: the names that were found.
    """
    found = []
    raw_index = 0
    for tensor in message.inputs:
        has_raw = "shared_memory_region" not in tensor.parameters
        if tensor.name in names:
            found.append(tensor.name)
            _clear_typed(tensor.contents)
            if has_raw and raw_index < len(message.raw_input_contents):
                raw = message.raw_input_contents[raw_index]
                message.raw_input_contents[raw_index] = _zeros(tensor, len(raw))
        raw_index += has_raw
    for name in names:
        if name in message.parameters:
            found.append(name)
            del message.parameters[name]
    return found


def _zeros(tensor: Any, size: int) -> bytes:
    """Raw contents of as many elements: zeros, or texts that are empty, each with its length in four bytes."""
    if tensor.datatype != "BYTES":
        return bytes(size)
    try:
        elements = elements_of(tensor.shape)
    except ImpossibleShape:
        elements = size
    return bytes(4 * min(elements, size // 4))  # no more than arrived, whatever the shape claims


def _clear_typed(contents: Any) -> None:
    for _, values in contents.ListFields():
        empty = [type(value)() for value in values]
        del values[:]
        values.extend(empty)
