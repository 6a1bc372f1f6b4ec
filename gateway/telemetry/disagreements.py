"""Telemetry: keeps the answers of shadows that disagree with those of callers, for people to look at.

May depend on config and fsspec. The thread that compares answers hands them over, and writes them. What is kept is
bounded by a ring of files for each model. A file has one JSON object per line; docs/shadowing.md lists its fields, and
`replay` reads those that hold their request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import socket
from collections.abc import Mapping
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

from gateway.config import Config
from gateway.config.shadowing import Keep
from gateway.forwarding.shadowing import Compared, Pair
from gateway.telemetry.ring import Ring, RingSettings

_log = logging.getLogger(__name__)

_FILE_SECONDS = 300.0  # after which a file ends, so that an object store shows it


class Disagreements:
    """Those of all models, between enter and exit; `apply` chooses the models."""

    def __init__(self, worker: str) -> None:
        """worker: unique among the processes of this host, for file names."""
        self._writer = f"{socket.gethostname()}-{os.getpid()}-{worker}"
        self._kept: Mapping[tuple[str, str], tuple[Keep, Ring]] = {}  # by model and shadow

    def __enter__(self) -> Disagreements:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        for _, ring in self._kept.values():
            ring.close()

    def apply(self, config: Config) -> None:
        """Follow a new config. A ring stays while its settings do."""
        wanted = {
            (name, shadow): each.keep
            for name, model in config.models.items()
            for shadow, each in model.shadow.items()
            if each.keep is not None
        }
        old = self._kept
        self._kept = {
            key: old[key] if key in old and old[key][0] == keep else (keep, self._ring(key[0], keep))
            for key, keep in wanted.items()
        }
        for key, (_, ring) in old.items():
            if key not in self._kept or self._kept[key][1] is not ring:
                ring.close()

    def _ring(self, model: str, keep: Keep) -> Ring:
        settings = RingSettings("shadow", model, keep.directory, keep.file_bytes, _FILE_SECONDS, keep.files)
        return Ring(settings, self._writer)

    def take(self, pair: Pair, compared: Compared) -> None:
        """Keep the pair if its answers disagree, or could not be compared."""
        keep, ring = self._kept.get((pair.model, pair.shadow), (None, None))
        if keep is None or ring is None or ring.is_quiet:
            return
        if compared.agreement is not None and compared.agreement.agrees:
            return
        at = datetime.now(timezone.utc)
        ring.write(json.dumps(_fields(pair, compared, keep, at)).encode() + b"\n", at)


def _fields(pair: Pair, compared: Compared, keep: Keep, at: datetime) -> Mapping[str, Any]:
    fields: dict[str, Any] = {
        "time": at.isoformat(timespec="milliseconds"),
        "method": "ModelInfer",
        "model": pair.model,
        "request_id": pair.request_id,
        "metadata": {},
        "redacted": [],
        "variant": pair.variant,
        "shadow": pair.shadow,
        "why": compared.why,
        "measures": {} if compared.agreement is None else dict(compared.agreement.measures),
        "not_finite": list(compared.wrong),
    }
    for name, body, is_kept in (
        ("request", pair.request, keep.request),
        ("answer", pair.answer, True),
        ("shadow_answer", pair.copy, True),
    ):
        fields[f"{name}_sha256"] = hashlib.sha256(body).hexdigest()
        if is_kept and len(body) <= keep.max_bytes:
            fields[name] = base64.b64encode(body).decode()
    return fields
