"""Values: gRPC status codes, and what an upstream's answer means for the request and for the endpoint.

This is the one table between failures and gRPC status. It is pure: no grpc import, so that any transport can use it.
Sources: grpc `doc/statuscodes.md`; Triton's `grpc_utils.cc` and the texts probed against tritonserver 2.51.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final


class Code(IntEnum):
    """gRPC status codes, by number."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


OK: Final = Code.OK
"""For what every call does: to read a member of an enum from its class takes a Python call, until Python 3.12."""


def code_of(number: int) -> Code:
    """The code of this number; UNKNOWN for one that there is not, as gRPC says."""
    return Code(number) if number in Code._value2member_map_ else Code.UNKNOWN


class Origin(Enum):
    """Who ended a call, and at what. Whoever ends it says so; it can't be told from a code or a text."""

    SERVER = "server"  # it gave a status of gRPC's
    PEER = "peer"  # it, or a proxy before it, reset the stream or answered in HTTP's terms
    CONNECTION = "connection"  # there was none, it broke, or it takes nothing of the request
    QUEUE = "queue"  # too many calls wait for a connection
    ANSWER = "answer"  # this end refused what came: too large, or not gRPC
    GIVEN_UP = "given_up"  # this end: the deadline passed, or the caller went away


class Meaning(Enum):
    """What a failed attempt says: whose fault it is and what to do next."""

    CALLER = "caller"  # the request is at fault; the answer would be the same anywhere
    SERVER = "server"  # the server failed at it; it may have been executed, so it is not repeated
    OVERLOADED = "overloaded"  # this endpoint has no room; another may have
    DRAINING = "draining"  # this endpoint is shutting down
    MODEL_GONE = "model_gone"  # this endpoint does not serve the model now
    UNREACHABLE = "unreachable"  # no connection, or it broke
    ENDED = "ended"  # the deadline passed or the caller went away


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one failed attempt is treated."""

    meaning: Meaning
    elsewhere: bool  # may another endpoint or variant be tried?
    ejects: bool  # is the whole endpoint to be left alone until a probe succeeds?


_VERDICTS: Final = {
    Meaning.CALLER: Verdict(Meaning.CALLER, elsewhere=False, ejects=False),
    Meaning.SERVER: Verdict(Meaning.SERVER, elsewhere=False, ejects=False),
    Meaning.OVERLOADED: Verdict(Meaning.OVERLOADED, elsewhere=True, ejects=False),
    Meaning.DRAINING: Verdict(Meaning.DRAINING, elsewhere=True, ejects=True),
    Meaning.MODEL_GONE: Verdict(Meaning.MODEL_GONE, elsewhere=True, ejects=False),
    Meaning.UNREACHABLE: Verdict(Meaning.UNREACHABLE, elsewhere=True, ejects=True),
    Meaning.ENDED: Verdict(Meaning.ENDED, elsewhere=False, ejects=False),
}

_OVERLOAD_TEXTS: Final = ("Exceeds maximum queue size", "Request timeout expired")
_DRAIN_TEXT: Final = "Server is stopping"
# A model's own NOT_FOUND says other things.
_MODEL_TEXTS: Final = ("Request for unknown model", "has no available versions")

_BY_CODE: Final = {
    Code.CANCELLED: Meaning.ENDED,
    Code.DEADLINE_EXCEEDED: Meaning.ENDED,
    Code.INVALID_ARGUMENT: Meaning.CALLER,
    Code.NOT_FOUND: Meaning.CALLER,
    Code.ALREADY_EXISTS: Meaning.CALLER,
    Code.PERMISSION_DENIED: Meaning.CALLER,
    Code.UNAUTHENTICATED: Meaning.CALLER,
    Code.FAILED_PRECONDITION: Meaning.CALLER,
    Code.OUT_OF_RANGE: Meaning.CALLER,
    Code.UNIMPLEMENTED: Meaning.CALLER,
    Code.RESOURCE_EXHAUSTED: Meaning.OVERLOADED,
}


_BY_ORIGIN: Final = {  # where that says it all
    Origin.CONNECTION: Meaning.UNREACHABLE,
    Origin.QUEUE: Meaning.OVERLOADED,  # this endpoint has too much before it, another may not
    Origin.ANSWER: Meaning.SERVER,  # the answer would be the same anywhere
    Origin.GIVEN_UP: Meaning.ENDED,
}

_BY_PEER: Final = {  # that gave no status of gRPC's, where that changes what the code means
    Code.UNAVAILABLE: Meaning.UNREACHABLE,
    Code.CANCELLED: Meaning.SERVER,  # it gave up, not the caller
}


def judge(code: int, text: str, origin: Origin = Origin.SERVER) -> Verdict:
    """Say what an upstream's failure means.

    code, text:  the status as received; an unknown number counts as UNKNOWN.
    """
    meaning = _BY_ORIGIN.get(origin)
    if meaning is None and origin is Origin.PEER:
        meaning = _BY_PEER.get(code_of(code))
    if meaning is not None:
        return _VERDICTS[meaning]
    if code == Code.UNAVAILABLE:
        return _VERDICTS[_unavailable(text)]
    if code == Code.NOT_FOUND and any(known in text for known in _MODEL_TEXTS):
        return _VERDICTS[Meaning.MODEL_GONE]
    try:
        return _VERDICTS[_BY_CODE.get(Code(code), Meaning.SERVER)]
    except ValueError:
        return _VERDICTS[Meaning.SERVER]


def _unavailable(text: str) -> Meaning:
    if any(known in text for known in _OVERLOAD_TEXTS):
        return Meaning.OVERLOADED
    if _DRAIN_TEXT in text:
        return Meaning.DRAINING
    # Anything else a Triton calls unavailable (a model still loading, a restricted protocol) concerns this model here.
    return Meaning.MODEL_GONE


def judge_in_band(text: str) -> Verdict:
    """Say what an error inside a ModelStreamInfer means. It comes without a code, so its text decides.

    Only what Triton says of itself is taken for more than the caller's or the model's own error.
    """
    if any(known in text for known in _OVERLOAD_TEXTS):
        return _VERDICTS[Meaning.OVERLOADED]
    if _DRAIN_TEXT in text:
        return _VERDICTS[Meaning.DRAINING]
    if any(known in text for known in _MODEL_TEXTS):
        return _VERDICTS[Meaning.MODEL_GONE]
    return _VERDICTS[Meaning.CALLER]
