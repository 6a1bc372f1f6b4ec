"""wordllama: embeddings of texts, the mean of their words' vectors; and the splitting of texts into those words.

source: wordllama 0.4.0.post1, `inference.py`: `WordLlamaInference.embed`. The tokenizer is Llama 2's: byte pairs are
        merged in the order in which they were learnt, and a character that is not known becomes its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_SPACE = "▁"
_MOST_WORDS = 256
"""The package cuts longer texts so. (Its padding, and so its mean, does not change by that.)"""


@dataclass(frozen=True)
class Source:
    """vectors: [words, 256]. numbers: word → its row. ranks: pair of words → when their merging was learnt."""

    vectors: Floats
    numbers: Mapping[str, int]
    ranks: Mapping[tuple[str, str], int]


def read(wheel: Path) -> Source:
    """wheel: the folder with the unpacked `sources.WORDLLAMA`."""
    told = json.loads((wheel / "wordllama/tokenizers/l2_supercat_tokenizer_config.json").read_text("utf-8"))["model"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in told["merges"]]
    vectors = _read_safetensors((wheel / "wordllama/weights/l2_supercat_256.safetensors").read_bytes())
    return Source(vectors, told["vocab"], {(first, second): rank for rank, (first, second) in enumerate(pairs)})


def _read_safetensors(data: bytes) -> Floats:
    """source: the safetensors format: the header's length as a little-endian uint64, JSON, the values."""
    length = int.from_bytes(data[:8], "little")
    told = json.loads(data[8 : 8 + length])["embedding.weight"]
    begin, end = told["data_offsets"]
    values = np.frombuffer(data[8 + length + begin : 8 + length + end], "<f2")
    return values.reshape(told["shape"]).astype(np.float32)


def words(source: Source) -> list[str]:
    """The text of each row, as people read it."""
    texts = sorted(source.numbers, key=source.numbers.__getitem__)
    return [text.replace(_SPACE, " ").strip() or repr(text) for text in texts]


def embed(source: Source, texts: Sequence[str]) -> Floats:
    """[texts, 256]."""
    made = np.zeros((len(texts), source.vectors.shape[1]), np.float32)
    for row, text in enumerate(texts):
        numbers = tokenize(source, text)
        if numbers:
            made[row] = source.vectors[numbers].mean(0)
    return made


def tokenize(source: Source, text: str) -> list[int]:
    """The numbers of a text's words, as the package's tokenizer makes them."""
    parts: list[str] = list((_SPACE + text).replace(" ", _SPACE)) if text else []
    while True:
        known = [(source.ranks.get(pair, -1), at) for at, pair in enumerate(pairwise(parts))]
        known = [each for each in known if each[0] >= 0]
        if not known:
            break
        _, at = min(known)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    numbers = []
    for part in parts:
        found = source.numbers.get(part)
        numbers += [found] if found is not None else [source.numbers[f"<0x{byte:02X}>"] for byte in part.encode()]
    return numbers[:_MOST_WORDS]
