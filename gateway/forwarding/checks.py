"""The public models whose answers are looked at before their callers get them, and what was found.

What is wrong with an answer `v2.faults` says. What a model's outputs should be its own metadata tells, which is asked
for at each endpoint once, and again before an answer that does not fit it is judged: the model may be another by now.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from tritonclient.grpc import service_pb2 as pb

from gateway.errors import MalformedMessage
from gateway.forwarding.attempts import Attempt
from gateway.hooks import AnswersNow
from gateway.upstream.ask import Asker, ask
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint
from gateway.v2.faults import (
    CONTRACT,
    NOT_FINITE,
    Declared,
    Fault,
    maybe_misfit,
    maybe_not_finite,
)
from gateway.v2.outputs import Answer, AnswerReader, Output
from gateway.v2.peek import Head

_log = logging.getLogger(__name__)

IGNORE, COUNT, FALLBACK = "ignore", "count", "fallback"
FINE, UNCHECKED = "fine", "unchecked"
RESULTS: Final = (FINE, NOT_FINITE, CONTRACT, UNCHECKED)
_KEPT: Final = "outputs"  # where a `KnownModel` keeps what its metadata says
_ASK_AGAIN_SECONDS: Final = 5.0  # after a model's metadata could not be read
_ASKER: Final = Asker(timeout=1.0)  # answers may wait for this
_QUIET_SECONDS: Final = 60.0  # between two log lines on one model's faults

OnFound = Callable[[Fault | None], None]


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """What the config says of one public model: what to do about each kind of fault."""

    finite: str = COUNT
    contract: str = COUNT
    most: int = 1 << 20  # bytes of an answer that is looked at

    def fails(self, fault: Fault) -> bool:
        """Must the caller not get such an answer?"""
        return (self.finite if fault.kind == NOT_FINITE else self.contract) == FALLBACK


class Outputs:
    """What one model at one endpoint says of its outputs, for as long as the model stays as it is."""

    def __init__(self, endpoint: Endpoint, model: str, version: str) -> None:
        self.declared: Declared | None = None  # None: not known yet
        self.fitting: tuple[Output, ...] | None = None  # outputs of an answer that are as declared
        self._endpoint = endpoint
        self._model = model
        self._version = version
        self._waiting: list[Callable[[Declared | None], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._ask_at = 0.0

    def ask_soon(self) -> None:
        if asyncio.get_running_loop().time() >= self._ask_at:
            self._ask()

    def ask_anew(self, then: Callable[[Declared | None], None]) -> None:
        """then: gets what it says after this, or None if it can't be asked."""
        self._waiting.append(then)
        self._ask()

    def _ask(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._ask_until_told())

    async def _ask_until_told(self) -> None:
        while True:
            waiting, self._waiting = self._waiting, []  # whoever comes while it is asked wants a later answer
            self.declared, self.fitting = await self._maybe_declared(), None
            if self.declared is None:
                self._ask_at = asyncio.get_running_loop().time() + _ASK_AGAIN_SECONDS
            for then in waiting:
                then(self.declared)
            if not self._waiting:
                self._task = None
                return

    async def _maybe_declared(self) -> Declared | None:
        request = pb.ModelMetadataRequest(name=self._model, version=self._version)
        try:
            answer = await ask(self._endpoint, "ModelMetadata", request, pb.ModelMetadataResponse, _ASKER)
        except CallFailed as failure:
            _log.info("model %s: answers are not held to its metadata, which can't be read: %s", self._model, failure)
            return None
        return {output.name: (output.datatype, tuple(output.shape)) for output in answer.outputs}


class CheckedModel:
    """One public model in one worker."""

    def __init__(self, name: str, settings: CheckSettings, reader: AnswerReader) -> None:
        self.name = name
        self.settings = settings
        self.counts: dict[tuple[str, str], int] = {}  # answers by variant and result
        self._reader = reader
        self._quiet_until = 0.0

    def takes(self, attempt: Attempt, size: int) -> bool:
        """Is an answer of so many bytes looked at? One that is not is counted."""
        if size <= self.settings.most:
            return True
        self._count(attempt, UNCHECKED)
        return False

    def _count(self, attempt: Attempt, result: str) -> None:
        key = (attempt.variant.name, result)
        self.counts[key] = self.counts.get(key, 0) + 1

    def look(self, attempt: Attempt, body: bytes, head: Head, asked: bytes, on_found: OnFound) -> None:
        """Look at an answer.

        body, head: as its server gave it. asked: the request, or its beginning.
        on_found: called with what is wrong with it: at once, unless the model's metadata must be asked for first.
        """
        try:
            answer = self._reader.read(body, head)
            fault = maybe_not_finite(answer) if self.settings.finite != IGNORE else None
            outputs = self._outputs(attempt, head) if self.settings.contract != IGNORE else None
            if outputs is not None and not self._fits(answer, outputs, asked):
                outputs.ask_anew(lambda declared: self._again(attempt, answer, declared, asked, fault, on_found))
                return
        except MalformedMessage as error:
            fault = Fault(CONTRACT, error.text)
        self._tell(attempt, fault, on_found)

    @staticmethod
    def _fits(answer: Answer, outputs: Outputs, asked: bytes) -> bool:
        """Are the answer's outputs as declared, as far as that is known? Answers that are alike share descriptions."""
        found, declared = answer.outputs, outputs.declared
        if found is outputs.fitting or declared is None or not found:
            return True
        if maybe_misfit(found, declared, b"") is None:
            outputs.fitting = found
            return True
        return maybe_misfit(found, declared, asked) is None

    def _again(  # noqa: PLR0917  (what the question was about)
        self,
        attempt: Attempt,
        answer: Answer,
        declared: Declared | None,
        asked: bytes,
        fault: Fault | None,
        on_found: OnFound,
    ) -> None:
        """An answer did not fit what was known of its model, which has been asked since."""
        misfit = None if declared is None else maybe_misfit(answer.outputs, declared, asked)
        is_worse = fault is not None and self.settings.fails(fault)  # where a misfit is only counted
        self._tell(attempt, fault if is_worse or misfit is None else misfit, on_found)

    def _tell(self, attempt: Attempt, fault: Fault | None, on_found: OnFound) -> None:
        if fault is not None and self._is_ignored(fault):
            fault = None
        self._count(attempt, FINE if fault is None else fault.kind)
        if fault is not None:
            self._say(attempt, fault)
        on_found(fault)

    def _is_ignored(self, fault: Fault) -> bool:
        return fault.kind == CONTRACT and self.settings.contract == IGNORE

    def _say(self, attempt: Attempt, fault: Fault) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET_SECONDS
            where = f"variant '{attempt.variant.name}' at {attempt.endpoint.address}"
            _log.warning("model %s: an answer of %s is wrong: %s", self.name, where, fault.text)

    @staticmethod
    def _outputs(attempt: Attempt, head: Head) -> Outputs:
        endpoint, model, version = attempt.endpoint, attempt.variant.model, head.model_version
        kept = endpoint.known(model, version).kept
        found = kept.get(_KEPT)
        if not isinstance(found, Outputs):
            found = kept[_KEPT] = Outputs(endpoint, model, version)
        if found.declared is None:
            found.ask_soon()
        return found


class Checks:
    """By public model. `table` is empty, and false, when no answer is looked at."""

    def __init__(self, reader: AnswerReader | None = None) -> None:
        """reader: of others who look at the same answers."""
        self._reader = AnswerReader() if reader is None else reader
        self.table: dict[str, CheckedModel] = {}

    def apply(self, settings: Mapping[str, CheckSettings]) -> None:
        """Put a config in force. What was counted of a model stays while its settings do."""
        before = self.table
        self.table = {
            name: before[name]
            if name in before and before[name].settings == each
            else CheckedModel(name, each, self._reader)
            for name, each in settings.items()
        }

    def now(self) -> list[AnswersNow]:
        """May be asked from any thread."""
        return [
            AnswersNow(model.name, variant, {result: counts.get((variant, result), 0) for result in RESULTS})
            for model in list(self.table.values())
            for counts in (model.counts.copy(),)
            for variant in sorted({variant for variant, _ in counts})
        ]
