"""Group commit for one model on one endpoint: requests that arrive while others are in flight leave together. Pure.

No request waits while fewer requests are in flight than the limit allows, unless a delay is configured. Callers take
turns, so that a caller with many waiting requests does not keep others waiting. `send` and the callbacks act.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

from gateway.forwarding.batching.concurrency_limit import ConcurrencyLimit
from gateway.rpc.metadata import Fields
from gateway.v2.layout import Layout, split_rows
from gateway.v2.peek import Head, encode_varint, scalars

MetadataKey: TypeAlias = bytes
"""As it is on the wire. The name is needed in `MergeSettings`, whose field `bytes` hides the type."""


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """`merge` in the config of one public model."""

    rows: int | None = None  # most rows of a merged request; None: the max_batch_size of the Triton model
    bytes: int = 1 << 20  # as in `MergeLimits`
    in_flight: int = 4  # as in `MergeLimits`
    delay: float = 0.0  # as in `MergeLimits`
    metadata: frozenset[str] | None = None  # keys whose values must be equal; None: all keys but `proof.PER_CALL`
    ignore_ids: bool = False  # merge requests that have an id too; their ids do not reach Triton
    recheck: float = 0.0  # seconds for which a check that the model has not changed stays valid
    caller_key: MetadataKey = b""  # under which the gateway itself tells Triton who calls; empty: it does not


@dataclass(frozen=True, slots=True)
class MergeLimits:
    """How much may be merged into one request for one Triton model."""

    rows: int  # most rows of a merged request
    bytes: int = 1 << 20  # most bytes of a merged message: a larger copy costs more than a request of its own
    in_flight: int = 4  # most merged requests in flight; the limit in force adapts below it
    delay: float = 0.0  # seconds that a request may wait for others although it could be sent


class Member(Protocol):
    """One caller's request, waiting or in flight."""

    head: Head
    layout: Layout
    source: bytes | memoryview  # what has its raw tensors: its message, or memory that an endpoint shares
    spans: Sequence[tuple[int, int]]  # where they are in it
    carried: Fields  # the metadata that the merged request has: equal for all its members
    caller: Hashable
    is_over: bool  # its caller has gone


M = TypeVar("M", bound=Member)


def size_of(member: Member) -> int:
    """Bytes of its tensors."""
    return sum([end - start for start, end in member.spans])


class Batch(Generic[M]):
    """Requests that leave as one."""

    __slots__ = ("counts", "members", "rows")

    def __init__(self, members: list[M], counts: bool = True) -> None:
        """counts: does the batch count against the limit of requests in flight?"""
        self.members = members
        self.counts = counts
        self.rows = sum([member.layout.rows for member in members])

    @property
    def is_abandoned(self) -> bool:
        """Have all its callers gone?"""
        return all(member.is_over for member in self.members)

    @property
    def size(self) -> int:
        """Bytes of all its tensors."""
        return sum([size_of(member) for member in self.members])

    def request(self, model: str, version: str, id: str = "") -> bytes:
        """The merged ModelInferRequest."""
        tag = bytes((self.members[0].layout.tag,))
        pieces: list[bytes | memoryview] = [self.front(model, version, id)]
        for contents in self.tensors():
            pieces.append(tag + encode_varint(sum([len(content) for content in contents])))
            pieces.extend(contents)
        return b"".join(pieces)

    def front(self, model: str, version: str, id: str = "") -> bytes:
        """What is before its raw tensors."""
        return scalars(model, version, id) + self.members[0].layout.encoded(self.rows)

    def tensors(self) -> list[list[bytes | memoryview]]:
        """Each of its raw tensors, in the members' parts."""
        tensors = []
        for number in range(len(self.members[0].layout.parts)):
            contents: list[bytes | memoryview] = []
            for member in self.members:
                start, end = member.spans[number]
                contents.append(member.source[start:end])
            tensors.append(contents)
        return tensors

    def answers(self, body: bytes, head: Head, layout: Layout, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Each member's own ModelInferResponse, under the name and with the id that its caller used.

        layout, spans: of the merged answer, whose rows are the batch's.
        """
        counts = [member.layout.rows for member in self.members]
        columns = [split_rows(part, body, span, counts) for part, span in zip(layout.parts, spans, strict=True)]
        tag = bytes((layout.tag,))
        fronts: dict[tuple[str, str, int], bytes] = {}  # most members have the same one
        answers = []
        for number, member in enumerate(self.members):
            key = (member.head.model_name, member.head.id, counts[number])
            front = fronts.get(key)
            if front is None:
                encoded = layout.encoded(counts[number])
                front = fronts[key] = scalars(key[0], head.model_version, key[1]) + encoded
            pieces = [front]
            for column in columns:
                content = column[number]
                pieces += (tag, encode_varint(len(content)), content)
            answers.append(b"".join(pieces))
        return answers


_QUIET_TURNS: Final = 3  # turns of the loop without a new request, some microseconds each, before a batch leaves
_MOST_TURNS: Final = 10  # turns of the loop after which a batch leaves in any case

_MOST_AT_ONCE: Final = 16  # batches sent in one turn of the loop: callers choose how many kinds of request wait
_MOST_MISFITS: Final = 32  # requests found too large for the rest of a batch, before the batch leaves as it is


def _nothing() -> int:
    return 0


_Kind = tuple[bytes, Fields]
"""What members of one batch must have in common: the signature of the layout, and `carried`."""


class Merger(Generic[M]):
    """The queue before one model on one endpoint."""

    def __init__(
        self,
        limits: MergeLimits,
        now: float,
        send: Callable[[Batch[M]], None],
        call_later: Callable[[float, Callable[[], None]], object],
        call_soon: Callable[[Callable[[], None]], object],
        *,
        gathers: Callable[[], int] = _nothing,
    ) -> None:
        """
        gathers: how many bytes may be put together where the server reads them, so that they are not copied into a
            message; `limits.bytes` is for messages.
        send: puts a batch on the wire and answers by `ended`.
        call_later, call_soon: run a callback after some seconds, or once what has arrived by now was handled.
        """
        self.limits = limits
        self.in_flight = 0
        self.waiting = 0
        self._limit = ConcurrencyLimit(limits.in_flight, now)
        self._send = send
        self._call_later = call_later
        self._call_soon = call_soon
        self._gathers = gathers
        # Waiting requests by kind and caller. In both, the one whose turn is next comes first.
        self._kinds: dict[_Kind, dict[Hashable, deque[M]]] = {}
        self._delaying = False
        self._turns = 0  # turns of the loop that `_gather` has waited
        self._quiet_turns = 0  # the last turns in a row in which no request came
        self._waiting_before = 0  # `waiting` in the previous turn

    def submit(self, member: M) -> None:
        """Send a request, at once or together with others."""
        if not self.waiting and self.in_flight < self._limit.allowed and not self.limits.delay:
            self.in_flight += 1
            self._send(Batch([member]))
            return
        kind = (member.layout.signature, member.carried)
        callers = self._kinds.get(kind)
        if callers is None:
            callers = self._kinds[kind] = {}
        queue = callers.get(member.caller)
        if queue is None:
            queue = callers[member.caller] = deque()
        queue.append(member)
        self.waiting += 1
        if self.limits.delay and self.in_flight < self._limit.allowed:
            self._begin_delay()

    def ended(self, batch: Batch[M], now: float) -> None:
        """A batch has been answered, or has failed."""
        if not batch.counts:
            return
        self.in_flight -= 1
        self._limit.ended(batch.rows, self.waiting > 0, now)
        if self.limits.delay:
            self._begin_delay()
        elif self.waiting and not self._turns:
            self._gather()

    def _gather(self) -> None:
        """Wait a few turns of the loop for more requests: callers that are answered together ask again together."""
        if self.waiting != self._waiting_before:
            self._quiet_turns = 0
        if self._quiet_turns == _QUIET_TURNS or self._turns == _MOST_TURNS or self.waiting >= self.limits.rows:
            self._turns = self._quiet_turns = 0
            self._pump()
            return
        self._waiting_before = self.waiting
        self._turns += 1
        self._quiet_turns += 1
        self._call_soon(self._gather)

    def abandon(self) -> list[M]:
        """End the merger and return the requests that wait. Batches in flight may still end."""
        queues = [queue for callers in self._kinds.values() for queue in callers.values()]
        left = [member for queue in queues for member in queue if not member.is_over]
        self._kinds.clear()
        self.waiting = 0
        return left

    def _begin_delay(self) -> None:
        if self.waiting >= self.limits.rows:
            self._pump()
        elif self.waiting and not self._delaying:
            self._delaying = True
            self._call_later(self.limits.delay, self._delayed)

    def _delayed(self) -> None:
        self._delaying = False
        self._pump()

    def _pump(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            if not self.waiting or self.in_flight >= self._limit.allowed:
                return
            members = self._take()
            if members:
                # A request that no other could join has waited for nothing, so it does not count against the limit.
                counts = len(members) > 1 or not self.waiting
                self.in_flight += counts
                self._send(Batch(members, counts))
        if self.waiting:
            self._call_soon(self._pump)

    def _take(self) -> list[M]:
        """The next batch, within the limits: requests of the kind whose turn it is, one of each caller in turn.

        A caller whose request does not fit keeps its turn, so that the request is the first of a later batch.
        """
        kind = next(iter(self._kinds))
        callers = self._kinds.pop(kind)
        members: list[M] = []
        rows = size = misfits = 0
        most = max(self.limits.bytes, self._gathers())
        is_growing = True
        while is_growing and rows < self.limits.rows and misfits < _MOST_MISFITS:
            is_growing = False
            for caller in list(callers):
                member = self._maybe_first(callers, caller)
                if member is None:
                    continue
                fits = not members or (rows + member.layout.rows <= self.limits.rows and size + size_of(member) <= most)
                if fits:
                    members.append(member)
                    rows += member.layout.rows
                    size += size_of(member)
                    self._next_turn(callers, caller)
                    is_growing = True
                else:
                    misfits += 1
                if rows >= self.limits.rows or misfits >= _MOST_MISFITS:
                    break
        if callers:
            self._kinds[kind] = callers
        return members

    def _maybe_first(self, callers: dict[Hashable, deque[M]], caller: Hashable) -> M | None:
        """A caller's first request. Requests whose callers have gone are dropped."""
        queue = callers[caller]
        while queue and queue[0].is_over:
            queue.popleft()
            self.waiting -= 1
        if queue:
            return queue[0]
        del callers[caller]
        return None

    def _next_turn(self, callers: dict[Hashable, deque[M]], caller: Hashable) -> None:
        """Remove a caller's first request and put the caller behind the others."""
        queue = callers.pop(caller)
        queue.popleft()
        self.waiting -= 1
        if queue:
            callers[caller] = queue
