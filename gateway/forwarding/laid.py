"""One call's tensors in memory that its endpoint shares: those of its request, those of its answer, or both.

They are laid there once, for one attempt. What is sent again goes as bytes: it is whole by then, and its endpoint may
have forgotten the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gateway.forwarding.attempts import Attempt
from gateway.forwarding.caller import PartsCaller
from gateway.forwarding.hedging.hedge import forsake
from gateway.forwarding.inference import Inference
from gateway.forwarding.raw_tensors import RawTensors
from gateway.forwarding.replay import LargeRequest
from gateway.forwarding.work import Work
from gateway.rpc.client import ClientCall
from gateway.status import OK
from gateway.upstream.answer_place import AnswerPlace
from gateway.upstream.kept import Kept
from gateway.upstream.placed import Placed
from gateway.upstream.shared_memory import SharedMemory
from gateway.v2.peek import Head


class Layable(Protocol):
    """The call whose tensors they are."""

    body: bytes
    head: Head
    is_over: bool
    raw: RawTensors | None  # its raw tensors, while they are not in its body
    kept: Kept | None  # what its endpoint may read and write, for the last attempt that had some

    def new_client(self, attempt: Attempt) -> ClientCall:
        """The upstream call of an attempt, which is its own from now on."""

    def watch(self, attempt: Attempt, client: ClientCall) -> None:
        """Limit the time of an attempt whose request is here whole."""

    def send(self, attempt: Attempt) -> None:
        """Send it, as bytes if its tensors were laid before."""

    def merged(self, attempt: Attempt, placed: Placed | None) -> bool:
        """Leave it to a merge point, if that takes it."""

    def maybe_under_way(self) -> tuple[Attempt, ClientCall] | None:
        """Its attempt, and the upstream call of that."""

    def fail_by(self, error: Exception) -> None:
        """End it by what was thrown."""


class Laid:
    """Also what says whether a call's tensors may be laid yet."""

    __slots__ = ("_call", "_inference", "_large", "_may_be_laid", "_parts", "_size", "_work", "answer", "placed")

    def __init__(  # noqa: PLR0917  (made on the hot path, where keywords cost)
        self,
        call: Layable,
        inference: Inference,
        work: Work,
        parts: PartsCaller | None,
        large: LargeRequest | None,
        size: int,
    ) -> None:
        """parts: the call's caller, if it may get a large answer. large: the request, if it is passed on as it arrives.

        size: of the whole request, in bytes.
        """
        self.placed: Placed | None = None  # its tensors, while they have a place
        self.answer: AnswerPlace | None = None  # for its answer's tensors, while it has one
        self._call = call
        self._inference = inference
        self._work = work
        self._parts = parts
        self._large = large
        self._size = size
        self._may_be_laid = True

    def is_sent(self, attempt: Attempt, memory: SharedMemory, is_own: bool) -> bool:
        """Lay its tensors into memory and send it, or have it sent once they are there. False: it must go as bytes.

        is_own: does nobody but its caller look at its answer, so that this may come there too?
        """
        if not self._may_be_laid:
            return False
        call, large, is_small = self._call, self._large, self._size < memory.least
        self._may_be_laid = is_small  # whatever becomes of it here
        if not memory.suits(attempt.variant.model):
            return False
        front = call.body if large is None else large.front
        answer = self.answer = self._maybe_answer_place(attempt, memory, front) if is_own else None
        if is_small:
            return answer is not None and self._send_for(attempt, answer)
        if call.raw is not None:
            placed = call.raw.maybe_place(memory, call.body)
        else:
            placed = memory.maybe_place(front, self._size)
        self.placed = placed
        if placed is None:
            self.drop_answer_place()
            return False
        client = call.new_client(attempt)  # before the request is all there, since it keeps the time
        if large is not None:
            large.place(placed, self._all_is_placed)
            return True
        if call.raw is None:
            placed.feed_first(call.body)
        return self.is_sent_placed(attempt, placed, client)

    def _maybe_answer_place(self, attempt: Attempt, memory: SharedMemory, front: bytes) -> AnswerPlace | None:
        """Room for its answer's tensors, if that is not looked at, and it may run twice should it be larger."""
        work, parts, variant = self._work, self._parts, attempt.variant
        if not memory.answers or work.sequence is not None or not work.route.retry.on or parts is None:
            return None
        if self._inference.checks.table or not parts.may_keep():
            return None
        return memory.maybe_answer_place(variant.model, variant.version or self._call.head.model_version, front)

    def _names(self, attempt: Attempt) -> tuple[str, str, str]:
        """Of model and version, and the id, as its variant's Triton must see them."""
        variant, head, id = attempt.variant, self._call.head, self._work.upstream_id
        return variant.model, variant.version or head.model_version, head.id if id is None else id

    def _send_for(self, attempt: Attempt, answer: AnswerPlace) -> bool:
        """Send it with its own tensors as bytes, for an answer whose tensors are elsewhere. False: it can't be so."""
        self._may_be_laid = False
        names = self._names(attempt)
        request = answer.request(names, self._call.body)
        if request is None:
            self.drop_answer_place()
            return False
        client = self._call.new_client(attempt)
        client.request = request
        self._keep(client, answer.kept(names))
        self._call.watch(attempt, client)
        answer.sent()
        attempt.endpoint.connection.submit(client)
        return True

    def _keep(self, client: ClientCall, kept: Kept) -> None:
        self._call.kept = kept
        client.keep_for_server(kept.released, kept.is_own)

    def _all_is_placed(self) -> None:
        """All of a large request has arrived."""
        call, placed = self._call, self.placed
        under_way = call.maybe_under_way()
        if call.is_over or placed is None or under_way is None:
            return
        attempt, client = under_way
        try:
            attempt.began = self._inference.clock()
            if self._inference.current.now.merges and call.merged(attempt, placed):
                return
            if not self.is_sent_placed(attempt, placed, client):
                call.send(attempt)
        except Exception as error:
            call.fail_by(error)

    def is_sent_placed(self, attempt: Attempt, placed: Placed, client: ClientCall) -> bool:
        """Send what names where the tensors are. False: it must be sent as bytes after all."""
        answer, names = self.answer, self._names(attempt)
        request = placed.request(names, answer)
        if request is None:
            self.take_back()
            forsake(client)
            return False
        client.request = request
        self._keep(client, placed.kept(names, answer))
        self._call.watch(attempt, client)
        placed.sent()
        if answer is not None:
            answer.sent()
        attempt.endpoint.connection.submit(client)
        return True

    def is_in_vain(self, client: ClientCall) -> bool:
        """Does the server not know the memory, as after a restart, or did its answer not fit its place there?

        Then it is to be taken back and sent once more, which is no attempt.
        """
        placed, answer = self.placed, self.answer
        if client.code is OK:
            is_in_vain = answer is not None and answer.is_not_there(client.body)
        else:
            is_in_vain = answer is not None and answer.is_in_vain(client.text)
        return is_in_vain or (placed is not None and placed.is_unknown(client.text))

    def take_back(self) -> None:
        """It goes on as bytes.

        A large request's place there stays its own until it ends, though it needs it no more: so no more bytes can be
        taken out of the memory, into the gateway's own, than there is memory.
        """
        self.drop_answer_place()
        if self.placed is None:
            return
        if self._large is not None:
            self._large.take_back()
        else:
            placed, self.placed = self.placed, None
            placed.drop()

    def answer_pieces(self, answer: AnswerPlace, message: bytes) -> Sequence[bytes | memoryview]:
        """The answer whose tensors came to `answer`, as of `AnswerPlace.pieces`. message: what Triton sent of it."""
        pieces = answer.pieces(message)
        self.answer = None  # it is those pieces' now
        return pieces

    def drop_answer_place(self) -> None:
        if self.answer is not None:
            place, self.answer = self.answer, None
            place.drop()

    def drop(self) -> None:
        """It needs none of them any more."""
        self.drop_answer_place()
        if self.placed is not None:
            placed, self.placed = self.placed, None
            placed.drop()
