"""arabic-name-romanizer: Arabic names in Latin letters, by the network of that package.

The package looks names up in a dictionary first and asks the network for those that it does not find; this is the
network alone, and it decodes greedily where the package searches two beams wide. The wheel has encoder and decoder as
ONNX graphs already.

source: arabic-name-romanizer 0.2.0, `inference.py`: `OnnxBackend`, `beam_search`; `vocab.py`: `CharVocab`.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

MOST_WORDS = 64
"""Characters of a name; the network was trained on units of up to 40."""


def vocabulary(wheel: Path) -> bytes:
    """See `gateway.steps.vocabulary`. wheel: the folder with the unpacked `sources.ROMANIZER`."""
    resources = wheel / "arabic_name_romanizer/resources"
    tokens: list[str] = json.loads((resources / "vocab.json").read_text(encoding="utf-8"))["tokens"]
    most: int = json.loads((resources / "meta.json").read_text(encoding="utf-8"))["max_tgt_len"]
    pad, start, end, unknown = (tokens.index(f"<{name}>") for name in ("PAD", "BOS", "EOS", "UNK"))
    told = {
        "split": "arabic-name",
        "source": {token: number for number, token in enumerate(tokens) if _is_read(token)},
        "target": ["" if token.startswith("<") and token.endswith(">") else token for token in tokens],
        "start": start,
        "end": end,
        "source_end": end,
        "unknown_word": unknown,
        "most_words": MOST_WORDS,
        "most_tokens": most,
        "join": "",
        "forbidden": [pad],
        "forbidden_first": [end],
    }
    return json.dumps(told, ensure_ascii=False).encode()


def _is_read(word: str) -> bool:
    """Both languages share one list; these are Arabic letters, what is told of the name, and the space in a unit."""
    return word.startswith("<") or word == " " or unicodedata.name(word, "").startswith("ARABIC")


def networks(wheel: Path) -> tuple[Any, Any]:
    """Encoder and decoder, each an onnx.ModelProto."""
    import onnx  # noqa: PLC0415  # of the extra `local`

    resources = wheel / "arabic_name_romanizer/resources"
    encoder, decoder = (onnx.load(resources / f"{side}.onnx") for side in ("encoder", "decoder"))
    _end_at_lengths(encoder.graph)
    onnx.checker.check_model(encoder, full_check=True)
    return encoder, decoder


def _end_at_lengths(graph: Any) -> None:
    """Have the encoder's GRUs stop where each row does.

    As exported they read a row's unused places as well, backwards even before its letters, so that an answer depends
    on the longest name that happens to be in the batch.
    """
    from onnx import TensorProto, helper  # noqa: PLC0415  # of the extra `local`

    node = helper.make_node
    lengths = [
        node("Not", ["src_mask"], ["lengths/used"]),
        node("Cast", ["lengths/used"], ["lengths/ones"], to=TensorProto.INT32),
        node("ReduceSum", ["lengths/ones", "lengths/axis"], ["lengths"], keepdims=0),
    ]
    graph.initializer.append(helper.make_tensor("lengths/axis", TensorProto.INT64, [1], [1]))
    for each in graph.node:
        if each.op_type == "GRU":
            each.input[4] = "lengths"
    for at, each in enumerate(lengths):
        graph.node.insert(at, each)
