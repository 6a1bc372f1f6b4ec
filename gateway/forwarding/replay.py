"""A large request: it is passed on while it still arrives, and sent again while its caller keeps what has arrived.

If its endpoint shares memory, it is laid there while it arrives, and sent once it is all there.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.forwarding.caller import PartsCaller
from gateway.rpc.client import ClientCall
from gateway.types import Variant
from gateway.upstream.placed import Placed
from gateway.v2.peek import Head, rename_request, tail


class LargeRequest:
    """The part of one request that is here, and how the rest follows it."""

    __slots__ = ("_caller", "_front", "_is_piped", "_placed", "_rest")

    def __init__(self, caller: PartsCaller, front: bytes) -> None:
        """front: the bytes that were here when its head was read."""
        self._caller = caller
        self._front = front
        self._rest = b""  # what had come after the front when the call had waited, or had to be sent again
        self._placed: Placed | None = None  # where it is laid, in place of being passed on
        self._is_piped = False  # the caller passes the rest on as it arrives, and keeps it; before, it may collect it

    @property
    def front(self) -> bytes:
        """The bytes that were here when its head was read."""
        return self._front

    def hold(self) -> None:
        """The call waits: what arrives meanwhile collects at the caller."""
        if not self._is_piped:
            self._caller.collect_request()

    def resume(self) -> None:
        """The call no longer waits. Its front stays what its head was read from; what came after it goes as it is."""
        if not self._is_piped:
            self._rest = self._caller.request_so_far()[len(self._front) :]

    def drop(self) -> None:
        """The call is over: what was kept of it is not needed any more."""
        self._caller.drop_request()

    def can_be_resent(self) -> bool:
        """Is all of it that has come still here?"""
        if self._placed is not None:
            if self._caller.missing > 0 or not self._caller.may_keep():
                return False
            self.take_back()
            return True
        if not self._is_piped:
            return True
        more = self._caller.maybe_take_back()
        if more is None:
            return False
        self._rest += more
        return True

    def place(self, placed: Placed, whole: Callable[[], None]) -> None:
        """Lay it into memory as it comes. whole: called once it is all there, maybe at once."""
        self._placed = placed
        placed.feed_first(self._front)
        if self._rest:
            placed.feed(self._rest)
            self._rest = b""
        if self._caller.missing <= 0:
            whole()
        else:
            self._caller.lay_request(placed, whole)

    def take_back(self) -> None:
        """Take it out of the memory, all of it being there, to be sent as bytes. It is counted as a copy is."""
        placed, self._placed = self._placed, None
        if placed is not None:
            self._front = self._front[: placed.raw_at]
            self._rest = placed.raw()
            self._caller.keep_request(len(self._rest))

    def put_into(self, client: ClientCall, variant: Variant, head: Head, id: str | None) -> bool:
        """Give an attempt what is here, as this variant's Triton must see it, and let the rest follow as it comes.

        Its last bytes name the model once more: see `peek_front`.

        returns: True if a rest is to follow, so that the attempt takes as long as its caller does.
        """
        self._rest += self._caller.maybe_take_back() or b""
        version = variant.version or head.model_version
        ending = tail(variant.model, version)
        front = rename_request(self._front, head, model_name=variant.model, model_version=version, id=id)
        if self._caller.missing <= 0:  # meanwhile it is here whole
            client.request = front + self._rest + ending
            return False
        self._is_piped = True
        client.request = front + self._rest
        client.request_more = self._caller.missing + len(ending)
        self._caller.pass_request(client, ending)
        return True
