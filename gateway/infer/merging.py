"""Merging on the way: what `merge` decides, done, at one point for each model and version on each endpoint.

A point lives as long as its model stays as it is (`KnownModel`). It learns from the model's own config, metadata and
first answer whether and how far it batches. Until it knows, and for every request that can't be merged, the request
goes its way alone. A model that once gave an answer that can't be taken apart is not merged again until it changes.

While requests are merged, a look at the model's counts goes along with one of them every 10 ms, sent just after it, and
with each that comes after a rest. Triton counts anew when a model was loaded anew, so a batch that may have met another
model than the one that was asked about is seen by that; then its answer is thrown away, and its members are sent alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final, Protocol

from tritonclient.grpc import service_pb2 as pb

from gateway.bounded import make_room
from gateway.errors import GatewayError
from gateway.infer.attempts import Attempt
from gateway.infer.correlation import traced_id, with_own_id
from gateway.merge import Batch, Layouts, Member, MergeLimits, Merger, MergeSettings, carried, fits, why_not
from gateway.status import OK, Meaning, judge
from gateway.types import Metadata
from gateway.upstream.ask import ask
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.known import Counts, KnownModel
from gateway.v2.names import INFER, SERVICE
from gateway.wire.client import ClientCall
from gateway.wire.fields import Fields, fields_from
from gateway.wire.peek import Head, peek_response

_log = logging.getLogger(__name__)

_PATH: Final = INFER.encode()
_COUNTS_PATH: Final = (SERVICE + "ModelStatistics").encode()
_CONFIG_PATH: Final = (SERVICE + "ModelConfig").encode()
_OWN_FAULT: Final = (Meaning.CALLER, Meaning.SERVER, Meaning.UNCLEAR)  # what one member may have caused for all
_SPOILT_MOST: Final = 3  # batches that a caller may spoil …
_APART_SECONDS: Final = 10.0  # … before its requests go alone for so long
_SPOILERS_KEPT: Final = 1024  # callers come and go
_ASK_AGAIN_SECONDS: Final = 5.0  # after a model's config could not be had
_FRESH_SECONDS: Final = 0.01  # for which a look holds: each costs Triton as much as some requests
_LOOK_SECONDS: Final = 0.1  # that an answer waits for the look at its side: Triton answers none while a model loads


class Mergeable(Member, Protocol):
    """A forwarded request at a merge point."""

    batch: Batch[Any] | None  # that it is in, once that is on its way; a Protocol can't name itself there
    added: Metadata  # by telemetry, for upstream: its place in a trace, if it is traced

    @property
    def passed(self) -> Fields:
        """Of its caller's metadata, what goes upstream."""

    @property
    def context(self) -> Fields:
        """Its caller's own place in a trace, if the gateway traces nothing."""

    @property
    def upstream_id(self) -> str | None:
        """The request id upstream; None if it is not traced here."""

    def rides(self, requests: int, carrier: Metadata) -> None:
        """It is traced, and one of so many that travel together, with what telemetry added for one of them."""

    def send_alone(self, ended: Callable[[bool], None]) -> None:
        """Put it on the wire as it is. ended: told once, with whether the request itself was at fault."""

    def answered(self, body: bytes, head: Head, client: ClientCall, members: int) -> None:
        """Its own answer, out of a batch of so many."""

    def failed(self, client: ClientCall) -> None:
        """The batch failed in a way that is nobody's fault here; it may be tried elsewhere."""

    def broken(self) -> None:
        """It can't go on, for a fault in the gateway."""


def maybe_merge_point(model: str, attempt: Attempt, settings: MergeSettings, version: str) -> MergePoint | None:
    """The one where a request would be merged; None if it must go alone.

    model:    the public one, whose settings these are.
    version:  that the request asks for. One that the server is not known to have is for Triton to refuse.
    """
    variant = attempt.variant
    point = _point(model, attempt, settings, variant.version)
    if variant.version or not version:
        return point
    return _point(model, attempt, settings, version) if version in point.versions else None


def _point(model: str, attempt: Attempt, settings: MergeSettings, version: str) -> MergePoint:
    known = attempt.endpoint.known(attempt.variant.model, version)
    key = (MergePoint, model)
    point: MergePoint | None = known.kept.get(key)
    if point is None or (point.settings is not settings and point.settings != settings):
        if point is not None:
            point.end()
        point = known.kept[key] = MergePoint(attempt.endpoint, known, settings)
        known.on_forgotten[key] = point.end
    return point


class _Flight:
    """A batch on its way, and the look at its side, if it has one."""

    __slots__ = ("client", "is_confirmed", "look", "timer")

    def __init__(self, client: ClientCall, look: ClientCall | None) -> None:
        self.client = client
        self.look = look
        self.is_confirmed: bool | None = None if look is not None else True  # None: not known yet
        self.timer: asyncio.TimerHandle | None = None  # runs while the answer is here and the look is not


class MergePoint:
    """Where requests for one model meet."""

    def __init__(self, endpoint: Endpoint, known: KnownModel, settings: MergeSettings) -> None:
        self._endpoint = endpoint
        self._known = known
        self.settings = settings
        self.versions: frozenset[str] = frozenset()  # that the server has of the model, once it was asked
        self._loop = asyncio.get_running_loop()
        self._requests = Layouts(pb.ModelInferRequest)
        self._answers = Layouts(pb.ModelInferResponse)
        self._outputs: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._merger: Merger[Mergeable] | None = None  # None unless it is known that the model can be merged
        self._seen_same_at = -math.inf  # when the last look that saw no change was sent
        self._is_seen = False  # has an answer to a request alone been as its metadata say?
        self._never = False  # it can't be merged
        self._asking: asyncio.Task[None] | None = None
        self._ask_at = 0.0
        # ModelConfigRequest has the same fields.
        self._question = pb.ModelStatisticsRequest(name=known.name, version=known.version).SerializeToString()
        self._in_flight: dict[Batch[Mergeable], _Flight] = {}
        self._spoilt: dict[Hashable, tuple[int, float]] = {}  # by caller: how often, and until when it goes alone

    def takes(self, member: Mergeable) -> bool:
        """Can this request be merged? If so, the member knows how from now on; if not, it must go alone."""
        merger = self._merger
        if merger is None:
            self._ask()
            return False
        if (member.head.id and not self.settings.ignore_ids) or (self._spoilt and self._is_apart(member.caller)):
            return False
        found = self._requests.maybe_read(member.body, member.head)
        if found is None or found[0].rows >= merger.limits.rows:
            return False
        member.layout, member.spans = found
        member.carried = carried(member.passed, self.settings.metadata)
        return True

    def submit(self, member: Mergeable) -> None:
        """Send it, now or with others. Only if this point `takes` it."""
        assert self._merger is not None  # noqa: S101  (it takes the member)
        self._merger.submit(member)

    def saw(self, member: Mergeable, body: bytes, head: Head) -> None:
        """The answer to a member that went alone: what it shows of the model holds for batches too."""
        if self._merger is None:
            return
        found = self._answers.maybe_read(body, head)
        if found is None or found[0].rows != member.layout.rows or not fits(found[0], self._outputs):
            self._give_up("its answers are not rows of their requests")
        else:
            self._is_seen = True

    # Batches

    def _send(self, batch: Batch[Mergeable]) -> None:
        merger = self._merger  # that counts it; by its end there may be another one
        if len(batch.members) == 1:
            self._alone(batch.members[0], lambda at_fault: self._ended(batch, merger))
            return
        try:
            self._send_merged(batch, merger)
        except Exception:
            _log.exception("model %s: a merged request could not be sent", self._known.name)
            flight = self._in_flight.pop(batch, None)
            if flight is not None:
                flight.client.cancel()
            self._each(batch.members, _break)
            self._loop.call_soon(self._ended, batch, merger)  # the merger is in the middle of sending

    def _send_merged(self, batch: Batch[Mergeable], merger: Merger[Mergeable] | None) -> None:
        leader = next((member for member in batch.members if member.added), None)
        connection = self._endpoint.connection
        client = connection.call(_PATH, (*batch.members[0].carried, *_trace_fields(batch, leader)), None)
        id = traced_id(leader.added, "") or "" if leader is not None else ""
        client.request = batch.request(self._known.name, self._known.version, id)
        client.on_done = lambda done: self._done(batch, merger, done, id)
        now = self._loop.time()
        look = self._look(batch, merger, now) if now - self._seen_same_at > _FRESH_SECONDS else None
        for member in batch.members:
            member.batch = batch
            if leader is not None and member.added:
                member.rides(len(batch.members), leader.added)
        self._in_flight[batch] = _Flight(client, look)
        connection.submit(client)
        if look is not None:
            connection.submit(look)

    def left(self, batch: Batch[Mergeable]) -> None:
        """A member's caller has gone. When all have, nobody waits for the answer."""
        flight = self._in_flight.get(batch)
        if flight is not None and batch.is_abandoned:
            flight.client.cancel()

    def _done(self, batch: Batch[Mergeable], merger: Merger[Mergeable] | None, client: ClientCall, id: str) -> None:
        """A batch has come back."""
        flight = self._in_flight.get(batch)
        if flight is None:
            return
        if id:
            client.text = with_own_id(client.text, id, "")  # it is one member's, and none of the others' business
        if client.code is OK and flight.is_confirmed is None:
            flight.timer = self._loop.call_later(_LOOK_SECONDS, self._unconfirmed, batch, merger)
        else:
            self._end_flight(batch, merger, flight)

    def _look(self, batch: Batch[Mergeable], merger: Merger[Mergeable] | None, now: float) -> ClientCall:
        """Ask whether the model is still the same, by its counts if these can tell."""
        before: Counts = {} if self._known.is_young else self._known.counts
        look = self._endpoint.connection.call(_COUNTS_PATH if before else _CONFIG_PATH, (), None)
        look.request = self._question
        look.on_done = lambda done: self._looked(batch, merger, done, before, now)
        return look

    def _is_same(self, look: ClientCall, before: Counts) -> bool:
        if look.code is not OK:
            return False
        try:
            if before:
                return self._known.is_same_count(pb.ModelStatisticsResponse.FromString(look.body), before)
            return self._known.is_same_config(pb.ModelConfigResponse.FromString(look.body).config)
        except Exception:  # protobuf's DecodeError is not the same class in all its implementations
            return False

    def _looked(
        self,
        batch: Batch[Mergeable],
        merger: Merger[Mergeable] | None,
        look: ClientCall,
        before: Counts,
        sent_at: float,
    ) -> None:
        """The look at a batch's side has come back."""
        same = self._is_same(look, before)
        if same:
            self._seen_same_at = sent_at
        flight = self._in_flight.get(batch)
        if flight is None:
            if look.code is OK and not same:
                self._changed()
            return
        flight.is_confirmed = same
        if not same:
            self._changed()
        if flight.timer is not None:
            flight.timer.cancel()
            self._end_flight(batch, merger, flight)

    def _unconfirmed(self, batch: Batch[Mergeable], merger: Merger[Mergeable] | None) -> None:
        flight = self._in_flight.get(batch)
        if flight is not None:
            self._changed()  # for all that is known
            self._end_flight(batch, merger, flight)
            if flight.look is not None:
                flight.look.cancel()

    def _end_flight(self, batch: Batch[Mergeable], merger: Merger[Mergeable] | None, flight: _Flight) -> None:
        del self._in_flight[batch]
        for member in batch.members:
            member.batch = None
        try:
            if flight.client.code is not OK:
                self._refused(batch, flight.client)
            elif flight.is_confirmed and self._known.is_current and self._is_seen and not self._never:
                self._hand_out(batch, flight.client)
            else:
                self._one_by_one(batch.members)
        except Exception:
            _log.exception("model %s: a merged answer could not be handed out", self._known.name)
            self._each(batch.members, _break)
        finally:
            self._ended(batch, merger)

    def _hand_out(self, batch: Batch[Mergeable], client: ClientCall) -> None:
        body = client.body
        try:
            head = peek_response(body)
            found = self._answers.maybe_read(body, head)
        except GatewayError:
            found = None
        if found is None or found[0].rows != batch.rows or not fits(found[0], self._outputs):
            self._give_up("a merged answer can't be taken apart")
            self._one_by_one(batch.members)
            return
        layout, spans = found
        size = len(batch.members)
        answers = dict(zip(batch.members, batch.answers(body, head, layout, spans), strict=True))
        self._each(batch.members, lambda member: member.answered(answers[member], head, client, size))

    def _refused(self, batch: Batch[Mergeable], client: ClientCall) -> None:
        known = self._known
        verdict = judge(client.code, client.text, client.origin, model=known.name, version=known.version)
        if verdict.meaning in _OWN_FAULT:
            self._one_by_one(batch.members)
            return
        self._each(batch.members, lambda member: member.failed(client))

    def _one_by_one(self, members: Sequence[Mergeable]) -> None:
        """Send the members of a batch that was refused on their own: whose fault it was shows in their own answers."""
        self._each(members, lambda member: member.send_alone(self._judge_alone(member)))

    def _alone(self, member: Mergeable, ended: Callable[[bool], None]) -> None:
        try:
            member.send_alone(ended)
        except Exception:
            _log.exception("model %s: a request could not be sent", self._known.name)
            self._each([member], _break)
            self._loop.call_soon(ended, False)

    def _each(self, members: Sequence[Mergeable], act: Callable[[Mergeable], None]) -> None:
        """Do it for every member whose caller is there; what goes wrong with one ends that one only."""
        for member in members:
            if member.is_over:
                continue
            try:
                act(member)
            except Exception:
                _log.exception("model %s: unforeseen failure with one of a merged request", self._known.name)
                if act is not _break and not member.is_over:
                    self._each([member], _break)

    def _judge_alone(self, member: Mergeable) -> Callable[[bool], None]:
        caller = member.caller

        def ended(at_fault: bool) -> None:
            count, until = self._spoilt.get(caller, (0, 0.0))
            if at_fault:
                count += 1
                if count >= _SPOILT_MOST:
                    until = self._loop.time() + _APART_SECONDS
                if caller not in self._spoilt:
                    make_room(self._spoilt, _SPOILERS_KEPT)
                self._spoilt[caller] = (count, until)

        return ended

    def _is_apart(self, caller: Hashable) -> bool:
        count, until = self._spoilt.get(caller, (0, 0.0))
        if count < _SPOILT_MOST:
            return False
        if self._loop.time() < until:
            return True
        del self._spoilt[caller]
        return False

    def _ended(self, batch: Batch[Mergeable], merger: Merger[Mergeable] | None) -> None:
        if merger is not None and merger is self._merger:
            merger.ended(batch, self._loop.time())

    # The model

    def _ask(self) -> None:
        if self._asking is None and not self._never and self._loop.time() >= self._ask_at:
            self._asking = self._loop.create_task(self._learn())

    async def _learn(self) -> None:
        known = self._known
        try:
            # Counts first: a reload after them is seen at the next look.
            counts = pb.ModelStatisticsRequest(name=known.name, version=known.version)
            statistics = await ask(self._endpoint, "ModelStatistics", counts, pb.ModelStatisticsResponse)
            question = pb.ModelConfigRequest(name=known.name, version=known.version)
            config = (await ask(self._endpoint, "ModelConfig", question, pb.ModelConfigResponse)).config
            asked = pb.ModelMetadataRequest(name=known.name, version=known.version)
            metadata = await ask(self._endpoint, "ModelMetadata", asked, pb.ModelMetadataResponse)
        except CallFailed as failure:
            _log.info("model %s: its config can't be had, so nothing is merged: %s", known.name, failure)
            self._ask_at = self._loop.time() + _ASK_AGAIN_SECONDS
            return
        finally:
            self._asking = None
        if not (known.is_current and known.is_same_count(statistics, known.counts) and known.is_same_config(config)):
            self._changed()
            return
        self.versions = frozenset(metadata.versions)
        self._outputs = {output.name: (output.datatype, tuple(output.shape)) for output in metadata.outputs}
        reason = why_not(config, metadata)
        rows = min(config.max_batch_size, self.settings.rows or config.max_batch_size)
        if reason or rows < 2:
            self._give_up(reason or "its rows are limited to one")
            return
        limits = MergeLimits(rows, self.settings.bytes, self.settings.in_flight, self.settings.delay)
        self._merger = Merger(limits, self._loop.time(), self._send, self._loop.call_later, self._loop.call_soon)

    def _give_up(self, reason: str) -> None:
        """Merge nothing more of this model, until it changes."""
        self._never = True
        _log.warning("model %s: %s; its requests go alone until it is loaded anew", self._known.name, reason)
        self.end()

    def _changed(self) -> None:
        """The model is not the one that was asked about."""
        if self._known.is_current:
            self._endpoint.forget(self._known.name)

    def end(self) -> None:
        """Merge nothing. What waits goes alone; answers on their way are judged when they are here."""
        merger, self._merger = self._merger, None
        if merger is not None:
            for member in merger.abandon():
                self._alone(member, _ignore)


def _ignore(at_fault: bool) -> None: ...


def _break(member: Mergeable) -> None:
    member.broken()


def _trace_fields(batch: Batch[Mergeable], leader: Mergeable | None) -> Fields:
    """The place in a trace of one of the members: Triton takes one parent."""
    if leader is not None:
        return tuple(fields_from(leader.added))
    return next((member.context for member in batch.members if member.context), ())
