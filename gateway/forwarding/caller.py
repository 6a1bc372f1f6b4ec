"""Who waits for a call's answer, and what his header list says to the gateway.

A call answers to a `Caller`: on the wire (`api.relay`) or in this process, which a coroutine awaits (`models`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

from mypy_extensions import mypyc_attr

from gateway.errors import GatewayError
from gateway.forwarding.metadata import echoed, first_values, is_field_passed_on, passed_on, trace_context
from gateway.http2.hpack import Field, NeverIndexed
from gateway.rpc.client import ClientCall
from gateway.rpc.metadata import Fields, fields_from, legal_fields, text_of
from gateway.rpc.requests import RequestHead
from gateway.types import Facts, Metadata
from gateway.v2.peek import Head, parameters_of


@dataclass(frozen=True, slots=True, eq=False)
class CallerMetadata:
    """What the header list of a call says to the gateway; calls with the same list share it."""

    values: dict[str, str]  # as `Facts` has them
    passed: Fields  # those that go upstream, in no compression table
    trace: Fields  # its place in a trace, which goes upstream where the gateway does not trace
    echo: Fields  # those that the answer repeats
    is_shared: bool = False  # have other calls this very object, so that it is worth remembering what follows from it?

    def facts_with(self, head: Head) -> Facts:
        """:raises BadRequest: if the head has parameters that can't be read."""
        return Facts(self.values, parameters_of(head), head.model_version)


NO_METADATA: Final = CallerMetadata({}, (), (), ())


def metadata_of(head: RequestHead) -> CallerMetadata:
    """What a call's header list says; read once for all calls that have it."""
    metadata: CallerMetadata | None = head.made
    if metadata is None:
        metadata = head.made = _read(head.fields)
    return metadata


def _read(fields: Fields) -> CallerMetadata:
    """What `first_values` and `passed_on` give, of fields."""
    values: dict[str, str] = {}
    passed: list[Field] = []
    for name, value in fields:
        if is_field_passed_on(name):
            passed.append(NeverIndexed(name, value))
        key = name.decode()
        if key not in values and not key.endswith("-bin"):
            values[key] = text_of(value).strip()
    trace = tuple(legal_fields(trace_context(values)))
    return CallerMetadata(values, tuple(passed), trace, tuple(fields_from(echoed(values))), is_shared=True)


def metadata_from_pairs(metadata: Metadata) -> CallerMetadata:
    """The same, of metadata that a servicer got."""
    values = first_values(metadata)
    passed, trace = legal_fields(passed_on(metadata)), legal_fields(trace_context(values))
    return CallerMetadata(values, tuple(passed), tuple(trace), tuple(fields_from(echoed(values))))


@mypyc_attr(allow_interpreted_subclasses=True)
class Caller(ABC):
    """The side of a call that asked: who it is, and where the answer goes. No method waits."""

    metadata: CallerMetadata
    peer: str
    deadline: float | None  # on the event loop's clock, that of `time.monotonic()`
    number: Hashable  # equal for calls of one connection
    takes_parts = False  # may a large answer be given to it as it comes?

    @property
    def useful_until(self) -> float | None:
        """When nobody wants the answer any more; as `deadline`, which ends the call."""
        return self.deadline

    @property
    def missing(self) -> int:
        """Bytes of the request that are still to come."""
        return 0

    @abstractmethod
    def reply(self, body: bytes, initial: Fields, trailing: Fields) -> None:
        """The whole answer, and the call's end."""

    @abstractmethod
    def fail(self, error: GatewayError, trailing: Fields) -> None:
        """The call's end, also after the front of an answer."""

    def collect_request(self) -> None:
        """Keep what comes of a large request, until it is asked for by `request_so_far`."""
        raise NotImplementedError

    def request_so_far(self) -> bytes:
        """All that is here of a request that is collected."""
        raise NotImplementedError

    def pass_request(self, upstream: ClientCall, ending: bytes) -> None:
        """Send the rest of the request on as it arrives, and `ending` after it."""
        raise NotImplementedError

    def maybe_take_back(self) -> bytes | None:
        """What of the request was passed on since the last time, to be sent again; None if it was not kept."""
        return None

    def drop_request(self) -> None:  # noqa: B027  (nothing is kept, unless a caller does)
        """The call is over: what was kept of its request is wanted no more."""

    def pass_answer(self, upstream: ClientCall, front: bytes, initial: Fields) -> None:
        """Begin the answer with its front, and send the rest on as it arrives."""
        raise NotImplementedError

    def finish(self, trailing: Fields) -> None:
        """The end of an answer that was passed on."""
        raise NotImplementedError
