"""What the usage log has of calls that have ended, and what becomes of it when it can't be written."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from gateway.hooks import AttemptEnded, AttemptStarted, CallEnded, CallHistory, CallStarted
from gateway.quotas import CallerQuota, Quotas, QuotaSettings
from gateway.quotas.usage import UsageCounts
from gateway.status import Code
from gateway.telemetry.usage import Usage, UsageLog
from gateway.types import Facts


def counts() -> UsageCounts:
    quotas = Quotas()
    quotas.apply(QuotaSettings("caller", {"acme": CallerQuota()}), None)
    return UsageCounts(quotas)


def call(caller: str, code: Code = Code.OK, model: str = "net", known: bool = True, **ended: Any) -> CallHistory:
    start = CallStarted("ModelInfer", model, known, "", "peer", 0.0, Facts({"caller": caller}), rows=5)
    attempts = [AttemptStarted("net", "v", "u", "e", n, "", 1.0 + n) for n in range(2)]
    outcomes = [AttemptEnded(code, "", None, 1.5 + n) for n in range(2)]
    return CallHistory(start, attempts, outcomes, (), CallEnded(code, "", None, 100, 30, 9.0, **ended))


def usage(folder: Path, counted: UsageCounts) -> Usage:
    return Usage(UsageLog(str(folder), 3600.0, 1 << 20, 3600.0, 10), counted, "0")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]


async def test_the_log_has_a_line_for_each_caller_and_model(tmp_path: Path) -> None:
    counted = counts()
    async with usage(tmp_path, counted):
        for _ in range(3):
            counted.call_ended(call("acme"))
        counted.call_ended(call("acme", Code.INTERNAL))
        counted.call_ended(call("acme", Code.RESOURCE_EXHAUSTED, callers_fault=True))
        counted.call_ended(call("one", model="invented", known=False))
    found = {(each["caller"], each["model"]): each for each in lines(tmp_path)}
    acme = found["acme", "net"]
    assert [acme[key] for key in ("requests", "failed", "refused", "rows", "request_bytes", "response_bytes")] == [
        3, 1, 1, 15, 300, 90,
    ]  # fmt: skip
    assert acme["upstream_seconds"] == 5.0
    assert found.keys() == {("acme", "net"), ("one", "")}


async def test_what_could_not_be_written_is_written_once_it_can_be(tmp_path: Path) -> None:
    counted, folder = counts(), tmp_path / "usage"
    folder.write_text("in the way")
    writer = usage(folder, counted)
    async with writer:
        counted.call_ended(call("acme"))
        writer._take()
        assert writer._ring is not None
        await asyncio.to_thread(writer._write, writer._ring, writer._ended())
        folder.unlink()
        writer._ring._quiet_until = 0.0
        counted.call_ended(call("acme"))
    assert sum(each["requests"] for each in lines(folder)) == 2


def test_metrics_name_only_callers_of_the_config_and_are_bounded() -> None:
    counted = counts()
    for number in range(30_000):
        counted.call_ended(call(f"caller-{number}"))
    counted.call_ended(call("acme"))
    assert len(counted.take()) <= 20_002  # with the others, and one that is named
    now = {(each.caller, each.model): each.requests for each in counted.now()}
    assert now == {("other", "net"): 30_000, ("acme", "net"): 1}
