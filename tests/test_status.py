"""What an upstream's failure means, row by row."""

from __future__ import annotations

import grpc
import pytest

from gateway.status import Code, Meaning, Origin, judge, judge_in_band

# The texts are Triton's own, as probed against 2.51.
UNKNOWN_MODEL = "Request for unknown model: 'x' is not found"
UNKNOWN_VERSION = "Request for unknown model: 'x' version 9 is not found"
NO_VERSIONS = "Request for unknown model: 'x' has no available versions"
STOPPING = "Server is stopping, scheduler for model has stopped accepting new inference requests"
QUEUE_FULL = "[request id: 1] Exceeds maximum queue size"
QUEUE_TIMEOUT = "Request timeout expired"

STATUSES = {
    "cancelled": (Code.CANCELLED, "", Meaning.ENDED),
    "unknown": (Code.UNKNOWN, "", Meaning.SERVER),
    "invalid argument": (Code.INVALID_ARGUMENT, "", Meaning.CALLER),
    "deadline": (Code.DEADLINE_EXCEEDED, "", Meaning.ENDED),
    "unknown model": (Code.NOT_FOUND, UNKNOWN_MODEL, Meaning.MODEL_GONE),
    "unknown version": (Code.NOT_FOUND, UNKNOWN_VERSION, Meaning.MODEL_GONE),
    "unloading": (Code.NOT_FOUND, NO_VERSIONS, Meaning.MODEL_GONE),
    "a model's own not found": (Code.NOT_FOUND, "user 7 is not found", Meaning.CALLER),
    "already exists": (Code.ALREADY_EXISTS, "", Meaning.CALLER),
    "permission": (Code.PERMISSION_DENIED, "", Meaning.CALLER),
    "exhausted": (Code.RESOURCE_EXHAUSTED, "", Meaning.OVERLOADED),
    "precondition": (Code.FAILED_PRECONDITION, "", Meaning.CALLER),
    "aborted": (Code.ABORTED, "", Meaning.SERVER),
    "range": (Code.OUT_OF_RANGE, "", Meaning.CALLER),
    "unimplemented": (Code.UNIMPLEMENTED, "", Meaning.CALLER),
    "internal": (Code.INTERNAL, "", Meaning.SERVER),
    "queue full": (Code.UNAVAILABLE, QUEUE_FULL, Meaning.OVERLOADED),
    "queue timeout": (Code.UNAVAILABLE, QUEUE_TIMEOUT, Meaning.OVERLOADED),
    "stopping": (Code.UNAVAILABLE, STOPPING, Meaning.DRAINING),
    "still loading": (Code.UNAVAILABLE, "model is not at ready state", Meaning.MODEL_GONE),
    "data loss": (Code.DATA_LOSS, "", Meaning.SERVER),
    "unauthenticated": (Code.UNAUTHENTICATED, "", Meaning.CALLER),
    "a number that gRPC has not": (99, "", Meaning.SERVER),
}


@pytest.mark.parametrize(("code", "text", "meaning"), STATUSES.values(), ids=STATUSES)
def test_a_servers_status_means(code: int, text: str, meaning: Meaning) -> None:
    assert judge(code, text).meaning is meaning


@pytest.mark.parametrize("text", ["failed to connect to all addresses", QUEUE_FULL, STOPPING])
def test_a_status_that_the_transport_made_means_unreachable_whatever_its_text(text: str) -> None:
    assert judge(Code.UNAVAILABLE, text, Origin.CONNECTION).meaning is Meaning.UNREACHABLE


def test_an_answer_larger_than_we_take_would_be_so_anywhere() -> None:
    verdict = judge(Code.RESOURCE_EXHAUSTED, "Received message larger than max", Origin.ANSWER)
    assert (verdict.meaning, verdict.elsewhere) == (Meaning.SERVER, False)


def test_calls_that_find_no_room_before_a_connection_are_tried_elsewhere() -> None:
    verdict = judge(Code.RESOURCE_EXHAUSTED, "", Origin.QUEUE)
    assert (verdict.meaning, verdict.elsewhere) == (Meaning.OVERLOADED, True)


IN_BAND = {
    "queue full": (QUEUE_FULL, Meaning.OVERLOADED),
    "queue timeout": (QUEUE_TIMEOUT, Meaning.OVERLOADED),
    "stopping": (STOPPING, Meaning.DRAINING),
    "unknown model": (UNKNOWN_MODEL, Meaning.MODEL_GONE),
    "unloading": (NO_VERSIONS, Meaning.MODEL_GONE),
    "the model's own": ("user 7 is not found", Meaning.CALLER),
}


@pytest.mark.parametrize(("text", "meaning"), IN_BAND.values(), ids=IN_BAND)
def test_an_error_inside_a_stream_means(text: str, meaning: Meaning) -> None:
    assert judge_in_band(text).meaning is meaning


TREATMENT = {  # may another be tried, is the endpoint left alone
    Meaning.CALLER: (False, False),
    Meaning.SERVER: (False, False),
    Meaning.OVERLOADED: (True, False),
    Meaning.DRAINING: (True, True),
    Meaning.MODEL_GONE: (True, False),
    Meaning.UNREACHABLE: (True, True),
    Meaning.ENDED: (False, False),
}


def test_what_may_have_been_executed_is_not_repeated_and_what_is_gone_is_left_alone() -> None:
    met = {}
    for code, text, _ in STATUSES.values():
        verdict = judge(code, text)
        met[verdict.meaning] = (verdict.elsewhere, verdict.ejects)
    unreachable = judge(Code.UNAVAILABLE, "", Origin.CONNECTION)
    met[unreachable.meaning] = (unreachable.elsewhere, unreachable.ejects)
    assert met == TREATMENT


def test_codes_have_grpcs_names_and_numbers() -> None:
    assert {code.name: code.value for code in Code} == {code.name: code.value[0] for code in grpc.StatusCode}
