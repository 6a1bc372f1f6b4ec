"""The id of a traced attempt upstream, and that callers see nothing of it."""

from __future__ import annotations

import pytest

from gateway.forwarding.correlation import traced_id, with_own_id

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = ("traceparent", f"00-{TRACE}-{SPAN}-01")


@pytest.mark.parametrize(
    ("extra", "id", "expected"),
    [
        ((), "r-1", None),
        ((("x", "y"),), "r-1", None),
        ((PARENT,), "r-1", None),
        ((("tracestate", "a=b"), PARENT), "", f"{TRACE}-{SPAN}"),
    ],
    ids=["nothing added", "no trace", "traced with an id", "no id of its own"],
)
def test_a_traced_attempt_s_id_names_its_span_unless_the_caller_gave_one(extra, id, expected) -> None:
    assert traced_id(extra, id) == expected


@pytest.mark.parametrize(("id", "shown"), [("r-1", "r-1"), ("", "<id_unknown>")])
def test_an_error_names_the_caller_s_own_id(id: str, shown: str) -> None:
    upstream = f"{TRACE}-{SPAN}"
    text = with_own_id(f"[request id: {upstream}] inference request batch-size must be <= 8", upstream, id)
    assert text == f"[request id: {shown}] inference request batch-size must be <= 8"
