"""Group commit for one model on one endpoint: what arrives while requests are in flight leaves together.

Nothing waits for company while fewer than the allowed requests are in flight (unless a delay is configured). Callers
take turns, so that one with a large backlog does not keep others waiting. Decides only: `send` acts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from gateway.forwarding.batching.concurrency_limit import Window
from gateway.rpc.metadata import Fields
from gateway.v2.layout import Layout, split_rows
from gateway.v2.peek import Head, encode_varint, scalars


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """What the config says of one public model."""

    rows: int | None = None  # of one merged request; None is the variant's max_batch_size
    bytes: int = 1 << 20
    in_flight: int = 4
    delay: float = 0.0  # seconds
    metadata: frozenset[str] | None = None  # keys that must be equal; None: all, without those that differ by nature
    ignore_ids: bool = False  # merge requests that have an id, which then does not reach Triton
    recheck: float = 0.0  # seconds for which it holds that the model has not changed


@dataclass(frozen=True, slots=True)
class MergeLimits:
    """How much may be merged."""

    rows: int  # of one merged request
    bytes: int = 1 << 20  # of its tensors: a larger copy costs more than a request of its own
    in_flight: int = 4  # most merged requests at a time; the number used adapts below it
    delay: float = 0.0  # seconds that a request may wait for company although it could go


class Member(Protocol):
    """One caller's request, waiting or on its way."""

    body: bytes
    head: Head
    layout: Layout
    spans: Sequence[tuple[int, int]]
    carried: Fields  # metadata that goes along with the merged request: equal for all its members
    caller: Hashable
    is_over: bool  # its caller has gone


M = TypeVar("M", bound=Member)


class Batch(Generic[M]):
    """Requests that leave as one."""

    __slots__ = ("counts", "members", "rows")

    def __init__(self, members: list[M], counts: bool = True) -> None:
        """counts: among those in flight."""
        self.members = members
        self.counts = counts
        self.rows = sum([member.layout.rows for member in members])

    @property
    def is_abandoned(self) -> bool:
        """Have all its callers gone?"""
        return all(member.is_over for member in self.members)

    def request(self, model: str, version: str, id: str = "") -> bytes:
        """The merged ModelInferRequest."""
        layout = self.members[0].layout
        pieces = [scalars(model, version, id), layout.encoded(self.rows)]
        for number in range(len(layout.parts)):
            contents = []
            for member in self.members:
                start, end = member.spans[number]
                contents.append(member.body[start:end])
            pieces.append(bytes((layout.tag,)) + encode_varint(sum(map(len, contents))))
            pieces.extend(contents)
        return b"".join(pieces)

    def answers(self, body: bytes, head: Head, layout: Layout, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Each member's own ModelInferResponse, under the name and with the id that its caller used.

        layout, spans: of the merged answer, whose rows are the batch's.
        """
        counts = [member.layout.rows for member in self.members]
        columns = [split_rows(part, body, span, counts) for part, span in zip(layout.parts, spans, strict=True)]
        tag = bytes((layout.tag,))
        fronts: dict[tuple[str, str, int], bytes] = {}  # most members have the same
        made = []
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
            made.append(b"".join(pieces))
        return made


_QUIET_TURNS: Final = 3  # of the loop, some microseconds each, after which nobody else is thought to come ...
_MOST_TURNS: Final = 10  # ... and how many a batch waits at most

_MOST_AT_ONCE: Final = 16  # batches sent in one turn of the loop: callers choose how many kinds of request wait
_MOST_MISFITS: Final = 32  # requests found too large for the rest of a batch, before it leaves with the room it has

_Kind = tuple[bytes, Fields]
"""What must be equal: the signature, and the metadata that goes along."""


class Merger(Generic[M]):
    """The queue before one model on one endpoint."""

    def __init__(
        self,
        limits: MergeLimits,
        now: float,
        send: Callable[[Batch[M]], None],
        call_later: Callable[[float, Callable[[], None]], object],
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        """
        send: puts a batch on the wire and answers by `ended`.
        call_later, call_soon: run a callback after some seconds, or once what has arrived by now was handled.
        """
        self.limits = limits
        self.in_flight = 0
        self.waiting = 0
        self._window = Window(limits.in_flight, now)
        self._send = send
        self._call_later = call_later
        self._call_soon = call_soon
        self._kinds: dict[_Kind, dict[Hashable, deque[M]]] = {}  # by caller; whose turn is next comes first in both
        self._delaying = False
        self._turns = 0  # of the loop since the last batch came back, while more may be at the door
        self._quiet_turns = 0  # the last of those, in which nothing came
        self._waited = 0  # how many did at the last one

    def submit(self, member: M) -> None:
        """Send a request, now or with others."""
        if not self.waiting and self.in_flight < self._window.allowed and not self.limits.delay:
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
        if self.limits.delay and self.in_flight < self._window.allowed:
            self._begin_delay()

    def ended(self, batch: Batch[M], now: float) -> None:
        """A batch has been answered, or has failed."""
        if not batch.counts:
            return
        self.in_flight -= 1
        self._window.ended(batch.rows, self.waiting > 0, now)
        if self.limits.delay:
            self._begin_delay()
        elif self.waiting and not self._turns:
            self._gather()

    def _gather(self) -> None:
        """Let in what is at the door: callers that are answered together ask again together, within microseconds."""
        if self.waiting != self._waited:
            self._quiet_turns = 0
        if self._quiet_turns == _QUIET_TURNS or self._turns == _MOST_TURNS or self.waiting >= self.limits.rows:
            self._turns = self._quiet_turns = 0
            self._pump()
            return
        self._waited = self.waiting
        self._turns += 1
        self._quiet_turns += 1
        self._call_soon(self._gather)

    def abandon(self) -> list[M]:
        """Give back what waits. This is the end of the merger; batches in flight may still end."""
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
            if not self.waiting or self.in_flight >= self._window.allowed:
                return
            members = self._take()
            if members:
                # One that nobody could join waits for nothing: it takes no place from those that travel together.
                counts = len(members) > 1 or not self.waiting
                self.in_flight += counts
                self._send(Batch(members, counts))
        if self.waiting:
            self._call_soon(self._pump)

    def _take(self) -> list[M]:
        """The next batch: of the kind whose turn it is in turn one request of each caller, within the limits.

        A caller that is passed over keeps its place, so that its request is the first of a later batch.
        """
        kind = next(iter(self._kinds))
        callers = self._kinds.pop(kind)
        members: list[M] = []
        rows = size = misfits = 0
        more = True
        while more and rows < self.limits.rows and misfits < _MOST_MISFITS:
            more = False
            for caller in list(callers):
                member = self._maybe_first(callers, caller)
                if member is None:
                    continue
                fits = not members or (
                    rows + member.layout.rows <= self.limits.rows and size + len(member.body) <= self.limits.bytes
                )
                if fits:
                    members.append(member)
                    rows += member.layout.rows
                    size += len(member.body)
                    self._turn(callers, caller)
                    more = True
                else:
                    misfits += 1
                if rows >= self.limits.rows or misfits >= _MOST_MISFITS:
                    break
        if callers:
            self._kinds[kind] = callers
        return members

    def _maybe_first(self, callers: dict[Hashable, deque[M]], caller: Hashable) -> M | None:
        """A caller's first request, without those whose callers have gone."""
        queue = callers[caller]
        while queue and queue[0].is_over:
            queue.popleft()
            self.waiting -= 1
        if queue:
            return queue[0]
        del callers[caller]
        return None

    def _turn(self, callers: dict[Hashable, deque[M]], caller: Hashable) -> None:
        """Take a caller's first request; its next one waits until the others had their turn."""
        queue = callers.pop(caller)
        queue.popleft()
        self.waiting -= 1
        if queue:
            callers[caller] = queue
