"""Messages in a row, for what remembers one to know the next by: some of them are not what they were made as."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from gateway.errors import GatewayError
from gateway.v2.peek import bool_parameter


@st.composite
def rows(draw: st.DrawFn, bodies: st.SearchStrategy[bytes]) -> list[bytes]:
    """Some are cut, have a byte changed, or a scalar or a parameter after the tensors."""
    row = draw(st.lists(bodies, min_size=2, max_size=6))
    for number, body in enumerate(row):
        at = draw(st.integers(0, max(0, len(body) - 1)))
        how = draw(st.sampled_from(["as it is", "as it is", "cut", "changed", "late name", "late parameter"]))
        if how == "cut":
            row[number] = body[:at]
        elif how == "changed":
            row[number] = body[:at] + bytes((draw(st.integers(0, 255)),)) + body[at + 1 :]
        elif how == "late name":
            row[number] = body + b"\x0a\x04late"
        elif how == "late parameter":
            row[number] = body + bool_parameter("sequence_start", True)
    return row


def outcome(peek: Callable[[bytes], object], body: bytes) -> object:
    """What it answers, or the error that it raises."""
    try:
        return peek(body)
    except GatewayError as error:
        return type(error), error.text
