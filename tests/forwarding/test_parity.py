"""A variant may stand in for others once its last answers have agreed with theirs, and no longer when they do not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.forwarding.shadowing import Parity, ParitySettings


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 10), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_the_last_copies_decide(results: list[bool], copies: int, agreement: float) -> None:
    parity = Parity(ParitySettings(copies, agreement))
    for at, agrees in enumerate(results):
        parity.add(agrees)
        last = results[max(0, at + 1 - copies) : at + 1]
        assert parity.is_open == (len(last) == copies and sum(last) >= agreement * copies)
        assert (parity.now().compared, parity.now().agreed) == (len(last), sum(last))


def test_it_is_closed_at_the_start() -> None:
    assert not Parity(ParitySettings(1, 0.0)).is_open
