"""A span is the same at both ends of the pipe to the process that exports it."""

from __future__ import annotations

import pytest

from gateway.telemetry.spans import FinishedSpan, Link, from_line, to_line


@pytest.mark.parametrize("links", [[], [Link(1 << 127, 1 << 63, {"gateway.batch.rows": 4}), Link(1, 2, {})]])
@pytest.mark.parametrize("error", [None, "UNAVAILABLE: it is gone"])
def test_a_span_comes_through_the_pipe_as_it_was(links: list[Link], error: str | None) -> None:
    span = FinishedSpan(
        "infer é", "SERVER", 1 << 127, 1 << 63, 0, False, "a=b", 1 << 60, 1 << 61, {"x": 1, "y": "z"}, links, error
    )
    assert from_line(to_line(span)) == span


@pytest.mark.parametrize("line", ["", "[1]", "{}", "null", "[1, 2, 3]"])
def test_what_is_no_span_is_an_error(line: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        from_line(line)
