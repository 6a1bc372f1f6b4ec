"""Values: gRPC status codes, and what an upstream's answer means for the request and for the endpoint.

This is the one table between failures and gRPC status. It is pure: no grpc import, so that any transport can use it.
Sources: grpc `doc/statuscodes.md`; Triton's `grpc_utils.cc` and the texts probed against tritonserver 2.51.
"""

from __future__ import annotations

import re
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
    CONNECTION = "connection"  # there was none, or it takes nothing of the request
    LOST = "lost"  # the connection broke, or a proxy lost its own, while the server may have been at it
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
    UNREACHABLE = "unreachable"  # no connection, so it was not executed
    LOST = "lost"  # the connection broke meanwhile: it may have been executed, or even be what killed the server
    LATE = "late"  # it took longer than one attempt may; it may be executed still
    UNCLEAR = "unclear"  # unavailable for a reason that is not Triton's: a model's own words, a proxy's
    ENDED = "ended"  # the deadline passed or the caller went away


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one failed attempt is treated."""

    meaning: Meaning
    elsewhere: bool  # may another endpoint or variant be tried?
    ejects: bool  # is the whole endpoint in doubt until a probe has asked it?


_VERDICTS: Final = {
    Meaning.CALLER: Verdict(Meaning.CALLER, elsewhere=False, ejects=False),
    Meaning.SERVER: Verdict(Meaning.SERVER, elsewhere=False, ejects=False),
    Meaning.OVERLOADED: Verdict(Meaning.OVERLOADED, elsewhere=True, ejects=False),
    Meaning.DRAINING: Verdict(Meaning.DRAINING, elsewhere=True, ejects=True),
    Meaning.MODEL_GONE: Verdict(Meaning.MODEL_GONE, elsewhere=True, ejects=False),
    Meaning.UNREACHABLE: Verdict(Meaning.UNREACHABLE, elsewhere=True, ejects=True),
    Meaning.LOST: Verdict(Meaning.LOST, elsewhere=True, ejects=True),
    Meaning.LATE: Verdict(Meaning.LATE, elsewhere=True, ejects=False),
    Meaning.UNCLEAR: Verdict(Meaning.UNCLEAR, elsewhere=False, ejects=False),
    Meaning.ENDED: Verdict(Meaning.ENDED, elsewhere=False, ejects=False),
}

UNKNOWN_ID: Final = "<id_unknown>"
"""What Triton's error texts say of a request without an id. source: triton core, infer_request.h, `LogRequest`."""

_WITHOUT_ID: Final = f"[request id: {UNKNOWN_ID}] "

# Whole sentences of Triton 2.51, each provoked from a real one. What only contains one of them says nothing: models
# write what they like, and repeat what callers wrote.
_QUEUE_FULL: Final = "Exceeds maximum queue size"
_QUEUE_TIMEOUT: Final = "Request timeout expired"
_STOPPING: Final = "Server is stopping, scheduler for model has stopped accepting new inference requests"
_NO_START: Final = "must specify the START flag on the first request of the sequence"
_RESTRICTED: Final = "This protocol is restricted, expecting header '"
_UNREADABLE: Final = "Unable to parse request"
_NO_REGION: Final = "Unable to find shared memory region: '"
_TOO_LARGE: Final = re.compile(
    r"(?:CLIENT: |SERVER: )?(?:Received|Sent) message larger than max \(\d+ vs\. \d+\)"
    r"|received (?:initial )?metadata size exceeds (?:soft |hard )?limit \(\d+ vs\. \d+\).*",
    re.DOTALL,
)
"""Of gRPC's C++ library in a server: a message, or metadata beyond 8 KiB (which it names one by one after that)."""

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
    Origin.LOST: Meaning.LOST,
    Origin.QUEUE: Meaning.OVERLOADED,  # this endpoint has too much before it, another may not
    Origin.ANSWER: Meaning.SERVER,  # the answer would be the same anywhere
    Origin.GIVEN_UP: Meaning.ENDED,
}

LATE: Final = _VERDICTS[Meaning.LATE]
"""Of an attempt that was given up here, before the call's own deadline."""

MAY_HAVE_RUN: Final = frozenset({Meaning.LOST, Meaning.LATE, Meaning.SERVER, Meaning.UNCLEAR})
"""After these the model may have been executed, so it is a policy of the model's whether a request is repeated."""

_BY_PEER: Final = {  # that gave no status of gRPC's, where that changes what the code means
    Code.UNAVAILABLE: Meaning.UNREACHABLE,
    Code.CANCELLED: Meaning.SERVER,  # it gave up, not the caller
}


def judge(
    code: int, text: str, origin: Origin = Origin.SERVER, *, model: str = "", version: str = "", id: str = ""
) -> Verdict:
    """Say what an upstream's failure means.

    code, text:   the status as received; an unknown number counts as UNKNOWN.
    model, version, id:  as the server was asked, since its sentences name them.
    """
    meaning = _BY_ORIGIN.get(origin)
    if meaning is None and origin is Origin.PEER:
        meaning = _BY_PEER.get(code_of(code))
    return _VERDICTS[meaning or _by_status(code, text, model, version, id)]


def _by_status(code: int, text: str, model: str, version: str, id: str) -> Meaning:
    """Of a status that the server gave."""
    if code == Code.UNAVAILABLE:
        return _unavailable(text, model, version, id)
    if code == Code.NOT_FOUND and _is_model_gone(_own_words(text, model, id), model, version):
        return Meaning.MODEL_GONE
    if code == Code.INTERNAL and text == _UNREADABLE:
        return Meaning.CALLER
    if code == Code.RESOURCE_EXHAUSTED and _TOO_LARGE.fullmatch(text):
        return Meaning.CALLER
    return _BY_CODE.get(code_of(code), Meaning.SERVER)


def _unavailable(text: str, model: str, version: str, id: str) -> Meaning:
    """What no sentence of Triton's is a model's own, or of something between us: it is passed on as it is."""
    sentence = _own_words(text, model, id)
    if sentence in (_QUEUE_FULL, _QUEUE_TIMEOUT):
        return Meaning.OVERLOADED
    if sentence == _STOPPING:
        return Meaning.DRAINING
    if _is_model_gone(sentence, model, version):
        return Meaning.MODEL_GONE
    if text.startswith(_RESTRICTED) and text.endswith("'"):
        return Meaning.CALLER  # it lacks the key
    return Meaning.UNCLEAR


def is_queue_full(verdict: Verdict, text: str) -> bool:
    """Does a Triton say that its model's queue is full?

    Only its own sentence counts: a caller who gives Triton little time is refused by his own doing, and what else has
    no room (a connection of ours, a proxy) says nothing of how many calls the model can take.
    """
    return verdict.meaning is Meaning.OVERLOADED and text.endswith(_QUEUE_FULL)


def _own_words(text: str, model: str, id: str) -> str:
    """A sentence of Triton's without what it may begin with: the ensemble whose step it is about, the request's id."""
    text = text.removeprefix(f"in ensemble '{model}', ")
    own = f"[request id: {id}] "
    return text[len(own) :] if id and text.startswith(own) else text.removeprefix(_WITHOUT_ID)


def _is_model_gone(sentence: str, model: str, version: str) -> bool:
    """Does it say that this very model, or version, is not served?"""
    named = f"Request for unknown model: '{model}'"
    if not sentence.startswith(named):
        return False
    rest = sentence[len(named) :]
    if rest in (" is not found", " has no available versions"):
        return True
    return bool(version) and rest in (f" version {version} is not found", f" version {version} is not at ready state")


def is_unknown_sequence(code: int, text: str) -> bool:
    """Does Triton say that it has no such sequence? One that was lost with its server is refused so, too."""
    return code == Code.INVALID_ARGUMENT and text.endswith(_NO_START)


def judge_in_band(text: str, *, by_model: bool, model: str, version: str = "", id: str = "") -> tuple[Code, Verdict]:
    """Say what an error inside a ModelStreamInfer means, and the code that it has in a unary call.

    It comes without a code. What decides is who wrote it: Triton names the model in whatever comes from the model or
    its queue, and in nothing that it refuses before. No model can make an error look like a refusal.

    by_model:  does the response beside the text name a model?
    others:    as in `judge`.
    """
    sentence = _own_words(text, model, id)
    in_step = text.startswith(f"in ensemble '{model}', ")  # what a step refuses is the ensemble's answer
    meaning, code = Meaning.CALLER, Code.INVALID_ARGUMENT
    if sentence == _QUEUE_TIMEOUT or (sentence == _QUEUE_FULL and (in_step or not by_model)):
        meaning, code = Meaning.OVERLOADED, Code.UNAVAILABLE
    elif sentence == _STOPPING and (in_step or not by_model):
        meaning, code = Meaning.DRAINING, Code.UNAVAILABLE
    elif by_model:
        meaning, code = Meaning.SERVER, Code.INTERNAL
    elif _is_model_gone(sentence, model, version):
        meaning = Meaning.MODEL_GONE
        code = Code.UNAVAILABLE if sentence.endswith(" is not at ready state") else Code.NOT_FOUND
    elif text.startswith(_NO_REGION):
        code = Code.NOT_FOUND
    return code, _VERDICTS[meaning]


_SERVER_CODES: Final = frozenset(
    {Code.UNKNOWN, Code.DEADLINE_EXCEEDED, Code.UNIMPLEMENTED, Code.INTERNAL, Code.UNAVAILABLE, Code.DATA_LOSS}
)


def is_server_fault(code: Code, meaning: Meaning | None) -> bool:
    """Did a call fail by the server's doing, and not by its caller's?

    code:     the call's end.
    meaning:  of its last attempt, None if there was none or it went well: some callers' faults have a server's code.
    source: OpenTelemetry semantic conventions, gRPC, status of server spans.
    """
    return code in _SERVER_CODES and meaning is not Meaning.CALLER
