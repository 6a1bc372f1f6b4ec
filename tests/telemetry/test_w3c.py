"""What a `traceparent` says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.telemetry.w3c import is_unsampled, trace_id_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("text", "trace_id", "unsampled"),
    [
        pytest.param(f"00-{TRACE}-{SPAN}-01", TRACE, False, id="sampled"),
        pytest.param(f"00-{TRACE}-{SPAN}-00", TRACE, True, id="unsampled"),
        pytest.param(f"00-{TRACE}-{SPAN}-02", TRACE, True, id="random-unsampled"),
        pytest.param(f"00-{TRACE}-{SPAN}-03", TRACE, False, id="random-sampled"),
        pytest.param(f"cc-{TRACE}-{SPAN}-00-later", TRACE, True, id="later-version-with-more"),
        pytest.param(f"00-{TRACE}-{SPAN}-00-more", "", False, id="version-0-with-more"),
        pytest.param(f"ff-{TRACE}-{SPAN}-00", "", False, id="version-ff"),
        pytest.param(f"00-{'0' * 32}-{SPAN}-00", "", False, id="no-trace"),
        pytest.param(f"00-{TRACE}-{'0' * 16}-00", "", False, id="no-span"),
        pytest.param(f"00-{TRACE.upper()}-{SPAN}-00", "", False, id="upper-case"),
        pytest.param("", "", False, id="empty"),
        pytest.param("garbage-00", "", False, id="garbage"),
    ],
)
def test_a_traceparent_is_read_as_the_specification_says(text, trace_id, unsampled):
    assert (trace_id_of(text), is_unsampled(text)) == (trace_id, unsampled)


PARTS = st.tuples(
    st.sampled_from(["00", "01", "cc", "ff", "0"]),
    st.sampled_from([TRACE, "0" * 32, TRACE[:-1], TRACE.upper()]),
    st.sampled_from([SPAN, "0" * 16, SPAN + "0"]),
    st.sampled_from(["00", "01", "02", "03", "f", "xx", "00-", "01-more"]),
)


@given(PARTS)
def test_what_opentelemetry_accepts_is_read_alike(parts):
    """OpenTelemetry's own propagator is the judge of every text that it accepts."""
    text = "-".join(parts)
    carrier = {"traceparent": text}
    judged = get_current_span(TraceContextTextMapPropagator().extract(carrier, Context())).get_span_context()
    if judged.is_valid:
        assert trace_id_of(text) == f"{judged.trace_id:032x}"
        assert is_unsampled(text) is not judged.trace_flags.sampled
    else:
        assert not is_unsampled(text)
