"""A pipeline is one more model: requests in, answers out, and true answers about itself.

The model that it calls is a function here; tests/integration has the same over a real Triton.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import BadInput, BadRequest, Bug, GatewayError, NoTarget, UnknownModel
from gateway.forwarding.caller import metadata_from_pairs
from gateway.forwarding.exchange import Reply, Request
from gateway.forwarding.messages import build_request, build_response, parse_request, parse_response, tensors_of
from gateway.forwarding.pipelines import PipelineModel
from gateway.forwarding.threads import Threads
from gateway.hooks import CallObserver, NoObserver, StepEnded
from gateway.steps import PipelineSpec, Work, WrongAnswer, build_pipeline
from gateway.types import Served

DECLARED = PipelineSpec.model_validate(
    {
        "inputs": [{"name": "logits", "datatype": "FP32", "shape": [-1]}],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [1]},
            {"name": "score", "datatype": "FP32", "shape": [1]},
        ],
        "max_batch_size": 4,
        "steps": [
            {"step": "softmax", "inputs": {"scores": "logits"}, "outputs": {"scores": "logits"}},
            {"call": "calibrator", "inputs": ["logits"], "outputs": ["scores"]},
            {"step": "top_k", "with": {"k": 1, "labels": "labels.txt"}},
        ],
    }
)


EMPTY_FINAL = "triton_enable_empty_final_response"


class Calibrator:
    """The model that is called: answers its input, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.seen: list[Request] = []
        self.error: BaseException | None = None
        self.rows: int | None = None

    async def call(self, request: Request, observer: CallObserver) -> Reply:
        message = parse_request(request.whole())
        self.asked.append(message)
        self.seen.append(request)
        if self.error is not None:
            raise self.error
        scores = tensors_of(message.inputs, message.raw_input_contents)["logits"][: self.rows]
        body = build_response("calibrator", "7", message.id, {"scores": ("FP32", scores)})
        return Reply(body, (), (), Served("calibrator", "gpu", "7", "a:1", 2))


class Steps(NoObserver):
    """Notes what is reported."""

    def __init__(self) -> None:
        self.ended_steps: list[StepEnded] = []

    def step_ended(self, event: StepEnded) -> None:
        self.ended_steps.append(event)


@pytest.fixture
def calibrator() -> Calibrator:
    return Calibrator()


@pytest.fixture
async def model(calibrator: Calibrator) -> AsyncIterator[PipelineModel]:
    pipeline = build_pipeline("colours", DECLARED, lambda _: b"red\ngreen\nblue\n")
    async with Threads(2, 2) as threads:
        yield PipelineModel(pipeline, threads, calibrator.call, lambda name: name == "calibrator")


def request(rows: int = 2, **fields: Any) -> Request:
    logits = np.array([[0, 0, 9], [9, 0, 0], [0, 9, 0]] * 2, np.float32)[:rows]
    return Request(build_request("colours", {"logits": logits}, **fields), metadata_from_pairs([("x-user", "me")]))


async def infer(model: PipelineModel, asked: Request) -> dict[str, Any]:
    reply = await model.infer(asked, NoObserver())
    return {name: array.ravel().tolist() for name, (_, array) in parse_response(reply.body).items()}


async def test_a_batch_is_one_call_of_the_model(model: PipelineModel, calibrator: Calibrator) -> None:
    answer = await infer(model, request(rows=3))
    assert answer["label"] == [b"blue", b"red", b"green"]
    assert answer["score"] == pytest.approx([1, 1, 1], abs=1e-3)
    assert [list(message.inputs[0].shape) for message in calibrator.asked] == [[3, 3]]


async def test_the_answer_carries_the_pipelines_name_the_callers_id_and_who_answered(model: PipelineModel) -> None:
    reply = await model.infer(request(id="r-1"), NoObserver())
    message = pb.ModelInferResponse.FromString(reply.body)
    assert (message.model_name, message.model_version, message.id) == ("colours", "1", "r-1")
    assert reply.served == Served("colours", "gpu", "7", "a:1", 2)
    assert dict(reply.trailing)["gateway-variant"] == "gpu"
    timings = reply.timings
    assert timings is not None
    assert min(timings.preprocess, timings.model, timings.postprocess) > 0


async def test_only_the_outputs_that_were_asked_for_are_answered(model: PipelineModel) -> None:
    assert list(await infer(model, request(outputs=("score",)))) == ["score"]


async def test_metadata_id_and_own_parameters_reach_the_model_and_tritons_do_not(
    model: PipelineModel, calibrator: Calibrator
) -> None:
    kept = {"tenant": "t", "timeout_policy": "x", "priority_lane": "y"}
    parameters = {key: pb.InferParameter(string_param=value) for key, value in kept.items()}
    parameters |= {key: pb.InferParameter(int64_param=1) for key in ("sequence_id", "priority", "timeout", "headers")}
    parameters |= {key: pb.InferParameter(bool_param=True) for key in ("sequence_start", EMPTY_FINAL)}
    await infer(model, request(id="r-1", parameters=parameters))
    assert {key: value.string_param for key, value in calibrator.asked[0].parameters.items()} == kept
    assert calibrator.asked[0].id == "r-1"
    assert calibrator.seen[0].metadata.passed == ((b"x-user", b"me"),)


def _with_classification() -> Request:
    message = parse_request(request(outputs=("label",)).body)
    message.outputs[0].parameters["classification"].int64_param = 2
    return Request(message.SerializeToString())


REFUSED = {
    "version": (request(version="2"), UnknownModel, "unknown model: 'colours' version 2"),
    "output": (request(outputs=("labels",)), BadInput, "output 'labels' is unknown; 'colours' has label, score"),
    "classification": (_with_classification(), BadInput, "takes no parameters, but classification is given"),
    "rows": (request(rows=5), BadInput, "input 'logits': 5 rows; 'colours' takes 1 to 4"),
    "no rows": (request(rows=0), BadInput, "input 'logits': 0 rows"),
    "input": (Request(build_request("colours", {"x": np.zeros(1)})), BadInput, "input 'x' is unknown"),
    "no input": (Request(build_request("colours", {})), BadInput, "input 'logits' is missing"),
}


@pytest.mark.parametrize(("asked", "error", "text"), REFUSED.values(), ids=REFUSED)
async def test_a_request_that_does_not_fit_is_refused_before_any_call(
    model: PipelineModel, calibrator: Calibrator, asked: Request, error: type[GatewayError], text: str
) -> None:
    with pytest.raises(error, match=text):
        await model.infer(asked, NoObserver())
    assert not calibrator.asked


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("p", pb.InferParameter(uint64_param=1), "invalid value type for 'p' parameter, expected int64_param, bool_"),
        ("p", pb.InferParameter(), "invalid value type for 'p' parameter"),
        ("sequence_id", pb.InferParameter(bool_param=True), "'sequence_id' parameter, expected int64_param or string_"),
        ("priority", pb.InferParameter(string_param="1"), "'priority' parameter, expected int64_param or uint64_param"),
        (EMPTY_FINAL, pb.InferParameter(int64_param=1), f"'{EMPTY_FINAL}' parameter, expected bool_param."),
        ("triton_x", pb.InferParameter(int64_param=1), "keys starting with 'triton_' are reserved for Triton usage."),
    ],
    ids=str,
)
async def test_a_parameter_that_triton_refuses_is_its_callers_fault_and_none_of_the_pipelines(
    model: PipelineModel, calibrator: Calibrator, key: str, value: Any, text: str
) -> None:
    observer = Steps()
    with pytest.raises(BadRequest, match=text):
        await model.infer(request(parameters={key: value}), observer)
    assert not calibrator.asked
    assert not model.faults
    assert not observer.ended_steps


async def test_the_models_error_is_the_pipelines(model: PipelineModel, calibrator: Calibrator) -> None:
    calibrator.error = NoTarget("model 'calibrator': no variant can answer now")
    with pytest.raises(NoTarget):
        await model.infer(request(), NoObserver())


async def test_a_model_that_answers_other_rows_is_an_internal_error(
    model: PipelineModel, calibrator: Calibrator
) -> None:
    calibrator.rows = 1
    with pytest.raises(WrongAnswer, match=r"'calibrator' answered 'scores' as FP32 \[1, 3\] to 2 rows"):
        await model.infer(request(), NoObserver())


async def test_every_step_is_reported_with_its_rows(model: PipelineModel) -> None:
    steps = Steps()
    await model.infer(request(rows=3), steps)
    assert [(event.step, event.rows, event.error) for event in steps.ended_steps] == [
        ("softmax", 3, ""),
        ("top_k", 3, ""),
    ]
    assert all(event.at >= event.started for event in steps.ended_steps)


async def test_a_step_that_is_not_worth_a_thread_is_done_while_all_threads_are_taken(calibrator: Calibrator) -> None:
    """So an answer that a model has made is not thrown away because the queue is full."""
    pipeline = build_pipeline("colours", DECLARED, lambda _: b"red\ngreen\nblue\n")
    release = threading.Event()

    def hold() -> None:
        assert release.wait(10)

    async with Threads(1, 0) as threads:
        model = PipelineModel(pipeline, threads, calibrator.call, lambda _: True)
        taken = asyncio.ensure_future(threads.run(Work((hold,), dict)))
        await asyncio.sleep(0)
        try:
            assert (await infer(model, request()))["label"] == [b"blue", b"red"]
        finally:
            release.set()
            await taken


async def test_statistics_count_requests_rows_and_every_kind_of_failure(
    model: PipelineModel, calibrator: Calibrator
) -> None:
    await infer(model, request(rows=3))
    await infer(model, request(rows=1))
    for error in (NoTarget("none"), RuntimeError("a bug"), asyncio.CancelledError()):
        calibrator.error = error
        with pytest.raises(Bug if isinstance(error, RuntimeError) else type(error)):
            await model.infer(request(), NoObserver())
    statistics = model.statistics()
    assert (statistics.name, statistics.version) == ("colours", "1")
    assert (statistics.inference_count, statistics.execution_count) == (4, 2)
    assert statistics.last_inference > 1_600_000_000_000
    assert (statistics.inference_stats.success.count, statistics.inference_stats.fail.count) == (2, 3)
    assert min(statistics.inference_stats.success.ns, statistics.inference_stats.fail.ns) > 0


async def test_statistics_go_on_over_a_reload(model: PipelineModel, calibrator: Calibrator) -> None:
    await infer(model, request(rows=3))
    async with Threads(1, 1) as threads:
        reloaded = PipelineModel(model.pipeline, threads, calibrator.call, lambda _: True, model)
        await infer(reloaded, request(rows=1))
        assert (reloaded.statistics().inference_count, reloaded.statistics().execution_count) == (4, 2)


def test_metadata_and_config_say_what_is_declared(model: PipelineModel) -> None:
    metadata = model.metadata()
    assert (metadata.name, list(metadata.versions)) == ("colours", ["1"])
    assert [(t.name, t.datatype, list(t.shape)) for t in (*metadata.inputs, *metadata.outputs)] == [
        ("logits", "FP32", [-1, -1]),
        ("label", "BYTES", [-1, 1]),
        ("score", "FP32", [-1, 1]),
    ]
    config = model.config().config
    assert (config.name, config.max_batch_size) == ("colours", 4)
    assert config.input[0].data_type == model_config_pb2.TYPE_FP32
    assert [(o.name, list(o.dims)) for o in config.output] == [("label", [1]), ("score", [1])]
    assert config.output[0].data_type == model_config_pb2.TYPE_STRING


async def test_a_pipeline_is_ready_when_the_models_that_it_calls_are(calibrator: Calibrator) -> None:
    pipeline = build_pipeline("colours", DECLARED, lambda _: b"red\ngreen\nblue\n")
    for ready in (True, False):
        assert PipelineModel(pipeline, Threads(1, 1), calibrator.call, lambda _: ready).is_ready() is ready  # noqa: B023
