"""I/O: simulated users of the demo's experiment. Each sends one real picture, and later says whether he put it right.

What they report follows from the answers that they got: a user is content if what FP32 sees in his picture is among the
five best labels, but for a few who never are. So what the truth is can be counted beforehand.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from numpy.typing import NDArray

from gateway.artifacts import fetch
from gateway.forwarding.messages import build_request, parse_response
from gateway.models import pictures, sources
from gateway.v1 import outcomes_pb2, outcomes_pb2_grpc
from gateway.v2.names import INFER

Floats = NDArray[np.float32]

CORRECTED: Final = "corrected"
"""The outcome that users report."""
UNIT: Final = "x-user-id"
NEVER_CONTENT: Final = 0.05
"""The share of users that put any answer right."""

_PHOTOS: Final = ("astronaut", "camera", "chelsea", "clock_motion", "coffee", "motorcycle_left", "motorcycle_right")
_SHOWN: Final = 5  # labels
_TENTH: Final = 10
_DIMMED: Final = 0.25  # of the light
_LATER: Final = (0.5, 2.0)  # seconds until a user reports
_TIMEOUT: Final = 20.0  # seconds
_CHECKED: Final = 20  # calls after a rollout has ended


def photos() -> Floats:
    """Real pictures, ten views of each, [n, 3, 224, 224]. Every tenth is dark, as one of the night."""
    wheel = fetch(sources.PICTURES)
    made = [pictures.to_input(view) for name in _PHOTOS for view in pictures.views(_picture(wheel, name))]
    found = np.stack(made)
    found[_TENTH - 1 :: _TENTH] = (found[_TENTH - 1 :: _TENTH] + 1.0) * _DIMMED - 1.0
    return found


def _picture(wheel: Path, name: str) -> Any:  # Any: Pillow's
    return pictures.picture(wheel, f"{name}.png")


def scores_of(graph: bytes, photos: Floats) -> Floats:
    """What a graph answers, without any server. Blocks, for half a second per hundred pictures."""
    import onnxruntime  # noqa: PLC0415  # of the extra `local`

    session = onnxruntime.InferenceSession(graph)
    return np.concatenate([session.run(None, {"image": photo[None]})[0] for photo in photos])


def is_shown(scores: Floats, label: int) -> bool:
    """Is this label among those that a user gets to see?"""
    return label in np.argpartition(-scores, _SHOWN)[:_SHOWN]


@dataclass
class Seen:
    """What users of one public model have met.

    variants:  how many calls each answered.
    scores:    of their best classes, added up.
    after:     calls by variant, of those that began a while after its rollout had ended.
    """

    calls: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    wrong_in_kind: int = 0  # answers with NaN or infinity
    reports: int = 0
    variants: Counter[str] = field(default_factory=Counter)
    scores: dict[str, float] = field(default_factory=dict)
    after: Counter[str] | None = None

    def mean_score(self, variant: str) -> float:
        """Of the answers' best classes; NaN if it has answered none."""
        return self.scores[variant] / self.variants[variant] if self.variants[variant] else float("nan")

    def begin_check(self) -> None:
        """Count calls that begin from now on apart."""
        self.after = Counter()

    @property
    def is_checked(self) -> bool:
        return self.after is not None and self.after.total() >= _CHECKED


class Users:
    """They call and report between `start` and `aclose`, each model's in turn."""

    def __init__(self, channel: grpc.aio.Channel, photos: Floats, labels: Sequence[int]) -> None:
        """labels: what FP32 sees in each photo."""
        self._infer = channel.unary_unary(INFER)
        self._outcomes = outcomes_pb2_grpc.OutcomeServiceStub(channel)
        self._photos = photos
        self._labels = labels
        self._tasks: list[asyncio.Task[None]] = []
        self._late: set[asyncio.Task[None]] = set()
        self.seen: dict[str, Seen] = {}
        self.wanted: dict[str, str] = {}
        """Models that are called, and the experiment or rollout that reports are for."""

    def start(self, callers: int) -> None:
        self._tasks = [asyncio.ensure_future(self._call_on()) for _ in range(callers)]

    def want(self, model: str, experiment: str) -> None:
        self.wanted[model] = experiment
        self.seen[model] = Seen()

    async def aclose(self) -> None:
        for task in (*self._tasks, *self._late):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._late, return_exceptions=True)

    async def _call_on(self) -> None:
        for turn in itertools.count():
            models = list(self.wanted)
            if models:
                await self._call(models[turn % len(models)])
            else:
                await asyncio.sleep(0.1)

    async def _call(self, model: str) -> None:
        seen, experiment = self.seen[model], self.wanted[model]
        number, after = seen.calls, seen.after
        seen.calls += 1
        photo, unit = number % len(self._photos), f"{model}-user-{number}"
        body = build_request(model, {"image": self._photos[photo][None]})
        call = self._infer(body, metadata=((UNIT, unit),), timeout=_TIMEOUT)
        try:
            scores = parse_response(await call)["scores"][1][0]
        except grpc.aio.AioRpcError as error:
            seen.failures[f"{error.code().name}: {error.details()}"] += 1
            return
        (variant,) = (str(value) for key, value in await call.trailing_metadata() if key == "gateway-variant")
        seen.variants[variant] += 1
        seen.scores[variant] = seen.scores.get(variant, 0.0) + float(scores.max())
        if after is not None:
            after[variant] += 1
        seen.wrong_in_kind += not np.isfinite(scores).all()
        user = random.Random(unit)  # noqa: S311  # the same one in each run
        if user.random() < NEVER_CONTENT or not is_shown(scores, self._labels[photo]):
            task = asyncio.ensure_future(self._report(seen, unit, experiment, user.uniform(*_LATER)))
            self._late.add(task)
            task.add_done_callback(self._late.discard)

    async def _report(self, seen: Seen, unit: str, experiment: str, later: float) -> None:
        await asyncio.sleep(later)
        outcome = outcomes_pb2.Outcome(
            unit=unit, name=CORRECTED, binary=True, report_id=f"{unit}-{CORRECTED}", experiment=experiment
        )
        try:
            await self._outcomes.Report(outcomes_pb2.ReportRequest(outcomes=[outcome]), timeout=_TIMEOUT)
            seen.reports += 1
        except grpc.aio.AioRpcError as error:
            seen.failures[f"a report: {error.code().name}: {error.details()}"] += 1
