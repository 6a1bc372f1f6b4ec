"""What an upstream's failure means, row by row."""

from __future__ import annotations

import grpc
import pytest

from gateway.status import Code, Meaning, Origin, classify, classify_in_band, is_server_fault, is_tritons_own

# The texts are Triton's own, as probed against 2.51, of a request with the id 1 for version 9 of the model x.
ASKED = {"model": "x", "version": "9", "id": "1"}
UNKNOWN_MODEL = "Request for unknown model: 'x' is not found"
UNKNOWN_VERSION = "Request for unknown model: 'x' version 9 is not found"
NO_VERSIONS = "Request for unknown model: 'x' has no available versions"
STOPPING = "Server is stopping, scheduler for model has stopped accepting new inference requests"
QUEUE_FULL = "[request id: 1] Exceeds maximum queue size"
QUEUE_TIMEOUT = "Request timeout expired"
NOT_READY = "Request for unknown model: 'x' version 9 is not at ready state"
RESTRICTED = "This protocol is restricted, expecting header 'triton-grpc-protocol-k'"

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
    "another model's": (Code.NOT_FOUND, "Request for unknown model: 'y' is not found", Meaning.CALLER),
    "another version's": (Code.NOT_FOUND, "Request for unknown model: 'x' version 8 is not found", Meaning.CALLER),
    "too large for the server": (
        Code.RESOURCE_EXHAUSTED,
        "Received message larger than max (5000000 vs. 4194304)",
        Meaning.CALLER,
    ),
    "more metadata than the server takes": (
        Code.RESOURCE_EXHAUSTED,
        "received metadata size exceeds soft limit (12931 vs. 8192), rejecting requests with some random probability "
        ":path:79B x-0:1035B",
        Meaning.CALLER,
    ),
    "bytes that are no request": (Code.INTERNAL, "Unable to parse request", Meaning.CALLER),
    "queue full": (Code.UNAVAILABLE, QUEUE_FULL, Meaning.OVERLOADED),
    "queue full, no id": (
        Code.UNAVAILABLE,
        "[request id: <id_unknown>] Exceeds maximum queue size",
        Meaning.OVERLOADED,
    ),
    "queue timeout": (Code.UNAVAILABLE, QUEUE_TIMEOUT, Meaning.OVERLOADED),
    "in an ensemble": (Code.UNAVAILABLE, f"in ensemble 'x', {QUEUE_FULL}", Meaning.OVERLOADED),
    "stopping": (Code.UNAVAILABLE, STOPPING, Meaning.DRAINING),
    "still loading": (Code.UNAVAILABLE, NOT_READY, Meaning.MODEL_GONE),
    "without the key": (Code.UNAVAILABLE, RESTRICTED, Meaning.CALLER),
    "a model's own unavailable": (Code.UNAVAILABLE, "the feature store is gone", Meaning.UNCLEAR),
    "unavailable without a text": (Code.UNAVAILABLE, "", Meaning.UNCLEAR),
    "data loss": (Code.DATA_LOSS, "", Meaning.SERVER),
    "unauthenticated": (Code.UNAUTHENTICATED, "", Meaning.CALLER),
    "a number that gRPC has not": (99, "", Meaning.SERVER),
}


@pytest.mark.parametrize(("code", "text", "meaning"), STATUSES.values(), ids=STATUSES)
def test_a_servers_status_means(code: int, text: str, meaning: Meaning) -> None:
    assert classify(code, text, **ASKED).meaning is meaning


SENTENCES = {
    "queue full": (Code.UNAVAILABLE, QUEUE_FULL),
    "queue timeout": (Code.UNAVAILABLE, QUEUE_TIMEOUT),
    "stopping": (Code.UNAVAILABLE, STOPPING),
    "not ready": (Code.UNAVAILABLE, NOT_READY),
    "unknown model": (Code.NOT_FOUND, UNKNOWN_MODEL),
    "unknown version": (Code.NOT_FOUND, UNKNOWN_VERSION),
    "no versions": (Code.NOT_FOUND, NO_VERSIONS),
}


@pytest.mark.parametrize(
    "around", ["cannot parse: {}", "{} (again)", "{}\n", "[request id: 2] {}", "in ensemble 'y', {}"]
)
@pytest.mark.parametrize(("code", "text"), SENTENCES.values(), ids=SENTENCES)
def test_a_text_that_only_contains_a_sentence_of_tritons_says_nothing_of_the_server(
    code: Code, text: str, around: str
) -> None:
    quoted = around.format(text)
    verdict = classify(code, quoted, **ASKED)
    assert (verdict.elsewhere, verdict.ejects) == (False, False)
    for by_model in (True, False):
        _, verdict = classify_in_band(quoted, by_model=by_model, **ASKED)
        assert (verdict.elsewhere, verdict.ejects) == (False, False)


@pytest.mark.parametrize("text", ["failed to connect to all addresses", QUEUE_FULL, STOPPING])
def test_a_status_that_the_transport_made_means_unreachable_whatever_its_text(text: str) -> None:
    assert classify(Code.UNAVAILABLE, text, Origin.CONNECTION).meaning is Meaning.UNREACHABLE


def test_an_answer_larger_than_we_take_would_be_so_anywhere() -> None:
    verdict = classify(Code.RESOURCE_EXHAUSTED, "Received message larger than max", Origin.ANSWER)
    assert (verdict.meaning, verdict.elsewhere) == (Meaning.SERVER, False)


def test_calls_that_find_no_room_before_a_connection_are_tried_elsewhere() -> None:
    verdict = classify(Code.RESOURCE_EXHAUSTED, "", Origin.QUEUE)
    assert (verdict.meaning, verdict.elsewhere) == (Meaning.OVERLOADED, True)


WRONG_DTYPE = "[request id: 1] inference input 'IN' data-type is 'INT32', but model 'x' expects 'FP32'"

# Text, whether the response beside it names the model; code, meaning.
IN_BAND = {
    "queue full": (QUEUE_FULL, False, Code.UNAVAILABLE, Meaning.OVERLOADED),
    "queue timeout": (QUEUE_TIMEOUT, True, Code.UNAVAILABLE, Meaning.OVERLOADED),
    "queue full in an ensemble": (f"in ensemble 'x', {QUEUE_FULL}", True, Code.UNAVAILABLE, Meaning.OVERLOADED),
    "stopping": (STOPPING, False, Code.UNAVAILABLE, Meaning.DRAINING),
    "stopping in an ensemble": (f"in ensemble 'x', {STOPPING}", True, Code.UNAVAILABLE, Meaning.DRAINING),
    "unknown model": (UNKNOWN_MODEL, False, Code.NOT_FOUND, Meaning.MODEL_GONE),
    "unloading": (NO_VERSIONS, False, Code.NOT_FOUND, Meaning.MODEL_GONE),
    "still loading": (NOT_READY, False, Code.UNAVAILABLE, Meaning.MODEL_GONE),
    "wrong dtype": (WRONG_DTYPE, False, Code.INVALID_ARGUMENT, Meaning.CALLER),
    "no such region": ("Unable to find shared memory region: 'r'", False, Code.NOT_FOUND, Meaning.CALLER),
    "the model's own": ("user 7 is not found", True, Code.INTERNAL, Meaning.SERVER),
    "the model's own, as if full": (QUEUE_FULL, True, Code.INTERNAL, Meaning.SERVER),
    "the model's own, as if stopping": (STOPPING, True, Code.INTERNAL, Meaning.SERVER),
    "the model's own, as if unknown": (UNKNOWN_MODEL, True, Code.INTERNAL, Meaning.SERVER),
}


@pytest.mark.parametrize(("text", "by_model", "code", "meaning"), IN_BAND.values(), ids=IN_BAND)
def test_an_error_inside_a_stream_means(text: str, by_model: bool, code: Code, meaning: Meaning) -> None:
    found, verdict = classify_in_band(text, by_model=by_model, **ASKED)
    assert (found, verdict.meaning) == (code, meaning)


def test_a_caller_s_fault_is_no_server_s_whatever_its_code() -> None:
    assert not is_server_fault(Code.INVALID_ARGUMENT, None)
    assert not is_server_fault(Code.UNAVAILABLE, Meaning.CALLER)
    assert is_server_fault(Code.UNAVAILABLE, Meaning.UNCLEAR)
    assert is_server_fault(Code.INTERNAL, None)


TREATMENT = {  # may another be tried, is the endpoint left alone
    Meaning.CALLER: (False, False),
    Meaning.SERVER: (False, False),
    Meaning.OVERLOADED: (True, False),
    Meaning.DRAINING: (True, False),
    Meaning.MODEL_GONE: (True, False),
    Meaning.UNREACHABLE: (True, True),
    Meaning.UNCLEAR: (False, False),
    Meaning.ENDED: (False, False),
}


def test_what_may_have_been_executed_is_not_repeated_and_what_is_gone_is_left_alone() -> None:
    met = {}
    for code, text, _ in STATUSES.values():
        verdict = classify(code, text, **ASKED)
        met[verdict.meaning] = (verdict.elsewhere, verdict.ejects)
    unreachable = classify(Code.UNAVAILABLE, "", Origin.CONNECTION)
    met[unreachable.meaning] = (unreachable.elsewhere, unreachable.ejects)
    assert met == TREATMENT


def test_codes_have_grpcs_names_and_numbers() -> None:
    assert {code.name: code.value for code in Code} == {code.name: code.value[0] for code in grpc.StatusCode}


@pytest.mark.parametrize(
    ("code", "text", "by_core", "by_others"),
    [
        (Code.OK, "", True, True),
        (Code.INVALID_ARGUMENT, "wrong shape", True, True),
        (Code.INTERNAL, "the model failed", True, False),
        (Code.UNIMPLEMENTED, "not supported", True, False),
        (Code.UNKNOWN, "", False, False),
        (Code.CANCELLED, "", False, False),
        (Code.DEADLINE_EXCEEDED, "", False, False),
        (Code.RESOURCE_EXHAUSTED, "", False, False),
        (Code.PERMISSION_DENIED, "RBAC: access denied", False, False),
        (Code.UNAVAILABLE, "Socket closed", False, False),
        (Code.UNAVAILABLE, "[request id: 7] Exceeds maximum queue size", True, True),
        (Code.UNAVAILABLE, "Request for unknown model: 'm' has no available versions", True, True),
    ],
)
def test_what_only_triton_can_have_said(code: Code, text: str, by_core: bool, by_others: bool) -> None:
    assert is_tritons_own(code, text, True, model="m", id="7") is by_core
    assert is_tritons_own(code, text, False, model="m", id="7") is by_others
