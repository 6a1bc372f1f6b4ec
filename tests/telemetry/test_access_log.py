"""Which calls get a line, and what a line says."""

from __future__ import annotations

import io
import json
import threading
import time
from datetime import datetime, timezone

import pytest

from gateway.status import Code, Meaning
from gateway.telemetry.access_log import AccessLog, AccessLogSettings, LineWriter, gap_of

NOON = datetime(2026, 1, 2, 12, 0, tzinfo=timezone.utc)
TRACE = "0af7651916cd43dd8448eb211c80319c"


class Lines(list):
    write = list.append
    left_out = 0

    def may_write(self):
        return True

    def leave_out(self):
        self.left_out += 1

    def log(self, share=0.0, slow_seconds=1.0, draw=lambda: 0.5):
        return AccessLog(AccessLogSettings(share, slow_seconds, "3"), self, draw, now=lambda: NOON, clock=lambda: 5.0)


@pytest.fixture
def lines():
    return Lines()


def test_a_line_tells_the_whole_call_in_one_json_object(lines, call, fallen_back):
    traceparent = f"00-{TRACE}-b7ad6b7169203331-01"
    call(attempts=fallen_back, metadata={"traceparent": traceparent}).report_to(lines.log())
    assert [json.loads(line) for line in lines] == [
        {
            "time": "2026-01-02T12:00:00.000+00:00",
            "logged": "fallback",
            "method": "ModelInfer",
            "model": "photos",
            "variant": "onnx",
            "model_version": "1",
            "endpoint": "cpu-0:8001",
            "attempts": 2,
            "fallback": "tensorrt: unreachable",
            "cache": "",
            "code": "OK",
            "error": "",
            "ms": 6.0,
            "bytes_in": 1000,
            "bytes_out": 40,
            "request_id": "r-1",
            "trace_id": TRACE,
            "peer": "10.0.0.9:5",
            "caller": "",
            "worker": "3",
        }
    ]


def test_every_error_is_logged_with_the_target_that_failed_last(lines, call, attempt):
    down = attempt(code=Code.UNAVAILABLE, text="gone", meaning=Meaning.UNREACHABLE)
    call(attempts=[down], code=Code.UNAVAILABLE, text="gone").report_to(lines.log())
    line = json.loads(lines[0])
    assert (line["logged"], line["code"], line["error"]) == ("error", "UNAVAILABLE", "gone")
    assert (line["variant"], line["endpoint"]) == ("onnx", "cpu-0:8001")


def test_a_call_refused_before_any_attempt_is_logged_without_a_target(lines, call):
    call(attempts=[], code=Code.NOT_FOUND, text="no such model").report_to(lines.log())
    line = json.loads(lines[0])
    assert (line["variant"], line["endpoint"], line["attempts"]) == ("", "", 0)


def test_who_is_over_his_quota_fills_no_log_and_keeps_no_line_of_others_out(lines, call):
    log = lines.log()
    for _ in range(1000):
        call(attempts=[], code=Code.RESOURCE_EXHAUSTED, text="used up", callers_fault=True).report_to(log)
    for _ in range(3):
        call(attempts=[], code=Code.RESOURCE_EXHAUSTED, text="the model is full").report_to(log)
    assert [json.loads(line)["error"] for line in lines] == ["used up"] * 20 + ["the model is full"] * 3
    assert lines.left_out == 980


def test_a_line_that_nobody_takes_is_not_made(lines, call, monkeypatch):
    monkeypatch.setattr(lines, "may_write", lambda: False)
    call(attempts=[], code=Code.INTERNAL, text="a fault").report_to(lines.log())
    assert not lines


@pytest.mark.parametrize(("seconds", "logged"), [(0.998, []), (1.0001, ["slow"])], ids=["below", "above"])
def test_a_call_slower_than_the_threshold_is_logged(seconds, logged, lines, call, attempt):
    call(attempts=[attempt(seconds=seconds)], overhead=0.0).report_to(lines.log(slow_seconds=1.0))
    assert [json.loads(line)["logged"] for line in lines] == logged


@pytest.mark.parametrize(
    ("share", "drawn", "count"),
    [(0.0, 0.0, 0), (0.1, 0.099, 1), (0.1, 0.1, 0), (1.0, 0.999, 1)],
    ids=["never", "drawn", "not-drawn", "always"],
)
def test_of_the_rest_a_share_is_logged(share, drawn, count, lines, call):
    call().report_to(lines.log(share=share, draw=lambda: drawn))
    assert [json.loads(line)["logged"] for line in lines] == ["share"] * count


@pytest.mark.parametrize("nasty", ["a\r\nb", "\x1b[31mred", "\u2028\x85", "\ud800", '"}{"'])
def test_text_of_callers_cannot_break_or_colour_a_line(nasty, lines, call):
    call(model=nasty, request_id=nasty, code=Code.NOT_FOUND, text=nasty, attempts=[]).report_to(lines.log())
    (line,) = lines
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert line[:-1].isascii()
    assert json.loads(line)["model"] == nasty


def test_endless_texts_are_cut(lines, call):
    long = "x" * 100_000
    call(model=long, request_id=long, code=Code.NOT_FOUND, text=long, attempts=[]).report_to(lines.log())
    assert len(lines[0]) < 4_000


def test_metadata_of_callers_is_never_logged(lines, call):
    secrets = {"authorization": "Bearer s3cret", "cookie": "s3cret", "traceparent": "s3cret"}
    call(metadata=secrets).report_to(lines.log(share=1.0))
    assert len(lines) == 1
    assert "s3cret" not in lines[0]


def test_the_writer_writes_every_line_before_it_closes():
    stream = io.StringIO()
    with LineWriter(stream) as writer:
        for number in range(2_000):
            writer.write_nowait(f"{number}\n")
    assert stream.getvalue().split() == [str(number) for number in range(2_000)]


class StuckStream(io.StringIO):
    """A pipe that nobody reads until `free`."""

    def __init__(self):
        super().__init__()
        self.reached, self.free = threading.Event(), threading.Event()

    def write(self, text):
        self.reached.set()
        assert self.free.wait(30)
        return super().write(text)


def test_a_stuck_stream_loses_lines_says_how_many_and_delays_nobody():
    stream = StuckStream()
    with LineWriter(stream, limit=5) as writer:
        writer.write_nowait("first\n")
        assert stream.reached.wait(30)
        for _ in range(20):
            writer.write_nowait("later\n")
        stream.free.set()
    lines = stream.getvalue().splitlines()
    assert lines.count("later") == 5
    assert json.loads(lines[-1]) == {"logged": "gap", "dropped": 15, "worker": "0"}


class CountedStream(io.StringIO):
    """Counts how often it is written to."""

    writes = 0

    def write(self, text):
        self.writes += 1
        return super().write(text)


def test_lines_that_come_close_together_are_written_together_and_the_first_at_once():
    stream = CountedStream()
    with LineWriter(stream, rest=0.5) as writer:
        writer.write_nowait("first\n")
        while not stream.writes:
            time.sleep(0.001)
        for _ in range(20):
            writer.write_nowait("later\n")
            time.sleep(0.002)
    assert stream.getvalue().split() == ["first", *["later"] * 20]
    assert stream.writes <= 3


def test_a_closed_stream_is_reported_once(caplog):
    stream = io.StringIO()
    stream.close()
    with LineWriter(stream) as writer:
        writer.write_nowait("lost\n")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["access log"]


def test_a_stream_that_cannot_be_written_is_complained_about_once_a_minute(caplog):
    """A full disk takes a line now and then."""
    stream, now = io.StringIO(), [1000.0]
    stream.close()
    writer = LineWriter(stream, clock=lambda: now[0])
    for seconds in (0, 1, 58, 2, 1):
        now[0] += seconds
        with writer:
            writer.write_nowait("lost\n")
    assert len(caplog.records) == 2


def test_lines_above_the_rate_are_left_out_and_counted():
    stream, now = io.StringIO(), [1000.0]
    writer = LineWriter(stream, per_second=2, clock=lambda: now[0], gap=gap_of("1"))
    for _ in range(5):
        writer.write_nowait("line\n")
    now[0] += 1
    writer.write_nowait("later\n")
    with writer:
        pass
    assert stream.getvalue() == 'line\nline\nlater\n{"logged": "gap", "dropped": 3, "worker": "1"}\n'
