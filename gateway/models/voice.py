"""The models of the voice assistant: what hears that somebody speaks, what reads the words, what speaks back.

The detector is a graph whose state Triton keeps; the other two are programs for Triton's Python backend with their data
beside them. Contracts: the READMEs in `model_repository`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gateway.models.efficientnet import IR_VERSION

WINDOW = 512
"""Samples that the detector hears at once, at 16 kHz: 32 ms."""

CONTEXT = 64
"""Samples of the window before that the network sees again. source: silero_vad, `utils_vad.OnnxWrapper.__call__`."""

CELLS = 128
"""Numbers in each of the network's two states."""

_PROGRAMS = Path(__file__).with_name("programs")  # not imported: they need Triton around them
_ENGLISH = "pocketsphinx/model/en-us"


def detector(wheel: Path) -> bytes:
    """The ONNX model, see `model_repository/speech_detector/README.md` for its tensors.

    The network takes its two states with the batch in the middle, and the end of the window before as part of its
    input. Triton keeps a row per sequence for the first axis only, so the graph turns the states round, and what it has
    to hear again of a window is a state too.

    wheel:  the folder with the unpacked `sources.SILERO_VAD`.
    """
    import onnx  # noqa: PLC0415  # of the extra `local`
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

    network = onnx.load(str(wheel / "silero_vad/data/silero_vad_16k_op15.onnx"))
    graph = network.graph
    node, value = helper.make_node, helper.make_tensor_value_info
    constants = {
        "sr": np.array(16_000, np.int64),  # an input of the network that has this one value
        "window/start": np.array([WINDOW - CONTEXT], np.int64),
        "window/end": np.array([WINDOW], np.int64),
        "window/axis": np.array([1], np.int64),
    }
    nodes = [
        node("Concat", ["context", "audio"], ["input"], axis=1),
        node("Transpose", ["memory"], ["state"], perm=[1, 0, 2]),
        *graph.node,
        node("Identity", ["output"], ["speech"]),
        node("Transpose", ["stateN"], ["memory_out"], perm=[1, 0, 2]),
        node("Slice", ["audio", "window/start", "window/end", "window/axis"], ["context_out"]),
    ]
    made = helper.make_graph(
        nodes,
        "speech_detector",
        [
            value("audio", TensorProto.FLOAT, ["batch", WINDOW]),
            value("memory", TensorProto.FLOAT, ["batch", 2, CELLS]),
            value("context", TensorProto.FLOAT, ["batch", CONTEXT]),
        ],
        [
            value("speech", TensorProto.FLOAT, ["batch", 1]),
            value("memory_out", TensorProto.FLOAT, ["batch", 2, CELLS]),
            value("context_out", TensorProto.FLOAT, ["batch", CONTEXT]),
        ],
        [*graph.initializer, *(numpy_helper.from_array(array, name) for name, array in constants.items())],
    )
    opsets = [helper.make_opsetid(opset.domain, opset.version) for opset in network.opset_import]
    model = helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="inference-gateway")
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def recogniser(wheel: Path) -> Mapping[str, bytes]:
    """The files of the model `voice_commands`, but for its grammar, which is committed.

    wheel:  the folder with the unpacked `sources.POCKETSPHINX`.
    """
    english = wheel / _ENGLISH
    data = {f"1/en-us/{file.name}": file.read_bytes() for file in sorted((english / "en-us").iterdir())}
    beside = {f"1/{name}": (english / name).read_bytes() for name in ("cmudict-en-us.dict", "en-us-phone.lm.bin")}
    return {"1/model.py": (_PROGRAMS / "voice_commands.py").read_bytes(), **beside, **data}


def speaker(wheel: Path) -> Mapping[str, bytes]:
    """The files of the model `hibari_tts`: the program, and the package as it is.

    wheel:  the folder with the unpacked `sources.HIBARI`.
    """
    package = sorted(path for path in (wheel / "hibari").rglob("*") if path.is_file() and path.suffix != ".pyc")
    files = {f"1/{path.relative_to(wheel).as_posix()}": path.read_bytes() for path in package}
    return {"1/model.py": (_PROGRAMS / "hibari_tts.py").read_bytes(), **files}
