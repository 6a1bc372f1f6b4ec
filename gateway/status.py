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
    """Who ended a call, and how. The code that ends a call sets it, since codes and texts can't tell."""

    SERVER = "server"  # the server gave a gRPC status
    PEER = "peer"  # the server, or a proxy before it, reset the stream or answered without a gRPC status
    CONNECTION = "connection"  # there was no connection, or it took nothing of the request
    LOST = "lost"  # the connection, or that of a proxy, broke while the server may have worked at the call
    QUEUE = "queue"  # too many calls wait for a connection
    ANSWER = "answer"  # the gateway refused the answer: it is too large, or not gRPC
    GIVEN_UP = "given_up"  # the gateway ended the call: its deadline passed, or its caller went away


class Meaning(Enum):
    """What a failed attempt says: whose fault it is and what to do next."""

    CALLER = "caller"  # the request is at fault; the answer would be the same anywhere
    SERVER = "server"  # the server failed; it may have executed the request, so that is not repeated
    OVERLOADED = "overloaded"  # this endpoint has no room; another may have
    DRAINING = "draining"  # this endpoint is shutting down
    MODEL_GONE = "model_gone"  # this endpoint does not serve the model now
    UNREACHABLE = "unreachable"  # there was no connection, so the request was not executed
    LOST = "lost"  # the connection broke: the request may have been executed, or may have crashed the server
    LATE = "late"  # the attempt took longer than one attempt may; the request may still be executed
    WRONG = "wrong"  # the answer has NaN, or is not what the model's metadata says; another variant's may do
    UNCLEAR = "unclear"  # UNAVAILABLE with a text that is not Triton's own, but a model's or a proxy's
    ENDED = "ended"  # the deadline passed or the caller went away


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one failed attempt is treated."""

    meaning: Meaning
    elsewhere: bool  # may another endpoint or variant be tried?
    ejects: bool  # does the whole endpoint get no calls until a probe has succeeded? Never for what a text says


_VERDICTS: Final = {
    Meaning.CALLER: Verdict(Meaning.CALLER, elsewhere=False, ejects=False),
    Meaning.SERVER: Verdict(Meaning.SERVER, elsewhere=False, ejects=False),
    Meaning.OVERLOADED: Verdict(Meaning.OVERLOADED, elsewhere=True, ejects=False),
    Meaning.DRAINING: Verdict(Meaning.DRAINING, elsewhere=True, ejects=False),  # only a text says so, maybe a model's
    Meaning.MODEL_GONE: Verdict(Meaning.MODEL_GONE, elsewhere=True, ejects=False),
    Meaning.UNREACHABLE: Verdict(Meaning.UNREACHABLE, elsewhere=True, ejects=True),
    Meaning.LOST: Verdict(Meaning.LOST, elsewhere=True, ejects=True),
    Meaning.LATE: Verdict(Meaning.LATE, elsewhere=True, ejects=False),
    Meaning.WRONG: Verdict(Meaning.WRONG, elsewhere=True, ejects=False),
    Meaning.UNCLEAR: Verdict(Meaning.UNCLEAR, elsewhere=False, ejects=False),
    Meaning.ENDED: Verdict(Meaning.ENDED, elsewhere=False, ejects=False),
}

UNKNOWN_ID: Final = "<id_unknown>"
"""The id in Triton's error texts for a request without one. source: triton core, infer_request.h, `LogRequest`."""

_WITHOUT_ID: Final = f"[request id: {UNKNOWN_ID}] "

# Whole texts of Triton 2.51, each seen from a real server. A text that only contains one of them proves nothing, since
# models choose their error texts, and may repeat what callers wrote.
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
"""Texts of gRPC's C++ library in a server, of a message and of metadata beyond 8 KiB, whose names follow."""

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


_BY_ORIGIN: Final = {  # the meaning, where it follows from the origin alone
    Origin.CONNECTION: Meaning.UNREACHABLE,
    Origin.LOST: Meaning.LOST,
    Origin.QUEUE: Meaning.OVERLOADED,  # too many calls wait for this endpoint; another may have fewer
    Origin.ANSWER: Meaning.SERVER,  # the answer would be the same anywhere
    Origin.GIVEN_UP: Meaning.ENDED,
}

LATE: Final = _VERDICTS[Meaning.LATE]
"""The verdict on an attempt that took longer than `attempt_timeout`, while the call has time left."""

WRONG: Final = _VERDICTS[Meaning.WRONG]
"""The verdict on an answer that its caller must not get (`v2.faults`)."""

MAY_HAVE_RUN: Final = frozenset({Meaning.LOST, Meaning.LATE, Meaning.SERVER, Meaning.UNCLEAR})
"""Meanings after which the model may have run, so the model's `retry` policy says whether the request is repeated."""

_BY_PEER: Final = {  # codes whose meaning differs if they were made from a reset or from an HTTP status
    Code.UNAVAILABLE: Meaning.UNREACHABLE,
    Code.CANCELLED: Meaning.SERVER,  # the server gave up, not the caller
}


def classify(
    code: int, text: str, origin: Origin = Origin.SERVER, *, model: str = "", version: str = "", id: str = ""
) -> Verdict:
    """What an upstream's failure means.

    code, text:          the status as received; an unknown number counts as UNKNOWN.
    model, version, id:  those of the request that the server got, since its texts name them.
    """
    meaning = _BY_ORIGIN.get(origin)
    if meaning is None and origin is Origin.PEER:
        meaning = _BY_PEER.get(code_of(code))
    return _VERDICTS[meaning or _by_status(code, text, model, version, id)]


def _by_status(code: int, text: str, model: str, version: str, id: str) -> Meaning:
    """The meaning of a status that the server gave."""
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
    """The meaning of UNAVAILABLE. A text that is not Triton's own is a model's or a proxy's, and is passed on."""
    sentence = _own_words(text, model, id)
    if sentence in (_QUEUE_FULL, _QUEUE_TIMEOUT):
        return Meaning.OVERLOADED
    if sentence == _STOPPING:
        return Meaning.DRAINING
    if _is_model_gone(sentence, model, version):
        return Meaning.MODEL_GONE
    if text.startswith(_RESTRICTED) and text.endswith("'"):
        return Meaning.CALLER  # the request lacks the key
    return Meaning.UNCLEAR


_BY_APPLICATIONS: Final = (
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.ALREADY_EXISTS,
    Code.FAILED_PRECONDITION,
    Code.ABORTED,
    Code.OUT_OF_RANGE,
    Code.DATA_LOSS,
)
"""Codes that neither gRPC's libraries nor proxies make. source: grpc `doc/statuscodes.md`, and
`doc/http-grpc-status-mapping.md` for what comes of HTTP statuses."""

_BY_TRITON_OR_PROXY: Final = (Code.INTERNAL, Code.UNIMPLEMENTED)


def is_tritons_own(code: Code, text: str, is_core: bool, *, model: str = "", version: str = "", id: str = "") -> bool:
    """Is a status provably Triton's own word about a call, and no proxy's before it, behind whom Triton goes on?

    is_core: is the peer made with gRPC's C core, as Triton is and hardly a proxy? Then errors of models count, too,
    but not what such a peer says if it is a proxy and has lost its server.
    """
    if code is OK or code in _BY_APPLICATIONS:
        return True
    if code is Code.UNAVAILABLE:
        return _unavailable(text, model, version, id) is not Meaning.UNCLEAR
    return is_core and code in _BY_TRITON_OR_PROXY


def is_of_step(text: str) -> bool:
    """Does Triton say that a step of an ensemble has failed?"""
    return text.startswith("in ensemble '")


def is_queue_full(verdict: Verdict, text: str) -> bool:
    """Does a Triton say that its model's queue is full?

    Only its own sentence counts: a caller who gives Triton little time is refused by his own doing, and what else has
    no room (a connection of ours, a proxy) says nothing of how many calls the model can take.
    """
    return verdict.meaning is Meaning.OVERLOADED and text.endswith(_QUEUE_FULL)


def _own_words(text: str, model: str, id: str) -> str:
    """An error text of Triton without its prefixes: the ensemble whose step failed, and the request's id."""
    text = text.removeprefix(f"in ensemble '{model}', ")
    own = f"[request id: {id}] "
    return text[len(own) :] if id and text.startswith(own) else text.removeprefix(_WITHOUT_ID)


def _is_model_gone(sentence: str, model: str, version: str) -> bool:
    """Does Triton say that this model, or this version of it, is not served?"""
    named = f"Request for unknown model: '{model}'"
    if not sentence.startswith(named):
        return False
    rest = sentence[len(named) :]
    if rest in (" is not found", " has no available versions"):
        return True
    return bool(version) and rest in (f" version {version} is not found", f" version {version} is not at ready state")


def is_unknown_sequence(code: int, text: str) -> bool:
    """Does Triton say that it has no such sequence? That is also its answer if the sequence was lost in a restart."""
    return code == Code.INVALID_ARGUMENT and text.endswith(_NO_START)


def classify_in_band(text: str, *, by_model: bool, model: str, version: str = "", id: str = "") -> tuple[Code, Verdict]:
    """What an error inside a ModelStreamInfer means, and the code that the error has in a unary call.

    Such an error has no code, so its author decides: Triton names the model in errors of the model or its queue, and
    does not in its own refusals before that. So no model can make an error look like such a refusal.

    by_model:            does the response beside the text name a model?
    model, version, id:  as in `classify`.
    """
    sentence = _own_words(text, model, id)
    in_step = text.startswith(
        f"in ensemble '{model}', "
    )  # an ensemble passes on the refusal of its step as its own answer
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
    """Did a call fail by a fault of the server, and not of its caller?

    code:     the code that the call ended with.
    meaning:  of its last attempt, None if there was none or it succeeded: some faults of callers have a server's code.
    source:   OpenTelemetry semantic conventions, gRPC, status of server spans.
    """
    return code in _SERVER_CODES and meaning is not Meaning.CALLER
