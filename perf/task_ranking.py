"""Ranking, gateway ÷ direct, for 10, 1,000 and 10,000 candidates; bytes and time of both ways of choosing the best.

Run: python -m perf.task_ranking [SECONDS], for each of the measurements on a quiet machine. With --quality it measures
instead how good the films' model is on held-out likings, which fetches MovieLens 100K (research only).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway.artifacts import fetch
from gateway.forwarding.messages import build_request, parse_response
from gateway.models import movielens, ranking, sources, wordllama
from gateway.v1 import ranking_pb2, ranking_pb2_grpc
from perf.task_stack import served, timed, told

ITEMS = 32_000
OUTPUTS = {"recommendations": ("items", "best"), "recommendations-all": ("scores",)}
"""What each pipeline asks the model for."""


def _keep_best(config: dict[str, Any], _models: object) -> None:
    """Have the gateway choose as many as the model does, so that callers get the same either way."""
    config["models"]["recommendations-all"]["pipeline"]["steps"][-1]["with"]["k"] = ranking.BEST


async def measure(seconds: float) -> None:
    random = np.random.default_rng(0)
    async with served("recommend.yaml", ["recommend"], _keep_best) as stack:
        direct = service_pb2_grpc.GRPCInferenceServiceStub(stack.triton)
        through = ranking_pb2_grpc.RankingServiceStub(stack.gateway)
        for count in (10, 1_000, 10_000):
            history, candidates = random.integers(3, ITEMS, 20), random.permutation(ITEMS)[:count]
            tensors = {"history": history, "candidates": candidates}
            arrays = {name: array.astype(np.int32)[None] for name, array in tensors.items()}
            for model, outputs in OUTPUTS.items():
                infer = service_pb2.ModelInferRequest.FromString(build_request("recommend", arrays, outputs=outputs))
                asked = ranking_pb2.RankRequest(model=model, **tensors)

                async def by_hand(infer: Any = infer) -> int:
                    body = (await direct.ModelInfer(infer)).SerializeToString()
                    made = parse_response(body)
                    if "scores" in made:
                        np.argsort(-made["scores"][1], kind="stable")[:, : ranking.BEST]
                    return len(body)

                sent, received = infer.ByteSize(), await by_hand()
                took = {"direct": await timed(by_hand, seconds)}
                before = stack.cpu()
                took["gateway"] = await timed(lambda asked=asked: through.Rank(asked), seconds)
                cpu = (stack.cpu() - before) / len(took["gateway"]) * 1000
                ratio = median(took["gateway"]) / median(took["direct"])
                print(
                    f"{count:6} {model:20} model's bytes {sent} in, {received} out; gateway {told(took['gateway'])}, "
                    f"direct {told(took['direct'])}: {ratio:.2f}; gateway's CPU {cpu:.2f} ms"
                )


def quality() -> None:
    """Hits among the first ten of all films that the user has not rated highly before; the last liking is held out."""
    print(movielens.NOTICE)
    train, held = movielens.last_of_each(movielens.read(fetch(sources.RECBOLE)))
    popular = ranking.most_liked(train.items, len(train.texts)).astype(np.float32)
    factors = ranking.factorise(train.users, train.items, train.shape)
    texts = wordllama.embed(wordllama.read(fetch(sources.WORDLLAMA)), list(train.texts))
    ways: dict[str, Callable[[Any], Any]] = {
        "popularity": lambda _: popular,
        "matrix factorisation": lambda liked: _likeness(factors, liked),
        "… of the last 20 films": lambda liked: _likeness(factors, liked[-20:]),
        "texts (title, year, genres)": lambda liked: _likeness(texts, liked),
    }
    for name, score in ways.items():
        ranks = []
        for user, item in held.items():
            liked = train.items[train.users == user]
            scores = score(liked).copy()
            scores[liked] = -np.inf
            ranks.append(int((scores > scores[item]).sum()))
        found = np.array(ranks)
        gain = np.where(found < 10, 1 / np.log2(found + 2), 0).mean()
        print(f"{name:28} hit rate at 10 {(found < 10).mean():.3f}, NDCG at 10 {gain:.3f} ({len(held)} users)")


def _likeness(vectors: Any, liked: Any) -> Any:
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    user = unit[liked].sum(0)
    return unit @ (user / max(float(np.linalg.norm(user)), 1e-12))


if __name__ == "__main__":
    if "--quality" in sys.argv:
        quality()
    else:
        asyncio.run(measure(float(sys.argv[1]) if len(sys.argv) > 1 else 10))
