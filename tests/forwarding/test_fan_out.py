"""Items of many rows go to a model together, and what it made of each comes back to the row that it is of.

The model is a function here; tests/tasks has fan-outs over a real Triton.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import BadInput, GatewayError, NoTarget, Overloaded, UnknownModel
from gateway.explain import explain_call
from gateway.forwarding.caller import metadata_from_pairs
from gateway.forwarding.exchange import Reply, Request
from gateway.forwarding.messages import build_request, build_response, parse_request, parse_response, tensors_of
from gateway.forwarding.pipelines import PipelineModel
from gateway.forwarding.threads import Threads
from gateway.hooks import CallObserver, NoObserver
from gateway.routing import Routes
from gateway.status import Code
from gateway.steps import (
    Array,
    BadTensor,
    Column,
    Params,
    PipelineError,
    PipelineSpec,
    Read,
    SplitStep,
    Step,
    StepFailed,
    Tensors,
    TensorSpec,
    WrongAnswer,
    build_pipeline,
    column_of,
)
from gateway.steps.compare import ModelFacts, ModelTensor, compare
from gateway.types import Facts, Served

MOST = 4
"""Most items of one call."""

ANSWERS = (ModelTensor("big", "INT32", (-1, -1)), ModelTensor("size", "INT32", (-1, 1)))
"""What the model says of its outputs."""


class Words(SplitStep[Params]):
    """A text → its words, each as the numbers of its letters: items of many lengths."""

    params_type = Params

    def __init__(self, params: Params, read: Read) -> None:
        self.reads = (TensorSpec("text", "BYTES", (1,)),)
        self.writes = (TensorSpec("word", "BYTES", ()), TensorSpec("letters", "INT32", (-1,)))

    def split(self, row: Tensors) -> Iterable[Tensors]:
        for word in row["text"][0].split():
            if word == b"!":
                raise BadTensor("text", "has a '!'")
            if word == b"?":
                raise ZeroDivisionError
            yield {"word": np.array(word, np.object_), "letters": np.frombuffer(word, np.uint8).astype(np.int32)}


class Sentences(SplitStep[Params]):
    """A text → its sentences."""

    params_type = Params

    def __init__(self, params: Params, read: Read) -> None:
        self.reads = self.writes = (TensorSpec("text", "BYTES", (1,)),)

    def split(self, row: Tensors) -> Iterable[Tensors]:
        yield from ({"text": np.array([sentence], np.object_)} for sentence in row["text"][0].split(b".") if sentence)


class NoneBad(Step[Params]):
    """Refuses words with an x in it."""

    params_type = Params

    def __init__(self, params: Params, read: Read) -> None:
        self.reads = self.writes = (TensorSpec("letters", "INT32", (-1,)),)

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        for row, letters in enumerate(tensors["letters"]):
            if ord("x") in letters:
                raise BadTensor("letters", "has an x", row)
        return {"letters": tensors["letters"] + 0}


class Doubled(Step[Params]):
    """As many letters again: rows of several lengths from rows of several lengths."""

    params_type = Params

    def __init__(self, params: Params, read: Read) -> None:
        self.reads = (TensorSpec("text", "BYTES", (1,)),)
        self.writes = (TensorSpec("letters", "INT32", (-1,)),)

    def __call__(self, tensors: Tensors) -> dict[str, Column]:
        texts = [text * 2 for text in tensors["text"][:, 0]]
        return {"letters": column_of([np.frombuffer(text, np.uint8).astype(np.int32) for text in texts])}


FAN_OUT: dict[str, Any] = {
    "step": f"{__name__}:Words",
    "steps": [
        {"step": f"{__name__}:NoneBad"},
        {"call": "upper", "inputs": ["letters"], "outputs": ["big", "size"]},
    ],
    "outputs": [
        {"name": "word", "datatype": "BYTES", "shape": []},
        {"name": "big", "datatype": "INT32", "shape": [-1]},
        {"name": "size", "datatype": "INT32", "shape": [1]},
    ],
    "count": "words",
    "max_batch_size": MOST,
    "most": 20,
    "most_together": 50,
}


def declared(**changes: Any) -> PipelineSpec:
    return PipelineSpec.model_validate(
        {
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1]}],
            "outputs": [
                {"name": "word", "datatype": "BYTES", "shape": [-1]},
                {"name": "big", "datatype": "INT32", "shape": [-1, -1]},
                {"name": "size", "datatype": "INT32", "shape": [-1, 1]},
                {"name": "words", "datatype": "INT32", "shape": [1]},
            ],
            "steps": [{"fan_out": FAN_OUT | changes}],
        }
    )


class Upper:
    """The model: letters → capital letters, and how many. It remembers the shapes that came."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.now = 0
        self.most_at_once = 0
        self.error_at: int | None = None
        self.cancelled = 0
        self.outputs: dict[str, Any] = {}

    async def call(self, request: Request, observer: CallObserver) -> Reply:
        message = parse_request(request.whole())
        letters = tensors_of(message.inputs, message.raw_input_contents)["letters"]
        self.shapes.append(letters.shape)
        mine = len(self.shapes)
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        try:
            if mine == self.error_at:
                raise NoTarget("model 'upper': no variant can answer now")
            # Later calls may be answered first; beside one that fails, the others take for ever.
            await asyncio.sleep(0.002 * (mine % 3) if self.error_at is None else 3600)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.now -= 1
        size = np.full((len(letters), 1), letters.shape[1], np.int32)
        made = {"big": letters - 32, "size": size} | self.outputs
        tensors = {name: ({"i": "INT32", "f": "FP32"}[each.dtype.kind], each) for name, each in made.items()}
        return Reply(build_response("upper", "1", "", tensors), (), (), Served("upper", "cpu", "1", "a:1", 1))


def asked(texts: Sequence[bytes]) -> Request:
    text = np.empty((len(texts), 1), np.object_)
    text[:, 0] = texts
    return Request(build_request("words", {"text": text}), metadata_from_pairs([]))


async def infer(model: PipelineModel, texts: Sequence[bytes]) -> list[list[tuple[bytes, bytes, int]]]:
    """Of each row its words, in capitals too, with their lengths."""
    reply = await model.infer(asked(texts), NoObserver())
    answer = {name: array for name, (_, array) in parse_response(reply.body).items()}
    rows: list[list[tuple[bytes, bytes, int]]] = []
    for row, (count,) in enumerate(answer["words"]):
        sizes = answer["size"][row, :, 0]
        bigs = [bytes(answer["big"][row, item, : sizes[item]].astype(np.uint8)) for item in range(count)]
        rows.append(list(zip(answer["word"][row, :count].tolist(), bigs, sizes[:count].tolist(), strict=True)))
        assert not answer["word"][row, count:].any()
        assert not sizes[count:].any()
    return rows


def expected(texts: Sequence[bytes]) -> list[list[tuple[bytes, bytes, int]]]:
    return [[(word, word.upper(), len(word)) for word in text.split()] for text in texts]


async def driven(upper: Upper, requests: Sequence[Sequence[bytes]], spec: PipelineSpec | None = None) -> list[Any]:
    """Several callers at once."""
    async with Threads(2, 50) as threads:
        model = PipelineModel(
            build_pipeline("words", spec or declared(), lambda _: b""), threads, upper.call, lambda _: True
        )
        try:
            return await asyncio.gather(*(infer(model, texts) for texts in requests), return_exceptions=True)
        finally:
            assert (threads.room.held, upper.now) == (0, 0), "memory is still counted, or a call still runs"


def failure(upper: Upper, texts: Sequence[bytes], spec: PipelineSpec | None = None) -> GatewayError:
    (error,) = asyncio.run(driven(upper, [texts], spec))
    assert isinstance(error, GatewayError), error
    return error


word = st.text("abc", min_size=1, max_size=5)
text = st.lists(word, max_size=9).map(lambda words: " ".join(words).encode())
request = st.lists(text, min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(requests=st.lists(request, min_size=1, max_size=4))
def test_every_item_comes_back_to_its_row_and_its_caller_in_order(requests: list[list[bytes]]) -> None:
    """For any numbers of rows and items, none included, and whichever call is answered first."""
    upper = Upper()
    assert asyncio.run(driven(upper, requests)) == [expected(texts) for texts in requests]
    assert all(rows <= MOST for rows, _ in upper.shapes)


def test_items_of_all_rows_travel_together_in_batches_of_one_shape() -> None:
    upper = Upper()
    asyncio.run(driven(upper, [[b"aa bb c", b"", b"cc dd ee f"]]))
    assert sorted(upper.shapes) == [(1, 2), (2, 1), (4, 2)]


def test_a_request_without_items_asks_no_model() -> None:
    upper = Upper()
    assert asyncio.run(driven(upper, [[b"", b""]])) == [[[], []]]
    assert not upper.shapes


def test_a_few_calls_of_one_request_run_at_once() -> None:
    upper = Upper()
    asyncio.run(driven(upper, [[b"a " * 20, b"b " * 20]]))
    assert (len(upper.shapes), upper.most_at_once) == (10, 4)


def test_the_first_failing_call_ends_the_others() -> None:
    """The caller gets its error, and nothing is left running."""
    upper = Upper()
    upper.error_at = 4
    error = failure(upper, [b"a " * 20, b"b " * 20])
    assert error.code is Code.UNAVAILABLE
    assert (len(upper.shapes), upper.cancelled) == (4, 3)


TOO_MANY = {
    "of a row": ([b"a", b"a " * 21], {}, "row 1: '.*Words' finds more than 20 items in it (fan_out.most)"),
    "of all rows": ([b"a " * 18] * 3, {}, "more than 50 items in all rows (fan_out.most_together); send fewer rows"),
    "bytes": ([b"a" * 400_000] * 3, {"most_bytes": 4 << 20}, "take more than 4 MiB (fan_out.most_bytes)"),
}


@pytest.mark.parametrize(("texts", "changes", "wrong"), TOO_MANY.values(), ids=TOO_MANY)
def test_more_items_than_allowed_are_their_callers_fault(
    texts: list[bytes], changes: dict[str, Any], wrong: str
) -> None:
    upper = Upper()
    error = failure(upper, texts, declared(**changes))
    assert isinstance(error, BadInput)
    assert wrong.replace(".*", f"{__name__}:") in error.text
    assert not upper.shapes


def test_a_row_with_as_many_items_as_allowed_passes() -> None:
    texts = [b"a " * 20, b"b " * 20, b"c " * 10]
    assert asyncio.run(driven(Upper(), [texts])) == [expected(texts)]


def test_items_enter_only_where_there_is_room_for_them() -> None:
    """They count like all that the requests of pipelines hold, so that one caller's items are not all callers' end."""

    async def run() -> None:
        async with Threads(2, 50) as threads:
            model = PipelineModel(
                build_pipeline("words", declared(), lambda _: b""), threads, Upper().call, lambda _: True
            )
            threads.room.most = 12 << 20
            threads.room.share().take(1 << 20)  # somebody else's
            assert await infer(model, [b"a" * 100_000]) == expected([b"a" * 100_000])
            with pytest.raises(Overloaded):
                await infer(model, [b" ".join([b"a" * 200_000] * 12)])
            assert threads.room.held == 1 << 20

    asyncio.run(run())


BAD = {
    "found by the split step": ([b"a", b"b !"], BadInput, "input 'text', row 1: has a '!'"),
    "found by a step inside": (
        [b"a b c", b"bb axa cc", b"y"],
        BadInput,
        "input 'letters', row 1: item 1 of it: has an x",
    ),
    "a bug": ([b"?"], StepFailed, "failed (ZeroDivisionError)"),
}


@pytest.mark.parametrize(("texts", "kind", "wrong"), BAD.values(), ids=BAD)
def test_a_fault_names_the_callers_row(texts: list[bytes], kind: type[GatewayError], wrong: str) -> None:
    error = failure(Upper(), texts)
    assert isinstance(error, kind)
    assert wrong in error.text


WRONG_ANSWERS = {
    "another datatype": ({"size": np.ones((1, 1), np.float32)}, "hand back 'size' as INT32 [1], got FP32 [1, 1]"),
    "other rows": ({"size": np.ones((2, 1), np.int32)}, "answered 'size' as INT32 [2, 1] to 1 rows"),
}


@pytest.mark.parametrize(("outputs", "wrong"), WRONG_ANSWERS.values(), ids=WRONG_ANSWERS)
def test_an_answer_that_is_not_as_declared_is_not_handed_on(outputs: dict[str, Any], wrong: str) -> None:
    upper = Upper()
    upper.outputs = outputs
    error = failure(upper, [b"a"])
    assert isinstance(error, WrongAnswer)
    assert wrong in error.text


def test_variants_that_answer_in_several_types_are_not_mixed() -> None:
    upper = Upper()
    call = upper.call

    async def changing(request: Request, observer: CallObserver) -> Reply:
        upper.outputs = {"size": np.ones((len(upper.shapes) + 1, 1), np.float32)} if upper.shapes else {}
        return await call(request, observer)

    upper.call = changing  # type: ignore[method-assign]
    error = failure(upper, [b"a bb"])
    assert isinstance(error, WrongAnswer)


def test_rows_of_several_shapes_go_to_the_model_by_shape_without_any_fan_out() -> None:
    spec = PipelineSpec.model_validate(
        {
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1]}],
            "outputs": [{"name": "size", "datatype": "INT32", "shape": [1]}],
            "steps": [
                {"step": f"{__name__}:Doubled"},
                {"call": "upper", "inputs": ["letters"], "outputs": ["size", "big"]},
            ],
        }
    )

    async def run() -> list[Any]:
        async with Threads(2, 50) as threads:
            pipeline = build_pipeline("words", spec, lambda _: b"")
            model = PipelineModel(pipeline, threads, upper.call, lambda _: True)
            reply = await model.infer(asked([b"a", b"bcd", b"c", b"de"]), NoObserver())
            return parse_response(reply.body)["size"][1].ravel().tolist()  # type: ignore[no-any-return]

    upper = Upper()
    assert asyncio.run(run()) == [2, 6, 2, 4]
    assert sorted(upper.shapes) == [(1, 4), (1, 6), (2, 2)]


def test_a_fan_out_may_stand_in_a_fan_out() -> None:
    """Each sentence of a text has as many words as it has; the text gets them by sentence, filled up."""
    spec = PipelineSpec.model_validate(
        {
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1]}],
            "outputs": [
                {"name": "word", "datatype": "BYTES", "shape": [-1, -1]},
                {"name": "words", "datatype": "INT32", "shape": [-1, 1]},
                {"name": "sentences", "datatype": "INT32", "shape": [1]},
            ],
            "steps": [
                {
                    "fan_out": {
                        "step": f"{__name__}:Sentences",
                        "steps": [{"fan_out": FAN_OUT}],
                        "outputs": [
                            {"name": "word", "datatype": "BYTES", "shape": [-1]},
                            {"name": "words", "datatype": "INT32", "shape": [1]},
                        ],
                        "count": "sentences",
                    }
                }
            ],
        }
    )

    async def run(texts: list[bytes]) -> dict[str, Any]:
        async with Threads(2, 50) as threads:
            pipeline = build_pipeline("words", spec, lambda _: b"")
            assert pipeline.models == ("upper",)
            model = PipelineModel(pipeline, threads, Upper().call, lambda _: True)
            reply = await model.infer(asked(texts), NoObserver())
            assert threads.room.held == 0
            return {name: array.tolist() for name, (_, array) in parse_response(reply.body).items()}

    made = asyncio.run(run([b"a b.c", b"", b"d d d"]))
    assert made["sentences"] == [[2], [0], [1]]
    assert made["words"] == [[[2], [1]], [[0], [0]], [[3], [0]]]
    assert made["word"] == [
        [[b"a", b"b", b""], [b"c", b"", b""]],
        [[b"", b"", b""], [b"", b"", b""]],
        [[b"d", b"d", b"d"], [b"", b"", b""]],
    ]


def test_rows_that_differ_are_no_answer() -> None:
    spec = PipelineSpec.model_validate(
        {
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1]}],
            "outputs": [{"name": "letters", "datatype": "INT32", "shape": [-1]}],
            "steps": [{"step": f"{__name__}:Doubled"}],
        }
    )
    error = failure(Upper(), [b"a", b"bb"], spec)
    assert "rows as different as INT32 [2] and INT32 [4]" in error.text


CONTRACTS = {
    "too many for one call": (
        ModelFacts("m", (ModelTensor("letters", "INT32", (-1, -1)),), ANSWERS, 2),
        "steps.0.fan_out.max_batch_size: is 4, but m takes 2 rows at most; at most 2",
    ),
    "another datatype": (
        ModelFacts("m", (ModelTensor("letters", "FP32", (-1, -1)),), ANSWERS, 4),
        "steps.0.fan_out.steps.1.inputs.letters: m takes 'letters' as FP32 [-1] a row, but 'letters' is INT32 [-1] "
        "a row",
    ),
    "another answer": (
        ModelFacts(
            "m", (ModelTensor("letters", "INT32", (-1, -1)),), (*ANSWERS[1:], ModelTensor("big", "INT32", (-1,))), 4
        ),
        "steps.0.fan_out.outputs.1: the items hand back 'big' as INT32 [-1] a row, but m answers INT32 []",
    ),
}


@pytest.mark.parametrize(("facts", "finding"), CONTRACTS.values(), ids=CONTRACTS)
def test_calls_inside_are_held_to_what_the_models_say(facts: ModelFacts, finding: str) -> None:
    pipeline = build_pipeline("words", declared(), lambda _: b"")
    assert list(map(str, compare(pipeline, {"upper": [facts]}))) == [finding]


def test_explain_shows_what_is_inside() -> None:
    pipeline = build_pipeline("words", declared(), lambda _: b"")
    assert pipeline.models == ("upper",)
    lines = explain_call(Routes(), {"words": pipeline}, "words", Facts(), draw=0.0)
    assert lines == [
        "words: a pipeline",
        f"  fan-out by step {__name__}:Words, in the gateway: items, at most 20 of a row and 50 in all, by 4:",
        f"    step {__name__}:NoneBad, in the gateway",
        "    upper: NOT_FOUND: " + UnknownModel("upper").text + "; public models: words",
    ]


FINDINGS = {
    "unknown step": ({"step": "wrds"}, "steps.0.fan_out.step: unknown step 'wrds'"),
    "no split step": ({"step": f"{__name__}:NoneBad"}, "makes no items of a row; a split step"),
    "a split step among steps": (
        {"steps": [{"step": f"{__name__}:Words"}]},
        f"steps.0.fan_out.steps.0.step: '{__name__}:Words' makes items of rows; name it in a fan_out",
    ),
    "a tensor of the rows": (
        {"steps": [{"call": "upper", "inputs": ["text"]}]},
        "steps.0.fan_out.steps.0: call of 'upper' sends 'text', which nothing before makes; there are: word, letters",
    ),
    "an output that nobody makes": (
        {"outputs": [{"name": "wrd", "datatype": "BYTES", "shape": []}]},
        "steps.0.fan_out.outputs.0: the items hand back 'wrd', which nothing before makes",
    ),
    "an output of another type": (
        {"outputs": [{"name": "word", "datatype": "FP32", "shape": []}]},
        "steps.0.fan_out.outputs.0: the items hand back 'word' as FP32 [] a row, but it is BYTES []",
    ),
    "the count's name": ({"count": "word"}, "steps.0.fan_out.count: 'word' is one of the outputs too; another name"),
}


@pytest.mark.parametrize(("changes", "finding"), FINDINGS.values(), ids=FINDINGS)
def test_what_does_not_fit_is_found_when_the_config_is_read(changes: dict[str, Any], finding: str) -> None:
    with pytest.raises(PipelineError) as caught:
        build_pipeline("words", declared(**changes), lambda _: b"")
    assert finding in str(caught.value)
