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


@given(st.lists(st.booleans(), max_size=20), st.integers(0, 20), st.integers(0, 20))
def test_what_other_workers_found_counts_as_what_was_found_here(here: list[bool], compared: int, agreed: int) -> None:
    agreed = min(agreed, compared)
    parity = Parity(ParitySettings(20, 0.9))
    for agrees in here:
        parity.add(agrees)
    parity.elsewhere = (compared, agreed)
    together, alike = len(here) + compared, sum(here) + agreed
    assert parity.is_open == (together >= 20 and alike >= 0.9 * together)
    assert (parity.now().compared, parity.now().agreed) == (together, alike)
    assert parity.counts == (len(here), sum(here))
