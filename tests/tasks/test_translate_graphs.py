"""The graphs of the text-to-text models against plain numpy and the package's own graphs, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.artifacts import fetch
from gateway.models import cn2en, romanizer, sources, text_to_text
from gateway.steps.vocabulary import Vocabulary

NAMES = ("حبيبة عطيفي", "محمد صلاح", "عبد الرحمن", "سيف الدين", "فاطمة الزهراء بن علي")


class Whole:
    """A whole graph and its vocabulary."""

    def __init__(self, encoder: Any, decoder: Any, vocabulary: bytes) -> None:
        self.vocabulary = Vocabulary(vocabulary)
        graph = text_to_text.whole(encoder, decoder, self.vocabulary)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(self, rows: list[list[tuple[int, ...]]], *, spare: int = 0) -> list[list[list[int]]]:
        """The numbers of each part of each row. spare: unused places more than are needed, of parts and of words."""
        parts, words = max(map(len, rows)), max(len(part) for row in rows for part in row)
        tokens = np.full((len(rows), parts + spare, words + spare), -1, np.int32)
        for at, row in enumerate(rows):
            for n, part in enumerate(row):
                tokens[at, n, : len(part)] = part
        (made,) = self._session.run(None, {"tokens": tokens})
        assert made.shape == (len(rows), parts + spare, self.vocabulary.most_tokens)
        return [made[at, : len(row)].tolist() for at, row in enumerate(rows)]

    def translate(self, texts: list[str], *, spare: int = 0) -> list[str]:
        made = self.run([list(self.vocabulary.encode(text.encode()).parts) for text in texts], spare=spare)
        return [self.vocabulary.decode(parts)[0] for parts in made]


@pytest.fixture(scope="module")
def source() -> cn2en.Source:
    return cn2en.read(fetch(sources.CN2EN))


@pytest.fixture(scope="module")
def chinese(source: cn2en.Source) -> Whole:
    return Whole(cn2en.encoder(source), cn2en.decoder(source), cn2en.vocabulary(source))


@pytest.fixture(scope="module")
def arabic_wheel() -> Path:
    return fetch(sources.ROMANIZER)


@pytest.fixture(scope="module")
def arabic(arabic_wheel: Path) -> Whole:
    return Whole(*romanizer.networks(arabic_wheel), romanizer.vocabulary(arabic_wheel))


def plainly(source: cn2en.Source, words: tuple[int, ...], most: int) -> list[int]:
    """cn2en as its `model.py` computes it, step by step in numpy."""

    def gru(side: str, x: Any, h: Any) -> Any:
        def both(kind: str, value: Any) -> Any:
            weights = source.weights
            made = weights[f"{side}.gru.weight_{kind}_l0"] @ value + weights[f"{side}.gru.bias_{kind}_l0"]
            return np.split(made, 3)

        (xr, xz, xn), (hr, hz, hn) = both("ih", x), both("hh", h)
        reset, update = 1 / (1 + np.exp(-(xr + hr))), 1 / (1 + np.exp(-(xz + hz)))
        return (1 - update) * np.tanh(xn + reset * hn) + update * h

    state = np.zeros(cn2en.HIDDEN, np.float32)
    for word in words:
        state = gru("encoder", source.weights["encoder.embedding.weight"][word], state)
    made = [cn2en.START]
    while len(made) <= most and (len(made) == 1 or made[-1] != cn2en.END):
        embedded = np.maximum(source.weights["decoder.embedding.weight"][made[-1]], 0)
        state = gru("decoder", embedded, state)
        scores = source.weights["decoder.out.weight"] @ state + source.weights["decoder.out.bias"]
        made.append(int(scores.argmax()))
    return made[1:]


@settings(max_examples=8, deadline=None, database=None)
@given(rows=st.lists(st.lists(st.integers(2, 3276), min_size=0, max_size=8), min_size=1, max_size=3))
def test_the_graph_computes_what_numpy_does_for_any_words_and_companions(
    source: cn2en.Source, chinese: Whole, rows: list[list[int]]
) -> None:
    texts = [(*row, cn2en.END) for row in rows]
    most = chinese.vocabulary.most_tokens
    for text, (made,) in zip(texts, chinese.run([[text] for text in texts], spare=1), strict=True):
        told = plainly(source, text, most)
        assert made == told + [cn2en.END] * (most - len(told))


def test_a_name_comes_out_alike_alone_and_in_company(arabic: Whole) -> None:
    """The package's own graph does not: as it is exported, its encoder reads the unused places of a batch as well."""
    alone = [arabic.translate([name])[0] for name in NAMES]
    assert alone == arabic.translate(list(NAMES)) == arabic.translate(list(NAMES), spare=5)


def test_a_name_without_companions_is_what_the_package_s_own_graphs_make(arabic: Whole, arabic_wheel: Path) -> None:
    resources = arabic_wheel / "arabic_name_romanizer/resources"
    encoder, decoder = (onnxruntime.InferenceSession(resources / f"{side}.onnx") for side in ("encoder", "decoder"))
    vocabulary = arabic.vocabulary
    for name in NAMES:
        for part in vocabulary.encode(name.encode()).parts:
            src = np.array([part])
            memory, mask, hidden = encoder.run(None, {"src": src, "src_mask": np.zeros_like(src, np.bool_)})
            made = [vocabulary.start]
            while made[-1] != vocabulary.end:
                given = {"prefix": np.array([made]), "memory": memory, "src_mask": mask, "hidden": hidden}
                scores, hidden = decoder.run(None, given)
                made.append(int(scores.argmax()))
            ((ours,),) = arabic.run([[part]])
            assert ours[: len(made) - 1] == made[1:]
