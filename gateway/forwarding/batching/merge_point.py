"""I/O of merging: one merge point for each model and version on each endpoint sends what a `Merger` decides.

A point lives until its model changes (`KnownModel`). It learns from the model's own config, metadata and first answer
whether the model can be merged, and up to how many rows. Until then, and if a request can't be merged, the request is
sent alone. A model that gave an answer which can't be split into rows is not merged again until it changes.

A check of the model is sent just after a merged request, if the last check is older than `merge.recheck`. Triton
resets a model's counts when it loads the model, so the check shows whether the batch may have met another model than
the one that was asked about. If so, its answer is dropped and its members are sent alone.
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
from gateway.forwarding.attempts import Attempt
from gateway.forwarding.batching import (
    Batch,
    Layouts,
    Member,
    MergeLimits,
    Merger,
    MergeSettings,
    carried,
    fits,
    why_not,
)
from gateway.forwarding.correlation import traced_id, with_own_id
from gateway.rpc.client import ClientCall
from gateway.rpc.metadata import Fields, fields_from
from gateway.status import OK, Meaning, classify
from gateway.types import Metadata
from gateway.upstream.ask import ask
from gateway.upstream.connection import CallFailed
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.kept import Kept
from gateway.upstream.known import Counts, KnownModel
from gateway.upstream.placed import Placed
from gateway.v2.names import INFER, SERVICE
from gateway.v2.peek import Head, peek_response

_log = logging.getLogger(__name__)

_PATH: Final = INFER.encode()
_COUNTS_PATH: Final = (SERVICE + "ModelStatistics").encode()
_CONFIG_PATH: Final = (SERVICE + "ModelConfig").encode()
_MEMBERS_FAULT: Final = (Meaning.CALLER, Meaning.SERVER, Meaning.UNCLEAR)  # failures that one member may have caused
_MOST_FAILED: Final = 3  # batches that a caller's requests may fail before they are sent alone
_ALONE_SECONDS: Final = 10.0  # how long the requests of such a caller are sent alone
_MOST_OFFENDERS: Final = 1024  # callers whose failed batches are counted
_ASK_AGAIN_SECONDS: Final = 5.0  # after a model's config could not be read
_CHECK_SECONDS: Final = 0.1  # how long an answer waits for the check of its model: Triton is silent while a model loads


class Mergeable(Member, Protocol):
    """A forwarded request at a merge point."""

    body: bytes  # its message
    batch: Batch[Any] | None  # the batch in flight that has this request (Any: a Protocol can't name itself there)
    added: Metadata  # metadata of the attempt that telemetry adds: its trace context, if it is traced

    @property
    def passed(self) -> Fields:
        """The part of the caller's metadata that goes upstream."""

    @property
    def context(self) -> Fields:
        """The caller's own trace context, if the gateway traces nothing."""

    @property
    def blamed(self) -> Hashable:
        """Who is to blame if it makes a batch fail: its caller's name or, if that is not known, his connection."""

    @property
    def upstream_id(self) -> str | None:
        """The request id used upstream; None if the request is not traced here."""

    def left_in_batch(self, requests: int, carrier: Metadata) -> None:
        """Record that this traced request left in a batch of `requests`.

        carrier: metadata of the attempt that Triton saw, with its traceparent.
        """

    def send_alone(self, ended: Callable[[bool], None]) -> None:
        """Send the request unmerged. ended: called once, with True if the request itself was at fault."""

    def answered(self, body: bytes, head: Head, client: ClientCall, members: int) -> None:
        """The request's own answer has arrived, in the answer to a batch of `members` requests."""

    def failed(self, client: ClientCall) -> None:
        """The batch failed by no member's fault; the request may be tried elsewhere."""

    def broken(self) -> None:
        """End the request with the error for a bug of the gateway."""


def maybe_merge_point(model: str, attempt: Attempt, settings: MergeSettings, version: str) -> MergePoint | None:
    """The merge point for a request; None if the request must be sent alone.

    model:    the public model, whose settings these are.
    version:  the version that the request asks for. Triton must refuse one that it is not known to have.
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


class _InFlight:
    """A batch in flight, and the check of its model, if there is one."""

    __slots__ = ("check", "client", "is_confirmed", "kept", "placed", "timer")

    def __init__(self, client: ClientCall, placed: Placed | None) -> None:
        """placed: the members' tensors together, if they are not in the request."""
        self.client = client
        self.placed = placed
        self.kept: Kept | None = None  # of that memory
        self.check: ClientCall | None = None
        self.is_confirmed: bool | None = True  # None: the check has no answer yet
        self.timer: asyncio.TimerHandle | None = None  # runs while the answer waits for the check

    @property
    def is_forgotten(self) -> bool:
        """Has the server not begun with it, since it does not know the memory that it is in?"""
        return self.placed is not None and self.client.code is not OK and self.placed.is_unknown(self.client.text)


class MergePoint:
    """Merges the requests for one model and version on one endpoint."""

    def __init__(self, endpoint: Endpoint, known: KnownModel, settings: MergeSettings) -> None:
        self._endpoint = endpoint
        self._known = known
        self.settings = settings
        self.versions: frozenset[str] = frozenset()  # the model's versions on the server; empty until it was asked
        self._loop = asyncio.get_running_loop()
        self._requests = Layouts(pb.ModelInferRequest)
        self._answers = Layouts(pb.ModelInferResponse)
        self._outputs: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._merger: Merger[Mergeable] | None = None  # None unless it is known that the model can be merged
        self._confirmed_at = -math.inf  # when the last check that found no change was sent
        self.is_proven = False  # did the answer to a request that was sent alone match the model's metadata?
        self._is_given_up = False  # the model can't be merged, until it changes
        self._asking: asyncio.Task[None] | None = None
        self._ask_at = 0.0
        # The bytes of a ModelConfigRequest too, which has the same fields.
        self._question = pb.ModelStatisticsRequest(name=known.name, version=known.version).SerializeToString()
        self._in_flight: dict[Batch[Mergeable], _InFlight] = {}
        # By who is to blame: how many batches failed, and the instant until which his requests are sent alone.
        self._offenders: dict[Hashable, tuple[int, float]] = {}

    def takes(self, member: Mergeable, placed: Placed | None = None) -> bool:
        """Can this request be merged? If so, what a `Member` has is set; if not, send it alone.

        placed: its tensors, if they are not in its message but all in memory that the endpoint shares.
        """
        merger = self._merger
        if merger is None:
            self._ask()
            return False
        if (member.head.id and not self.settings.ignore_ids) or (
            self._offenders and self._is_sent_alone(member.blamed)
        ):
            return False
        if placed is None:
            member.source = member.body
            found = self._requests.maybe_read(member.body, member.head)
        else:
            member.source, spans = placed.memory, placed.maybe_spans()
            found = None if spans is None else self._requests.maybe_read_apart(placed.layout, placed.memory, spans)
        if found is None or found[0].rows >= merger.limits.rows:
            return False
        member.layout, member.spans = found
        member.carried = carried(member.passed, self.settings.metadata, self.settings.caller_key)
        return True

    def submit(self, member: Mergeable) -> None:
        """Send a request, at once or together with others. Only for one that this point `takes`."""
        assert self._merger is not None  # noqa: S101  (it takes the member)
        self._merger.submit(member)

    def learn(self, member: Mergeable, body: bytes, head: Head) -> None:
        """Learn from the answer to a request that was sent alone whether the model's answers can be split into rows."""
        if self._merger is None:
            return
        found = self._answers.maybe_read(body, head)
        if found is None or found[0].rows != member.layout.rows or not fits(found[0], self._outputs):
            self._give_up("its answers are not rows of their requests")
        else:
            self.is_proven = True

    # Batches

    def _send(self, batch: Batch[Mergeable]) -> None:
        merger = self._merger  # the one that counts the batch; there may be another one when the batch ends
        if len(batch.members) == 1:
            self._send_alone(batch.members[0], lambda at_fault: self._ended(batch, merger))
            return
        try:
            self._send_merged(batch, merger)
        except Exception:
            _log.exception("model %s: a merged request could not be sent", self._known.name)
            in_flight = self._in_flight.pop(batch, None)
            if in_flight is not None:
                in_flight.client.cancel()
            self._each(batch.members, _break)
            self._loop.call_soon(self._ended, batch, merger)  # later, since the merger is still in `_pump`

    def _send_merged(self, batch: Batch[Mergeable], merger: Merger[Mergeable] | None) -> None:
        leader = next((member for member in batch.members if member.added), None)
        connection = self._endpoint.connection
        client = connection.call(_PATH, (*batch.members[0].carried, *_trace_fields(batch, leader)), None)
        id = traced_id(leader.added, "") or "" if leader is not None else ""
        placed = self._maybe_gather(batch, client, id)
        if placed is None and merger is not None and batch.size > merger.limits.bytes:
            # There was no room where it could be gathered, and as a message it is too large.
            self._each(batch.members, lambda member: self._send_alone(member, _ignore))
            self._loop.call_soon(self._ended, batch, merger)  # later, since the merger is still in `_pump`
            return
        in_flight = self._in_flight[batch] = _InFlight(client, placed)
        if placed is None:
            client.request = batch.request(self._known.name, self._known.version, id)
        else:
            kept = in_flight.kept = placed.kept((self._known.name, self._known.version, id))
            client.keep_for_server(kept.released, kept.is_own)
            placed.sent()
            placed.drop()  # the members keep their own, and the server this one
        client.on_done = lambda done: self._done(batch, merger, done, id)
        now = self._loop.time()
        check: ClientCall | None = None
        if now - self._confirmed_at >= self.settings.recheck:
            check = in_flight.check = self._check(batch, merger, now)
            in_flight.is_confirmed = None
        for member in batch.members:
            member.batch = batch
            if leader is not None and member.added:
                member.left_in_batch(len(batch.members), leader.added)
        connection.submit(client)
        if check is not None:
            connection.submit(check)

    def _maybe_gather(self, batch: Batch[Mergeable], client: ClientCall, id: str) -> Placed | None:
        """Lay the members' tensors together into memory that the endpoint shares, and have the call say where."""
        memory, size = self._endpoint.memory, batch.size
        if memory is None or size < memory.least or not memory.suits(self._known.name):
            return None
        name, version = self._known.name, self._known.version
        placed = memory.maybe_place_raw(batch.front(name, version, id), batch.tensors(), size)
        if placed is None:
            return None
        names = name, version, id
        client.request = placed.request(names)
        if client.request is None:
            placed.drop()
            return None
        return placed

    def maybe_given_up(self, batch: Batch[Mergeable]) -> Kept | None:
        """A member's caller has gone. Cancel the batch if all of its callers have.

        returns: what the server keeps for it, if it goes on all the same.
        """
        in_flight = self._in_flight.get(batch)
        if in_flight is None or not batch.is_abandoned:
            return None
        in_flight.client.cancel()
        return in_flight.kept if in_flight.client.is_kept else None

    def _done(self, batch: Batch[Mergeable], merger: Merger[Mergeable] | None, client: ClientCall, id: str) -> None:
        """A batch has ended, with an answer or an error."""
        in_flight = self._in_flight.get(batch)
        if in_flight is None:
            return
        if in_flight.is_forgotten:
            del self._in_flight[batch]
            self._each(batch.members, lambda member: self._send_alone(member, _ignore))
            self._ended(batch, merger)
            return
        if id:
            client.text = with_own_id(client.text, id, "")  # the id of one member, which the others must not see
        if client.code is OK and in_flight.is_confirmed is None:
            in_flight.timer = self._loop.call_later(_CHECK_SECONDS, self._unconfirmed, batch, merger)
        else:
            self._finish(batch, merger, in_flight)

    def _check(self, batch: Batch[Mergeable], merger: Merger[Mergeable] | None, now: float) -> ClientCall:
        """Ask whether the model is still the same: by its counts, or by its config if the counts can't tell."""
        before: Counts = {} if self._known.is_young else self._known.counts
        check = self._endpoint.connection.call(_COUNTS_PATH if before else _CONFIG_PATH, (), None)
        check.request = self._question
        check.on_done = lambda done: self._checked(batch, merger, done, before, now)
        return check

    def _is_same(self, check: ClientCall, before: Counts) -> bool:
        if check.code is not OK:
            return False
        try:
            if before:
                return self._known.is_same_count(pb.ModelStatisticsResponse.FromString(check.body), before)
            return self._known.is_same_config(pb.ModelConfigResponse.FromString(check.body).config)
        except Exception:  # protobuf's DecodeError is not the same class in all its implementations
            return False

    def _checked(
        self,
        batch: Batch[Mergeable],
        merger: Merger[Mergeable] | None,
        check: ClientCall,
        before: Counts,
        sent_at: float,
    ) -> None:
        """The check that was sent beside a batch has ended."""
        same = self._is_same(check, before)
        if same:
            self._confirmed_at = sent_at
        in_flight = self._in_flight.get(batch)
        if in_flight is None:
            if check.code is OK and not same:
                self._changed()
            return
        in_flight.is_confirmed = same
        if not same:
            self._changed()
        if in_flight.timer is not None:
            in_flight.timer.cancel()
            self._finish(batch, merger, in_flight)

    def _unconfirmed(self, batch: Batch[Mergeable], merger: Merger[Mergeable] | None) -> None:
        in_flight = self._in_flight.get(batch)
        if in_flight is not None:
            self._changed()  # as far as is known
            self._finish(batch, merger, in_flight)
            if in_flight.check is not None:
                in_flight.check.cancel()

    def _finish(self, batch: Batch[Mergeable], merger: Merger[Mergeable] | None, in_flight: _InFlight) -> None:
        del self._in_flight[batch]
        for member in batch.members:
            member.batch = None
        try:
            if in_flight.client.code is not OK:
                self._batch_failed(batch, in_flight.client)
            elif in_flight.is_confirmed and self._known.is_current and self.is_proven and not self._is_given_up:
                self._hand_out(batch, in_flight.client)
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

    def _batch_failed(self, batch: Batch[Mergeable], client: ClientCall) -> None:
        known = self._known
        verdict = classify(client.code, client.text, client.origin, model=known.name, version=known.version)
        if verdict.meaning in _MEMBERS_FAULT:
            self._one_by_one(batch.members)
            return
        self._each(batch.members, lambda member: member.failed(client))

    def _one_by_one(self, members: Sequence[Mergeable]) -> None:
        """Send the members of a batch alone: their own answers show whose fault the failure of the batch was."""
        self._each(members, lambda member: member.send_alone(self._judge_alone(member)))

    def _send_alone(self, member: Mergeable, ended: Callable[[bool], None]) -> None:
        try:
            member.send_alone(ended)
        except Exception:
            _log.exception("model %s: a request could not be sent", self._known.name)
            self._each([member], _break)
            self._loop.call_soon(ended, False)

    def _each(self, members: Sequence[Mergeable], act: Callable[[Mergeable], None]) -> None:
        """Call `act` for every member whose caller has not gone. An exception ends that member and no other."""
        for member in members:
            if member.is_over:
                continue
            try:
                act(member)
            except Exception:
                _log.exception("model %s: unforeseen failure with one member of a merged request", self._known.name)
                if act is not _break and not member.is_over:
                    self._each([member], _break)

    def _judge_alone(self, member: Mergeable) -> Callable[[bool], None]:
        blamed = member.blamed

        def ended(at_fault: bool) -> None:
            count, until = self._offenders.get(blamed, (0, 0.0))
            if at_fault:
                count += 1
                if count >= _MOST_FAILED:
                    until = self._loop.time() + _ALONE_SECONDS
                if blamed not in self._offenders:
                    make_room(self._offenders, _MOST_OFFENDERS)
                self._offenders[blamed] = (count, until)

        return ended

    def _is_sent_alone(self, blamed: Hashable) -> bool:
        count, until = self._offenders.get(blamed, (0, 0.0))
        if count < _MOST_FAILED:
            return False
        if self._loop.time() < until:
            return True
        del self._offenders[blamed]
        return False

    def _ended(self, batch: Batch[Mergeable], merger: Merger[Mergeable] | None) -> None:
        if merger is not None and merger is self._merger:
            merger.ended(batch, self._loop.time())

    # What is known of the model

    def _ask(self) -> None:
        if self._asking is None and not self._is_given_up and self._loop.time() >= self._ask_at:
            self._asking = self._loop.create_task(self._ask_model())

    async def _ask_model(self) -> None:
        """Ask the server whether the model can be merged, and up to how many rows."""
        known = self._known
        try:
            # The counts come first, so that the next check sees a reload that comes after them.
            counts = pb.ModelStatisticsRequest(name=known.name, version=known.version)
            statistics = await ask(self._endpoint, "ModelStatistics", counts, pb.ModelStatisticsResponse)
            question = pb.ModelConfigRequest(name=known.name, version=known.version)
            config = (await ask(self._endpoint, "ModelConfig", question, pb.ModelConfigResponse)).config
            asked = pb.ModelMetadataRequest(name=known.name, version=known.version)
            metadata = await ask(self._endpoint, "ModelMetadata", asked, pb.ModelMetadataResponse)
        except CallFailed as failure:
            _log.info("model %s: its config can't be read, so its requests are not merged: %s", known.name, failure)
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
        loop = self._loop
        self._merger = Merger(limits, loop.time(), self._send, loop.call_later, loop.call_soon, gathers=self._gathers)

    def _gathers(self) -> int:
        memory = self._endpoint.memory
        return 0 if memory is None else memory.gathers

    def _give_up(self, reason: str) -> None:
        """Merge no more requests for this model, until it changes."""
        self._is_given_up = True
        _log.warning("model %s: %s; its requests are not merged until it is loaded again", self._known.name, reason)
        self.end()

    def _changed(self) -> None:
        """The model is not the one that was asked about: forget what is known of it, this point too."""
        if self._known.is_current:
            self._endpoint.forget(self._known.name)

    def end(self) -> None:
        """Merge no more. Send alone what waits; answers to batches in flight are judged when they arrive."""
        merger, self._merger = self._merger, None
        if merger is not None:
            for member in merger.abandon():
                self._send_alone(member, _ignore)


def _ignore(at_fault: bool) -> None: ...


def _break(member: Mergeable) -> None:
    member.broken()


def _trace_fields(batch: Batch[Mergeable], leader: Mergeable | None) -> Fields:
    """The trace context of one of the members: Triton takes one parent."""
    if leader is not None:
        return tuple(fields_from(leader.added))
    return next((member.context for member in batch.members if member.context), ())
