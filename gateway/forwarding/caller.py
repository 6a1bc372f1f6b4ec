"""The caller of a call, and what its header list says to the gateway.

A call gives its answer to a `Caller`: one on the wire (`api.relay`), or a coroutine of this process (`models`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from mypy_extensions import mypyc_attr

from gateway.access.door import CALLER, Access
from gateway.errors import GatewayError, QuotaExceeded
from gateway.forwarding.metadata import echoed, first_values, is_field_passed_on, passed_on, trace_context
from gateway.forwarding.retry_info import quota_fields
from gateway.http2.hpack import Field, NeverIndexed
from gateway.rpc.client import ClientCall
from gateway.rpc.metadata import Fields, fields_from, legal_fields, text_of
from gateway.rpc.requests import RequestHead
from gateway.types import Facts, Metadata
from gateway.upstream.placed import Placed
from gateway.v2.peek import Head, parameters_of


@dataclass(frozen=True, slots=True, eq=False)
class CallerMetadata:
    """What the header list of a call says to the gateway; calls with the same list share it."""

    values: dict[str, str]  # as in `Facts`
    passed: Fields  # the fields that go upstream, never indexed by HPACK
    trace: Fields  # the trace context, which goes upstream if the gateway traces nothing
    echo: Fields  # the fields that the answer repeats
    is_shared: bool = False  # do calls with an equal header list have this very object? Then a cache may key by it
    access: Access | None = None  # who he is and what he may; None: that is not checked, or not his affair

    def facts_with(self, head: Head) -> Facts:
        """The facts for routing. raises: BadRequest if the head has parameters that can't be read."""
        return Facts(self.values, parameters_of(head), head.model_version)


NO_METADATA: Final = CallerMetadata({}, (), (), ())


def metadata_of(head: RequestHead) -> CallerMetadata:
    """What a call's header list says; it is read once for all calls with an equal list."""
    metadata: CallerMetadata | None = head.derived
    if metadata is None:
        metadata = head.derived = _read(head.fields, head.access)
    return metadata


def _read(fields: Fields, access: Access | None) -> CallerMetadata:
    """As `metadata_from_pairs`, from header fields."""
    values: dict[str, str] = {}
    passed: list[Field] = []
    for name, value in fields:
        if is_field_passed_on(name):
            passed.append(NeverIndexed(name, value))
        key = name.decode()
        if key not in values and not key.endswith("-bin"):
            values[key] = text_of(value).strip()
    _name_caller(values, access)
    trace = tuple(legal_fields(trace_context(values)))
    echo = tuple(fields_from(echoed(values)))
    return CallerMetadata(values, tuple(passed), trace, echo, is_shared=True, access=access)


def metadata_from_pairs(metadata: Metadata, access: Access | None = None) -> CallerMetadata:
    """The same as `metadata_of`, from the metadata that a servicer got."""
    values = first_values(metadata)
    _name_caller(values, access)
    passed, trace = legal_fields(passed_on(metadata)), legal_fields(trace_context(values))
    return CallerMetadata(values, tuple(passed), tuple(trace), tuple(fields_from(echoed(values))), access=access)


def _name_caller(values: dict[str, str], access: Access | None) -> None:
    """Tell routing and telemetry the caller's name. What a client itself says under that key never counts."""
    values.pop(CALLER, None)
    if access is not None and access.name:
        values[CALLER] = access.name


def renewed(metadata: CallerMetadata) -> CallerMetadata:
    """The metadata of a call that has lasted, with what its caller may now.

    :raises GatewayError: if he would not be let in any more.
    """
    if metadata.access is None:
        return metadata
    access = metadata.access.renewed()
    return metadata if access is metadata.access else replace(metadata, access=access, is_shared=False)


def unchecked(metadata: CallerMetadata) -> CallerMetadata:
    """The metadata for a call that a pipeline makes: it is the pipeline's call, and may what the pipeline may."""
    return metadata if metadata.access is None else replace(metadata, access=None, is_shared=False)


@mypyc_attr(allow_interpreted_subclasses=True)
class Caller(ABC):
    """The side that made a call, which gets the answer. No method waits."""

    metadata: CallerMetadata
    peer: str
    deadline: float | None  # on the event loop's clock, that of `time.monotonic()`
    number: Hashable  # equal for calls of one connection

    @property
    def useful_until(self) -> float | None:
        """When nobody wants the answer any more; as `deadline`, which ends the call."""
        return self.deadline

    @abstractmethod
    def reply(self, body: bytes, initial: Fields, trailing: Fields) -> None:
        """Give the caller the whole answer and end the call."""

    @abstractmethod
    def fail(self, error: GatewayError, trailing: Fields) -> None:
        """End the call with an error, possibly after the front of an answer."""

    def refuse(self, error: QuotaExceeded) -> None:
        """End the call, which is over a quota, before anything was answered."""
        self.fail(error, (*quota_fields(error), *self.metadata.echo))


@mypyc_attr(allow_interpreted_subclasses=True)
class PartsCaller(Caller):
    """A caller whose large request, and a large answer to it, are passed on as they arrive."""

    @property
    @abstractmethod
    def missing(self) -> int:
        """Bytes of the request that have not arrived."""

    @abstractmethod
    def collect_request(self) -> None:
        """Keep what arrives of a large request, for `request_so_far`."""

    @abstractmethod
    def request_so_far(self) -> bytes:
        """All that has arrived of a request that is collected."""

    @abstractmethod
    def pass_request(self, upstream: ClientCall, ending: bytes) -> None:
        """Pass the rest of the request on as it arrives, and `ending` after it."""

    @abstractmethod
    def lay_request(self, placed: Placed, whole: Callable[[], None]) -> None:
        """Give the rest of the request to `placed` as it arrives, and call `whole` after it."""

    @abstractmethod
    def maybe_take_back(self) -> bytes | None:
        """The bytes of the request that were passed on since the last call of this; None if they were not kept."""

    @abstractmethod
    def may_keep(self) -> bool:
        """Is there room for a copy of a request?"""

    @abstractmethod
    def keep_request(self, size: int) -> None:
        """Count so many bytes of the request that are kept here from now on, until `drop_request`."""

    @abstractmethod
    def reply_in_pieces(
        self, pieces: Sequence[bytes | memoryview], size: int, initial: Fields, trailing: Fields
    ) -> None:
        """As `reply`, of an answer of `size` bytes, which counts as a copy of it until it has been sent.

        Views among the pieces are not kept for long: what the caller is slow to take is copied.
        """

    @abstractmethod
    def drop_request(self) -> None:
        """The call is over: drop what was kept of its request."""

    @abstractmethod
    def pass_answer(self, upstream: ClientCall, front: bytes, initial: Fields) -> None:
        """Begin the answer with its front, and pass the rest on as it arrives."""

    @abstractmethod
    def finish(self, trailing: Fields) -> None:
        """End an answer that was passed on."""
