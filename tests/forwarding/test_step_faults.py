"""Whatever a user's step does, its caller gets an answer, the gateway lives, and the step's author hears of it."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gateway.deadline import Deadline
from gateway.errors import BadInput, DeadlineExceeded, GatewayError, UpstreamFailed
from gateway.forwarding.complaints import Complaints
from gateway.forwarding.exchange import Reply, Request
from gateway.forwarding.messages import build_request, build_response
from gateway.forwarding.pipelines import PipelineModel
from gateway.forwarding.threads import Owner, Threads
from gateway.hooks import CallObserver, NoObserver, StepEnded
from gateway.status import Code
from gateway.steps import (
    Array,
    BadTensor,
    Params,
    PipelineError,
    PipelineSpec,
    Read,
    RowStep,
    Step,
    StepFailed,
    Tensors,
    TensorSpec,
    Work,
    WrongAnswer,
    build_pipeline,
)
from gateway.types import Served


class Panic(BaseException):
    """As PyO3 raises for a panic in Rust: no Exception."""


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise SystemExit(7)


class Misled(BadTensor):
    """An error of ours, made in a way that it can't be read."""

    def __init__(self) -> None:
        self.tensor = []  # type: ignore[assignment]


X = TensorSpec("x", "FP32", (1,))
THROWN: dict[str, Callable[[], BaseException]] = {
    "SystemExit": lambda: SystemExit(1),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "StopIteration": StopIteration,
    "CancelledError": asyncio.CancelledError,
    "Panic": Panic,
    "Unspeakable": Unspeakable,
    "ValueError": lambda: ValueError("/a/path"),
    "Misled": Misled,
}
MADE: dict[str, Any] = {
    "made NoneType": None,
    "made nothing": {},
    "made list": {"x": [[1.0]]},
    "made FP64": {"x": np.zeros((1, 1))},
    "2 rows of 'x' from 1": {"x": np.zeros((2, 1), np.float32)},
    "made float32": {"x": np.float32(1).reshape(())},
}


class Rogue(Step[Params]):
    """Does what the test says."""

    params_type = Params
    throw: BaseException | None = None
    made: Any = None
    brief: Any = False

    def __init__(self, params: Params, read: Read) -> None:
        self.reads = self.writes = (X,)

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        if self.throw is not None:
            raise self.throw
        return self.made  # type: ignore[no-any-return]

    def is_brief(self, tensors: Tensors) -> bool:
        if isinstance(self.brief, BaseException):
            raise self.brief
        return bool(self.brief)


class RogueRows(RowStep[Params]):
    """The same, row by row."""

    params_type = Params
    throw: BaseException | None = None
    allocated: Any = None

    def __init__(self, params: Params, read: Read) -> None:
        self.reads = self.writes = (X,)

    def allocate(self, rows: int) -> dict[str, Array]:
        if isinstance(self.allocated, BaseException):
            raise self.allocated
        return super().allocate(rows) if self.allocated is None else self.allocated  # type: ignore[no-any-return]

    def fill(self, tensors: Tensors, out: Tensors, rows: range) -> None:
        if self.throw is not None:
            raise self.throw


class Exits(Step[Params]):
    """Ends the process when it is built."""

    params_type = Params

    def __init__(self, params: Params, read: Read) -> None:
        raise SystemExit(3)

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        return dict(tensors)


class Undeclared(Exits):
    """Says nothing of what it reads."""

    def __init__(self, params: Params, read: Read) -> None:
        pass


class Words(Step[Params]):
    """Makes texts where bytes are declared."""

    params_type = Params

    def __init__(self, params: Params, read: Read) -> None:
        self.reads, self.writes = (X,), (TensorSpec("x", "BYTES", (1,)),)

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        return {"x": np.array([["text"]], np.object_)}


class Heard(NoObserver):
    def __init__(self) -> None:
        self.steps: list[StepEnded] = []

    def step_ended(self, event: StepEnded) -> None:
        self.steps.append(event)


def declared(*steps: dict[str, Any], datatype: str = "FP32") -> PipelineSpec:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1]}
    return PipelineSpec.model_validate(
        {"inputs": [tensor], "outputs": [{**tensor, "datatype": datatype}], "steps": list(steps)}
    )


def step(kind: type[Step[Any]]) -> dict[str, Any]:
    return {"step": f"{__name__}:{kind.__name__}"}


async def no_call(request: Request, observer: CallObserver) -> Reply:
    raise AssertionError


def request(rows: int = 1, id: str = "r-1", **fields: Any) -> Request:
    return Request(build_request("p", {"x": np.zeros((rows, 1), np.float32)}, id=id), **fields)


async def fails(
    kind: type[Step[Any]], rows: int = 1, datatype: str = "FP32", **behaviour: Any
) -> tuple[GatewayError, Heard]:
    pipeline = build_pipeline("p", declared(step(kind), datatype=datatype), lambda _: b"")
    for name, value in behaviour.items():
        setattr(pipeline.parts[0].step, name, value)  # type: ignore[union-attr]
    heard = Heard()
    async with Threads(2, 2) as threads:
        model = PipelineModel(pipeline, threads, no_call, lambda _: True)
        with pytest.raises(GatewayError) as caught:
            await asyncio.wait_for(model.infer(request(rows), heard), 60)
        while threads.usage():  # noqa: ASYNC110  (other rows of the batch may still be at it; nothing tells of their end)
            await asyncio.sleep(0.001)
    return caught.value, heard


@pytest.mark.parametrize("where", ["on a thread", "on the loop", "row by row", "allocate", "is_brief"])
@pytest.mark.parametrize("name", THROWN)
async def test_whatever_a_step_throws_is_the_steps_failure_and_counted_as_such(name: str, where: str) -> None:
    thrown = THROWN[name]()
    behaviour: dict[str, Any] = {
        "on a thread": {"throw": thrown},
        "on the loop": {"throw": thrown, "brief": True},
        "row by row": {"throw": thrown, "rows": 3},
        "allocate": {"allocated": thrown, "rows": 3},
        "is_brief": {"brief": thrown},
    }[where]
    kind: type[Step[Any]] = RogueRows if where in ("row by row", "allocate") else Rogue
    error, heard = await fails(kind, **behaviour)
    assert error.code is Code.INTERNAL
    step_name = f"{__name__}:{kind.__name__}"
    assert error.text == f"step '{step_name}' failed ({name}); the gateway's log has the details"
    assert [event.error for event in heard.steps] == [error.text]


@pytest.mark.parametrize("text", MADE)
@pytest.mark.parametrize("brief", [True, False])
async def test_a_step_that_makes_what_it_does_not_declare_has_failed(text: str, brief: bool) -> None:
    error, heard = await fails(Rogue, made=MADE[text], brief=brief)
    assert isinstance(error, StepFailed)
    assert re.search(text, error.text)
    assert [event.error for event in heard.steps] == [error.text]


async def test_elements_that_are_no_bytes_are_found_at_the_step_that_made_them() -> None:
    error, _ = await fails(Words, datatype="BYTES")
    assert "declares 'x' as BYTES [1] a row and made elements of type str" in error.text


async def test_a_step_may_tell_the_caller_what_is_wrong_with_an_input_in_a_text_that_can_travel() -> None:
    error, _ = await fails(Rogue, throw=BadTensor("x", "\udcff" * 5000, 0))
    assert isinstance(error, BadInput)
    assert len(error.text) < 1100
    assert error.text.encode().startswith(b"input 'x', row 0: ??")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Exits, "cannot be built: SystemExit: 3"),
        (Undeclared, "cannot be built: AttributeError: 'Undeclared' object has no attribute 'reads'"),
    ],
)
def test_a_step_that_ends_the_process_or_says_nothing_while_it_is_built_is_a_finding(
    kind: type[Step[Any]], text: str
) -> None:
    with pytest.raises(PipelineError, match=text):
        build_pipeline("p", declared(step(kind)), lambda _: b"")


def test_failures_are_logged_once_in_a_while_with_what_was_left_out(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    complaints = Complaints("p", lambda: now[0])

    def thrower(depth: int) -> None:
        if depth:
            thrower(depth - 1)
        raise ValueError("x" * 100_000)

    with caplog.at_level(logging.ERROR):
        for _ in range(1000):
            try:
                thrower(300)
            except ValueError as error:
                complaints.log("s", "id\n" * 1000, "step 's' failed", error)
        now[0] = 11.0
        complaints.log("s", "", "step 's' failed")
        complaints.log("other", "", "step 'other' failed", Unspeakable())
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 3
    assert texts[0].startswith("pipeline 'p', request 'id\\nid\\n")
    assert len(texts[0]) < 6000
    assert "(999 more since this was logged last)" in texts[1]
    assert "Unspeakable" in texts[2]


async def test_a_failed_step_is_logged_with_the_request_id_and_is_no_bug_of_the_gateway(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR):
        await fails(Rogue, throw=ValueError("/a/path"))
    (record,) = caplog.records
    message = record.getMessage()
    assert "pipeline 'p', request 'r-1': step" in message
    assert "ValueError: /a/path" in message
    assert "unforeseen" not in message


# Blocking


async def test_steps_that_never_end_hold_their_own_pipeline_only() -> None:
    """With all threads taken and a full queue before them, others run as if nothing were."""
    release = threading.Event()

    def hold() -> None:
        assert release.wait(60)

    async with Threads(2, 3) as threads:
        stuck = [asyncio.ensure_future(threads.run(Work((hold,), dict), Owner("stuck", "s"))) for _ in range(5)]
        await asyncio.sleep(0)
        for name in ("one", "two") * 10:
            await asyncio.wait_for(threads.run(Work((lambda: None,), dict), Owner(name, "s")), 60)
        (usage,) = threads.usage()
        assert (usage.pipeline, usage.step, usage.running, usage.waiting) == ("stuck", "s", 2, 3)
        release.set()
        await asyncio.gather(*stuck)


async def test_pipelines_take_turns_at_a_thread() -> None:
    order: list[str] = []
    gate = threading.Event()
    async with Threads(1, 50) as threads:
        first = asyncio.ensure_future(threads.run(Work((lambda: gate.wait(60),), dict), Owner("a", "s")))  # type: ignore[arg-type, return-value]
        waiting = [
            asyncio.ensure_future(threads.run(Work((lambda: order.append("a"),), dict), Owner("a", "s")))
            for _ in range(20)
        ]
        await asyncio.sleep(0)
        await threads.run(Work((lambda: order.append("b"),), dict), Owner("b", "s"))
        assert order == ["b"]
        gate.set()
        await asyncio.gather(first, *waiting)


async def test_the_deadlines_text_names_the_step_and_what_it_waited_for() -> None:
    release = threading.Event()
    loop = asyncio.get_running_loop()

    def hold() -> None:
        assert release.wait(60)

    async with Threads(1, 3) as threads:
        soon = Deadline.after(0.05, loop.time())
        with pytest.raises(DeadlineExceeded, match="while the step 'sleeper' was running"):
            await threads.run(Work((hold,), dict), Owner("p", "sleeper"), soon)
        soon = Deadline.after(0.05, loop.time())
        with pytest.raises(
            DeadlineExceeded, match=r"step 'next' waited for a thread \('sleeper' has run for 0\.\d s\)"
        ):
            await threads.run(Work((lambda: None,), dict), Owner("p", "next"), soon)
        assert [usage.step for usage in threads.usage()] == ["sleeper"]
        release.set()


async def test_leaving_does_not_wait_for_a_step_that_is_stuck(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    threads = Threads(1, 3)
    await threads.__aenter__()
    running = [
        asyncio.ensure_future(threads.run(Work((lambda: release.wait(60),), dict), Owner("p", "stuck")))  # type: ignore[arg-type, return-value]
        for _ in range(2)
    ]
    await asyncio.sleep(0)
    await asyncio.wait_for(threads.__aexit__(), 60)
    assert "step 'stuck' has run for" in caplog.text
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "step")
    for each in running:
        each.cancel()
    release.set()
    await asyncio.gather(*running, return_exceptions=True)


async def test_a_step_that_says_it_is_brief_and_is_not_soon_runs_where_nobody_waits_for_it() -> None:
    ran: list[bool] = []
    main = threading.current_thread()

    class Slow(Rogue):
        brief = True

        def __call__(self, tensors: Tensors) -> dict[str, Array]:
            ran.append(threading.current_thread() is main)
            threading.Event().wait(0.06)
            return dict(tensors)

    pipeline = build_pipeline("p", declared(step(Rogue)), lambda _: b"")
    object.__setattr__(pipeline.parts[0], "step", Slow(Params(), lambda _: b""))
    async with Threads(1, 1) as threads:
        model = PipelineModel(pipeline, threads, no_call, lambda _: True)
        for _ in range(5):
            await model.infer(request(), NoObserver())
    assert ran == [True, True, True, False, False]


# Calls


def _calling(answer: Callable[[Request], Reply]) -> tuple[PipelineModel, Heard]:
    async def call(asked: Request, observer: CallObserver) -> Reply:
        return answer(asked)

    pipeline = build_pipeline("p", declared({"call": "m", "outputs": {"logit": "x"}}), lambda _: b"")
    return PipelineModel(pipeline, Threads(1, 1), call, lambda _: True), Heard()


REFUSALS = {
    "an unknown output": (Code.INVALID_ARGUMENT, "unexpected inference output 'logit' for model 'internal_name'"),
    "dims": (Code.INVALID_ARGUMENT, "unexpected shape for input 'x' for model 'internal_name'"),
    "no such model": (Code.NOT_FOUND, "Request for unknown model: 'internal_name'"),
    "not supported": (Code.UNIMPLEMENTED, "internal_name is decoupled"),
}


@pytest.mark.parametrize(("code", "text"), REFUSALS.values(), ids=REFUSALS)
async def test_what_a_model_refuses_of_a_pipelines_own_request_is_not_its_callers_fault(
    code: Code, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: Request) -> Reply:
        raise UpstreamFailed(code, text, (("gateway-variant", "v"),))

    model, heard = _calling(refuse)
    with pytest.raises(UpstreamFailed) as caught:
        await model.infer(request(), heard)
    assert caught.value.code is Code.INTERNAL
    assert "pipeline 'p' does not fit the model 'm'" in caught.value.text
    assert "internal_name" not in caught.value.text
    assert caught.value.trailers == (("gateway-variant", "v"),)
    assert text in caplog.text
    (fault,) = model.faults
    assert text in fault
    assert [event.step for event in heard.steps] == ["call m"]
    assert all(event.error for event in heard.steps)


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.UNAUTHENTICATED, Code.INTERNAL])
async def test_what_is_wrong_with_the_model_or_the_callers_key_stays_as_it_is(code: Code) -> None:
    def refuse(_: Request) -> Reply:
        raise UpstreamFailed(code, "as it is")

    model, heard = _calling(refuse)
    with pytest.raises(UpstreamFailed, match="as it is") as caught:
        await model.infer(request(), heard)
    assert caught.value.code is code
    assert not model.faults


async def test_what_a_called_pipelines_step_finds_in_the_data_is_the_callers() -> None:
    def refuse(_: Request) -> Reply:
        raise BadTensor("image", "not a picture", 1)

    model, heard = _calling(refuse)
    with pytest.raises(BadInput, match="input 'image', row 1: not a picture"):
        await model.infer(request(), heard)


async def test_a_fault_is_forgotten_when_the_call_goes_well_again() -> None:
    good = [False]

    def answer(asked: Request) -> Reply:
        made = np.zeros((1, 1) if good[0] else (1, 2), np.float32)
        body = build_response("m", "1", "", {"logit" if good[0] else "other": ("FP32", made)})
        return Reply(body, (), (), Served("m", "v", "1", "a:1", 1))

    model, heard = _calling(answer)
    with pytest.raises(WrongAnswer):
        await model.infer(request(), heard)
    assert model.faults == ["'m' did not answer the output 'logit'; it has other"]
    good[0] = True
    await model.infer(request(), heard)
    assert not model.faults
