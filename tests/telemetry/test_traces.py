"""What an OTLP receiver gets and what Triton is sent."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web
from command_line import children
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import get_tracer
from receiver import receiving
from traffic import until

from gateway.hooks import AttemptEnded, AttemptStarted, CallEnded, CallStarted
from gateway.status import Code, Meaning
from gateway.telemetry import span_pipe
from gateway.telemetry.access_log import AccessLog, AccessLogSettings, LineWriter
from gateway.telemetry.compose import compose
from gateway.telemetry.otel import BadTelemetrySettings, is_configured
from gateway.telemetry.span_pipe import SpanPipe
from gateway.telemetry.traces import Traces

ROOT = Path(__file__).parents[2]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
UNSAMPLED = {"traceparent": f"00-{TRACE}-{SPAN}-00"}
V2 = "inference.GRPCInferenceService"


class Receiver:
    """A real OTLP/HTTP receiver."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.url = ""

    async def post(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        self.requests.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(content_type="application/x-protobuf")

    @property
    def resources(self):
        return [attributes(group.resource) for request in self.requests for group in request.resource_spans]

    @property
    def spans(self) -> list[Span]:
        groups = [group for request in self.requests for group in request.resource_spans]
        return sorted(
            (span for group in groups for scope in group.scope_spans for span in scope.spans),
            key=lambda span: (span.start_time_unix_nano, -span.end_time_unix_nano),
        )

    @property
    def servers(self) -> list[Span]:
        """Those that stand for whole calls."""
        return [span for span in self.spans if span.kind == Span.SPAN_KIND_SERVER]


@pytest.fixture
async def receiver():
    receiver = Receiver()
    async with receiving("/v1/traces", receiver.post) as receiver.url:
        yield receiver


PATIENT = f"""#!{sys.executable}
import sys
from gateway.telemetry import span_exporter
span_exporter._LAST_SECONDS = 50.0
span_exporter.main(*sys.argv[3:])
"""
"""Stands for Python, and runs `-m gateway.telemetry.span_exporter VERSION LEVEL`."""


@pytest.fixture
def environment(monkeypatch, receiver, tmp_path):
    """Sets OTEL_* variables, the receiver's endpoint and a sampler of all among them, and nothing else of that name."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)

    def set_variables(**variables):
        usual = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_TRACES_SAMPLER": "parentbased_always_on"}
        for name, value in {**usual, **variables}.items():
            monkeypatch.setenv(name, value)

    set_variables()
    # At its end the gateway waits a moment for the last spans, and not for a busy machine; so does who exports them.
    monkeypatch.setattr(span_pipe, "_LAST_SECONDS", 60.0)
    patient = tmp_path / "patient"
    patient.write_text(PATIENT)
    patient.chmod(0o755)
    monkeypatch.setattr(span_pipe, "sys", SimpleNamespace(executable=str(patient)))
    return set_variables


@asynccontextmanager
async def traces():
    async with Traces(os.environ, "1.2.3") as listener:
        yield listener


def attributes(message):
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in message.attributes}


async def test_a_call_its_steps_and_attempts_form_one_tree_under_the_caller(receiver, environment, call, fallen_back):
    async with traces() as listener:
        call(metadata=SAMPLED, steps=[("decode", 0.002, "")], attempts=fallen_back).report_to(listener)
    server, step, first, second = receiver.spans
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE}
    assert server.parent_span_id.hex() == SPAN
    assert {span.parent_span_id for span in (step, first, second)} == {server.span_id}
    assert [span.kind for span in receiver.spans] == [
        Span.SPAN_KIND_SERVER,
        Span.SPAN_KIND_INTERNAL,
        Span.SPAN_KIND_CLIENT,
        Span.SPAN_KIND_CLIENT,
    ]
    assert [span.name for span in receiver.spans] == [f"{V2}/ModelInfer", "step decode", *[f"{V2}/ModelInfer"] * 2]
    assert attributes(server) == {
        "rpc.system": "grpc",
        "rpc.service": V2,
        "rpc.method": "ModelInfer",
        "rpc.grpc.status_code": 0,
        "client.address": "10.0.0.9:5",
        "gateway.model": "photos",
        "gateway.request_id": "r-1",
        "gateway.variant": "onnx",
        "gateway.model_version": "1",
        "gateway.endpoint": "cpu-0:8001",
        "gateway.attempts": 2,
        "gateway.fallback.from": "tensorrt",
        "gateway.fallback.reason": "unreachable",
    }
    assert attributes(first) == {
        "rpc.system": "grpc",
        "rpc.service": V2,
        "rpc.method": "ModelInfer",
        "rpc.grpc.status_code": 14,
        "server.address": "gpu-0:8001",
        "gateway.model": "photos",
        "gateway.variant": "tensorrt",
        "gateway.upstream": "cpu",
        "gateway.endpoint": "gpu-0:8001",
        "gateway.attempt": 1,
        "gateway.why": "split",
        "gateway.meaning": "unreachable",
    }
    assert (attributes(second)["gateway.attempt"], attributes(second)["gateway.why"]) == (2, "fallback")
    assert first.status.code == Status.STATUS_CODE_ERROR
    assert first.status.message == "connection refused"
    assert server.status.code == second.status.code == Status.STATUS_CODE_UNSET


async def test_a_call_names_its_experiment_and_the_arm_that_its_unit_was_assigned(receiver, environment, call, attempt):
    planned = "experiment:int8-in-spring"
    async with traces() as listener:
        call(metadata=SAMPLED, attempts=[attempt("int8", why=planned, planned=planned)]).report_to(listener)
        stands_in = attempt("fp32", why="fallback", instead_of="int8", reason="unavailable", planned=planned)
        call(metadata=SAMPLED, attempts=[stands_in]).report_to(listener)
        call(metadata=SAMPLED, attempts=[attempt(why="holdout:x", planned="holdout:x")]).report_to(listener)
    calls = [attributes(span) for span in receiver.spans if span.kind == Span.SPAN_KIND_SERVER]
    arms = [(each.get("gateway.experiment"), each.get("gateway.arm"), each["gateway.variant"]) for each in calls]
    assert set(arms) > {("int8-in-spring", "int8", "int8"), ("int8-in-spring", "int8", "fp32")}  # in any order
    assert sorted(str(arm) for _, arm, _ in arms) == ["None", "int8", "int8"]


async def test_a_call_names_its_rollout(receiver, environment, call, attempt):
    async with traces() as listener:
        planned = "rollout:int8-in-spring"
        call(metadata=SAMPLED, attempts=[attempt("int8", why=planned, planned=planned)]).report_to(listener)
    (span,) = [span for span in receiver.spans if span.kind == Span.SPAN_KIND_SERVER]
    assert (attributes(span)["gateway.rollout"], attributes(span)["gateway.arm"]) == ("int8-in-spring", "int8")


async def test_spans_last_as_long_as_what_they_stand_for(receiver, environment, call):
    async with traces() as listener:
        call(metadata=SAMPLED, steps=[("decode", 0.002, "")]).report_to(listener)
    lasted = [(span.end_time_unix_nano - span.start_time_unix_nano) / 1e6 for span in receiver.spans]
    assert lasted == pytest.approx([7.0, 2.0, 4.0], abs=0.01)


async def test_each_attempt_of_a_sampled_call_sends_its_own_parent(receiver, environment, call, fallen_back):
    async with traces() as listener:
        sent = call(metadata=SAMPLED | {"tracestate": "vendor=7"}, attempts=fallen_back).report_to(listener)
    _, first, second = receiver.spans
    assert [dict(metadata) for metadata in sent] == [
        {"traceparent": f"00-{TRACE}-{span.span_id.hex()}-01", "tracestate": "vendor=7"} for span in (first, second)
    ]


@pytest.mark.parametrize(
    ("sampler", "argument", "metadata"),
    [
        ("", "", UNSAMPLED),
        ("parentbased_traceidratio", "1.0", UNSAMPLED),
        ("parentbased_traceidratio", "0.0", {}),
        ("parentbased_always_off", "", {}),
        ("always_off", "", SAMPLED),
        ("traceidratio", "0.0", SAMPLED),
    ],
)
async def test_an_unsampled_call_is_neither_exported_nor_sent_on(
    sampler, argument, metadata, receiver, environment, call, fallen_back
):
    if sampler:
        environment(OTEL_TRACES_SAMPLER=sampler, OTEL_TRACES_SAMPLER_ARG=argument)
    async with traces() as listener:
        started = CallStarted("ModelInfer", "photos", True, "", "", 0.0, call(metadata=metadata).facts())
        assert listener.call_started(started) is None
        assert call(metadata=metadata, attempts=fallen_back).report_to(listener) == [(), ()]
    assert receiver.spans == []


@pytest.mark.parametrize("sampler", ["traceidratio", "parentbased_traceidratio"])
@pytest.mark.parametrize("metadata", [{}, {"traceparent": "garbage-00"}], ids=["no trace", "no trace that is one"])
async def test_a_ratio_records_its_share_of_the_traces_that_begin_here(sampler, metadata, receiver, environment, call):
    environment(OTEL_TRACES_SAMPLER=sampler, OTEL_TRACES_SAMPLER_ARG="0.25")
    async with traces() as listener:
        sent = [call(metadata=metadata).report_to(listener) for _ in range(600)]
    roots = {span.trace_id.hex() for span in receiver.spans if not span.parent_span_id}
    assert {dict(extra)["traceparent"].split("-")[1] for (extra,) in sent if extra} == roots
    assert 90 < len(roots) < 210  # 150 plus or minus six standard deviations


async def test_a_sampler_that_ignores_the_caller_records_what_the_caller_does_not(receiver, environment, call):
    environment(OTEL_TRACES_SAMPLER="always_on")
    async with traces() as listener:
        (sent,) = call(metadata=UNSAMPLED).report_to(listener)
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE}
    assert dict(sent)["traceparent"].endswith("-01")


async def test_a_call_without_a_caller_s_trace_begins_one(receiver, environment, call):
    async with traces() as listener:
        (sent,) = call().report_to(listener)
        call(metadata={"traceparent": "garbage-00"}).report_to(listener)
    roots = [span for span in receiver.spans if not span.parent_span_id]
    assert len(roots) == 2
    assert len({span.trace_id for span in roots}) == 2
    assert dict(sent)["traceparent"].split("-")[1] in {span.trace_id.hex() for span in roots}


async def test_the_task_s_own_context_is_no_parent(receiver, environment, call):
    """The gateway's calls are callbacks of one loop: what happens to run is nobody's parent."""
    async with traces() as listener:
        with get_tracer(__name__, tracer_provider=TracerProvider()).start_as_current_span("something else"):
            call().report_to(listener)
    assert sorted(bool(span.parent_span_id) for span in receiver.spans) == [False, True]


@pytest.mark.parametrize(("argument", "part"), [("", 0.01), ("0.25", 0.25)], ids=["default", "ratio"])
async def test_without_a_sampler_a_part_of_the_calls_without_a_trace_is_recorded(
    argument, part, receiver, environment, call
):
    """An endpoint alone must not make each call pay for a trace."""
    environment(OTEL_TRACES_SAMPLER="", OTEL_TRACES_SAMPLER_ARG=argument)
    async with traces() as listener:
        sent = [call().report_to(listener) for _ in range(4000)]
        of_the_caller = call(metadata=SAMPLED).report_to(listener)
        assert call(metadata=UNSAMPLED).report_to(listener) == [()]
        recorded = sum(bool(extra) for (extra,) in sent)
        await until(lambda: len(receiver.servers) > recorded, 60, "spans")  # the end allows 2 s for all that is left
    assert abs(recorded - 4000 * part) < 6 * (4000 * part) ** 0.5
    assert of_the_caller[0]
    assert len(receiver.servers) == recorded + 1


async def test_an_exporter_that_dies_is_started_again_and_one_that_hangs_is_not_waited_for(
    receiver, environment, call, caplog, monkeypatch
):
    monkeypatch.setattr(span_pipe, "_LAST_SECONDS", 2.5)
    async with traces() as listener:
        first = await exporter()
        os.kill(first, signal.SIGKILL)
        await until(lambda: "is started again" in caplog.text, 10, "the end is seen")
        second = await exporter(but=first)
        call().report_to(listener)
        await until(lambda: receiver.spans, 20, "the spans of the call")
        os.kill(second, signal.SIGSTOP)
        call().report_to(listener)
    assert "is killed" in caplog.text
    assert not exporters()


async def test_an_exporter_for_which_there_was_no_process_is_started_later(
    receiver, environment, call, caplog, monkeypatch
):
    """Else nothing would be exported any more, and nobody told."""
    async with traces() as listener:
        first, start, failed = await exporter(), SpanPipe._start, []

        async def fails_once(pipe):
            if not failed:
                failed.append(True)
                raise BlockingIOError(11, "Resource temporarily unavailable")
            return await start(pipe)

        monkeypatch.setattr(SpanPipe, "_start", fails_once)
        monkeypatch.setattr(span_pipe, "_RESTART_SECONDS", (0.05, 0.1))
        os.kill(first, signal.SIGKILL)
        await until(lambda: "can't be started" in caplog.text, 10, "it is told")
        await exporter(but=first)
        call().report_to(listener)
        await until(lambda: receiver.spans, 20, "the spans of the call")


async def test_spans_that_nobody_takes_are_dropped_and_counted(environment, call):
    dropped = []
    async with Traces(os.environ, "1.2.3", lambda: dropped.append(1)) as listener:
        process = await exporter()
        os.kill(process, signal.SIGSTOP)
        for _ in range(8):
            for _ in range(1000):
                call().report_to(listener)
            await asyncio.sleep(0.1)  # what waits goes into the pipe, which is not read
        os.kill(process, signal.SIGKILL)
    assert 1000 < len(dropped) < 15_000


async def exporter(but: int = 0) -> int:
    """The id of the process that exports the spans of this one, once it runs."""
    await until(lambda: set(exporters()) - {but}, 20, "a process that exports")
    return next(pid for pid in exporters() if pid != but)


def exporters() -> list[int]:
    words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(os.getpid())}  # a zombie has no words
    return [pid for pid, each in words.items() if b"gateway.telemetry.span_exporter" in each]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (Code.INVALID_ARGUMENT, Status.STATUS_CODE_UNSET),
        (Code.UNAVAILABLE, Status.STATUS_CODE_ERROR),
        (Code.INTERNAL, Status.STATUS_CODE_ERROR),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
async def test_only_failures_that_are_not_the_caller_s_mark_the_call(
    code, status, receiver, environment, call, attempt
):
    async with traces() as listener:
        failed = attempt(code=code, text="because", meaning=Meaning.SERVER)
        call(attempts=[failed], code=code, text="because").report_to(listener)
    server, client = receiver.spans
    assert (server.status.code, client.status.code) == (status, Status.STATUS_CODE_ERROR)
    assert attributes(server)["rpc.grpc.status_code"] == code


async def test_a_caller_s_fault_marks_no_call_whatever_its_code(receiver, environment, call, attempt):
    """Triton says UNAVAILABLE to who lacks the key of a restricted protocol."""
    async with traces() as listener:
        failed = attempt(code=Code.UNAVAILABLE, text="restricted", meaning=Meaning.CALLER)
        call(attempts=[failed], code=Code.UNAVAILABLE, text="restricted").report_to(listener)
    server, _ = receiver.spans
    assert server.status.code == Status.STATUS_CODE_UNSET


async def test_a_failed_step_says_why(receiver, environment, call):
    async with traces() as listener:
        call(steps=[("decode", 0.001, "not an image")], attempts=[], code=Code.INVALID_ARGUMENT).report_to(listener)
    (step,) = [span for span in receiver.spans if span.kind == Span.SPAN_KIND_INTERNAL]
    assert (step.status.code, step.status.message) == (Status.STATUS_CODE_ERROR, "not an image")


async def test_an_attempt_that_is_still_running_ends_with_its_call(receiver, environment, caplog):
    """The caller went away; the upstream's end comes later or never."""
    async with traces() as listener:
        observer = listener.call_started(CallStarted("ModelInfer", "photos", True, "", "", 1.0))
        observer.attempt_started(AttemptStarted("photos", "onnx", "cpu", "cpu-0:8001", 1, "split", 1.0))
        observer.ended(CallEnded(Code.CANCELLED, "", None, 1, 0, 1.5))
        observer.attempt_ended(AttemptEnded(Code.CANCELLED, "", Meaning.ENDED, 2.0))
    assert len(receiver.spans) == 2
    assert len({span.end_time_unix_nano for span in receiver.spans}) == 1
    assert caplog.records == []


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "inference-gateway"),
        ({"OTEL_SERVICE_NAME": "edge"}, "edge"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=edge,team=vision"}, "edge"),
    ],
    ids=["default", "service-name", "resource-attributes"],
)
async def test_the_service_has_our_name_unless_the_environment_gives_one(variables, name, receiver, environment, call):
    environment(**variables)
    async with traces() as listener:
        call().report_to(listener)
    (resource,) = receiver.resources
    assert (resource["service.name"], resource["service.version"]) == (name, "1.2.3")
    assert resource.get("team") == ("vision" if "OTEL_RESOURCE_ATTRIBUTES" in variables else None)


async def test_the_access_log_names_the_trace_that_the_gateway_began(receiver, environment, call):
    stream = io.StringIO()
    async with traces() as listener:
        with LineWriter(stream) as writer:
            call().report_to(compose([listener, AccessLog(AccessLogSettings(), writer)]))
    assert {f'"trace_id": "{span.trace_id.hex()}"' for span in receiver.spans} == {
        next(part for part in stream.getvalue().split(", ") if "trace_id" in part)
    }


async def test_a_collector_that_is_gone_disturbs_nobody(environment, call, unused_port, caplog):
    environment(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{unused_port}", OTEL_EXPORTER_OTLP_TIMEOUT="0.2")

    async def run():
        async with traces() as listener:
            call().report_to(listener)

    await asyncio.wait_for(run(), timeout=50)


@pytest.fixture
def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("environ", "configured"),
    [
        ({}, False),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_traces_are_off_until_an_exporter_or_endpoint_is_configured(environ, configured):
    assert is_configured("traces", environ) is configured


CONSOLE = """
import asyncio, os
from gateway.hooks import AttemptEnded, AttemptStarted, CallEnded, CallStarted, CallEnded
from gateway.status import Code
from gateway.telemetry.traces import Traces

async def main():
    async with Traces(os.environ) as traces:
        observer = traces.call_started(CallStarted("ModelInfer", "photos", True, "", "", 1.0))
        observer.ended(CallEnded(Code.OK, "", None, 1, 1, 1.1))

asyncio.run(main())
"""


def test_traces_to_the_console_come_as_text():
    environ = {**os.environ, "OTEL_TRACES_EXPORTER": "console", "OTEL_TRACES_SAMPLER": "always_on"}
    command = [sys.executable, "-W", "error", "-c", CONSOLE]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=True)
    assert '"gateway.model": "photos"' in done.stdout


@pytest.mark.parametrize(
    "variables",
    [{"OTEL_TRACES_EXPORTER": "zipkin"}, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}],
    ids=["exporter", "protocol"],
)
async def test_an_exporter_that_is_not_installed_is_a_clear_error(variables, environment):
    environment(**variables)
    with pytest.raises(BadTelemetrySettings, match=r"not installed; installed are .*otlp_proto_http"):
        async with traces():
            pass
