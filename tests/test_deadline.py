"""A deadline is an instant: whoever asks later has less time."""

from __future__ import annotations

from gateway.deadline import Deadline


def test_what_remains_shrinks_by_what_was_spent() -> None:
    deadline = Deadline.after(5, now=100)
    assert deadline == Deadline(105)
    assert [deadline.remaining(now) for now in (100, 103, 105, 106)] == [5, 2, 0, -1]
