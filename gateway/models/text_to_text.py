"""Text-to-text models from an encoder and a decoder in ONNX: served whole, or token by token.

Whatever the network is, it says what it takes by the names of its tensors, as arabic-name-romanizer exports them:

encoder:  `src` INT64 [batch, places] and `src_mask` BOOL, true where a place is unused → states, named `<state>_out`.
decoder:  `prefix` INT64 [batch, n], of which only the last number counts, and each `<state>` → `logprobs`
          [batch, words] and those states, as `<state>_out`, that change with each word.

`whole` puts both into one graph with a `Loop`. `streamed` lays them beside a program for Triton's Python backend, whose
answers are one word each. Both decode greedily, by the rules of the vocabulary (`gateway.steps.vocabulary`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.models.efficientnet import IR_VERSION, OPSET
from gateway.steps import vocabulary as vocabulary_module
from gateway.steps.vocabulary import Vocabulary

VOCABULARY = "vocabulary.json"
_PROGRAM = Path(__file__).with_name("programs") / "text_stream.py"  # not imported: it needs Triton around it
_OUT = "_out"
_NEVER = -1e30
"""Added to what may not be chosen; an infinity would make a NaN of a score that is one."""


def streamed(encoder: Any, decoder: Any, vocabulary: bytes) -> dict[str, bytes]:
    """The files of a version folder. encoder, decoder: onnx.ModelProto."""
    return {
        "model.py": _PROGRAM.read_bytes(),
        "vocabulary.py": Path(vocabulary_module.__file__).read_bytes(),
        VOCABULARY: vocabulary,
        "encoder.onnx": encoder.SerializeToString(deterministic=True),
        "decoder.onnx": decoder.SerializeToString(deterministic=True),
    }


def whole(encoder: Any, decoder: Any, vocabulary: Vocabulary) -> bytes:
    """The ONNX model: `tokens` INT32 [batch, parts, places], -1 where a place is unused, → `words` INT32 [batch, parts,
    `most_tokens`], filled with the vocabulary's `end`.

    encoder, decoder: onnx.ModelProto.
    """
    import onnx  # noqa: PLC0415  # of the extra `local`
    from onnx import TensorProto, compose, helper, numpy_helper  # noqa: PLC0415

    encode = compose.add_prefix_graph(encoder.graph, "encoder/")
    decode = compose.add_prefix_graph(decoder.graph, "decoder/")
    states = [each.name.removeprefix("decoder/") for each in decode.input][1:]
    changing = [state for state in states if f"decoder/{state}{_OUT}" in {each.name for each in decode.output}]
    value, node = helper.make_tensor_value_info, helper.make_node
    body = helper.make_graph(
        _step_nodes(decode, states, changing),
        "step",
        [
            value("step", TensorProto.INT64, []),
            value("goes_on", TensorProto.BOOL, []),
            value("before", TensorProto.INT64, ["rows", 1]),
            value("was_done", TensorProto.BOOL, ["rows", 1]),
            *(value(f"{state}_before", TensorProto.FLOAT, None) for state in changing),
        ],
        [
            value("goes_on_out", TensorProto.BOOL, []),
            value("word", TensorProto.INT64, ["rows", 1]),
            value("is_done", TensorProto.BOOL, ["rows", 1]),
            *(value(f"{state}_after", TensorProto.FLOAT, None) for state in changing),
            value("made", TensorProto.INT64, ["rows", 1]),
        ],
    )
    carried = ["first_word", "is_unused", *(f"encoder/{state}{_OUT}" for state in changing)]
    nodes = [
        *_source_nodes(),
        *encode.node,
        node("Loop", ["most", "yes", *carried], ["_word", "_done", *(f"_{s}" for s in changing), "by_step"], body=body),
        *_answer_nodes(),
    ]
    constants = _constants(vocabulary, len(vocabulary.target))
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "text_to_text",
            [value("tokens", TensorProto.INT32, ["batch", "parts", "places"])],
            [value("words", TensorProto.INT32, ["batch", "parts", vocabulary.most_tokens])],
            [*weights, *encode.initializer, *decode.initializer],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="inference-gateway",
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def _source_nodes() -> list[Any]:
    """`tokens` → what the encoder takes, with a row for each part of each text."""
    from onnx import TensorProto, helper  # noqa: PLC0415  # of the extra `local`

    node = helper.make_node
    return [
        node("Shape", ["tokens"], ["places"], start=2),
        node("Concat", ["any", "places"], ["by_part"], axis=0),
        node("Reshape", ["tokens", "by_part"], ["rows"]),
        node("Less", ["rows", "zero"], ["encoder/src_mask"]),
        node("Max", ["rows", "zero"], ["numbers"]),
        node("Cast", ["numbers"], ["encoder/src"], to=TensorProto.INT64),
        node("Cast", ["encoder/src_mask"], ["unused"], to=TensorProto.INT32),
        node("ReduceMin", ["unused"], ["all_unused"], axes=[1], keepdims=1),
        node("Cast", ["all_unused"], ["is_unused"], to=TensorProto.BOOL),  # a part that only fills up its text's row
        node("Shape", ["is_unused"], ["one_each"]),
        node("Expand", ["start", "one_each"], ["first_word"]),
    ]


def _step_nodes(decode: Any, states: list[str], changing: list[str]) -> list[Any]:
    """The loop's body: the decoder, and the choice of a word."""
    from onnx import TensorProto, helper  # noqa: PLC0415  # of the extra `local`

    node = helper.make_node
    given = {state: f"{state}_before" if state in changing else f"encoder/{state}{_OUT}" for state in states}
    return [
        node("Identity", ["before"], ["decoder/prefix"]),
        *(node("Identity", [name], [f"decoder/{state}"]) for state, name in given.items()),
        *decode.node,
        node("Equal", ["step", "zero64"], ["is_first"]),
        node("Where", ["is_first", "bias_first", "bias"], ["allowed"]),
        node("Add", ["decoder/logprobs", "allowed"], ["scores"]),
        node("ArgMax", ["scores"], ["best"], axis=1, keepdims=1),
        node("Where", ["was_done", "end", "best"], ["word"]),
        node("Identity", ["word"], ["made"]),
        node("Equal", ["word", "end"], ["is_end"]),
        node("Or", ["was_done", "is_end"], ["is_done"]),
        node("Cast", ["is_done"], ["done"], to=TensorProto.INT32),
        node("ReduceMin", ["done"], ["all_done"], keepdims=0),
        node("Less", ["all_done", "one"], ["goes_on_out"]),
        *(node("Identity", [f"decoder/{state}{_OUT}"], [f"{state}_after"]) for state in changing),
    ]


def _answer_nodes() -> list[Any]:
    """What the loop made, [steps, rows, 1], → `words`."""
    from onnx import TensorProto, helper  # noqa: PLC0415  # of the extra `local`

    node = helper.make_node
    return [
        node("Squeeze", ["by_step", "axis2"], ["step_by_row"]),
        node("Transpose", ["step_by_row"], ["by_row"], perm=[1, 0]),
        node("Shape", ["by_row"], ["steps"], start=1),
        node("Sub", ["most1", "steps"], ["missing"]),
        node("Concat", ["nothing", "missing"], ["padding"], axis=0),
        node("Pad", ["by_row", "padding", "end0"], ["full"]),
        node("Shape", ["tokens"], ["texts_and_parts"], end=2),
        node("Concat", ["texts_and_parts", "most1"], ["shape"], axis=0),
        node("Reshape", ["full", "shape"], ["words64"]),
        node("Cast", ["words64"], ["words"], to=TensorProto.INT32),
    ]


def _constants(vocabulary: Vocabulary, words: int) -> dict[str, NDArray[Any]]:
    bias = np.zeros((1, words), np.float32)
    bias[:, list(vocabulary.forbidden)] = _NEVER
    bias_first = bias.copy()
    bias_first[:, list(vocabulary.forbidden_first)] = _NEVER
    whole = {"most": vocabulary.most_tokens, "zero64": 0, "end0": vocabulary.end}
    lists = {
        "any": [-1],
        "axis2": [2],
        "nothing": [0, 0, 0],
        "most1": [vocabulary.most_tokens],
        "start": [[vocabulary.start]],
        "end": [[vocabulary.end]],
    }
    return {
        "bias": bias,
        "bias_first": bias_first,
        "yes": np.array(True),
        "zero": np.array(0, np.int32),
        "one": np.array(1, np.int32),
        **{name: np.array(number, np.int64) for name, number in whole.items()},
        **{name: np.array(numbers, np.int64) for name, numbers in lists.items()},
    }
