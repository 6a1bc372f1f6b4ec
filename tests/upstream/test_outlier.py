"""When an endpoint counts as worse than its peers, and for whose calls."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from gateway.upstream.ejection import FIRST_SECONDS, MOST_SECONDS, MOST_SHARED_SECONDS, TRIAL_CALLS, TRIAL_GAP
from gateway.upstream.failures import NOBODY_KNOWN, Scopes, scopes_of
from gateway.upstream.outlier import ENOUGH, SURE, Record, Standard, Standing, evidence, expected_share

GOOD_PEERS = [Standard(0.02)]
ANN, BOB, EVE = (scopes_of(name, None) for name in ("ann", "bob", "eve"))
ANNS_FIRST, ANNS_SECOND = (scopes_of("ann", user) for user in ("1", "2"))


@pytest.mark.parametrize(("calls", "failed", "p"), [(20, 20, 0.3), (50, 30, 0.4), (10, 1, 0.05), (200, 40, 0.1)])
def test_the_bound_is_one(calls: int, failed: int, p: float) -> None:
    """Chance makes so many fail no more often than it says."""
    chance = random.Random(1)
    draws = 4000
    hits = sum(sum(chance.random() < p for _ in range(calls)) >= failed for _ in range(draws))
    assert hits / draws <= math.exp(-evidence(calls, failed, p)) + 0.02


def test_no_more_failures_than_expected_are_no_evidence() -> None:
    assert evidence(100, 10, 0.1) == 0.0
    assert evidence(100, 0, 0.1) == 0.0
    assert evidence(0, 0, 0.5) == 0.0


def test_what_is_expected_is_what_the_better_half_of_the_peers_does() -> None:
    assert expected_share([]) == 0.5
    assert expected_share([(98, 0)]) == 0.01
    assert expected_share([(98, 0), (500, 500)]) == 0.01
    assert expected_share([(48, 4), (50, 5), (70, 70)]) == 0.1
    assert expected_share([(0, 0)]) == 0.5


def test_however_long_a_run_a_fallback_s_first_good_answers_among_bad_ones_say_little() -> None:
    """Input that fails everywhere came in thousands before whoever's calls go well."""
    for failed in (7, 6):
        assert Standard(0.5, samples=[(8, failed)]).against(1000, 1000, 1000) < ENOUGH
    assert Standard(0.5, samples=[(20, 17)]).against(1000, 1000, 1000) < ENOUGH
    assert Standard(0.5, samples=[(8, 0)]).against(5, 5, 5) >= ENOUGH
    assert Standard(0.5, samples=[(8, 4)]).against(1000, 1000, 1000) >= ENOUGH


def fails(record: Record, now: float, scopes: Scopes = NOBODY_KNOWN, peers: Sequence[Standard] = GOOD_PEERS) -> bool:
    """One more failure. True: that has ejected it for somebody."""
    record.failed(now, scopes)
    whose = record.condemned_by(scopes, peers, now)
    if whose is not None:
        record.eject(now, whose, scopes)
    return whose is not None


def until_ejected(record: Record, now: float, *callers: Scopes) -> int:
    """Failures of these callers in turn until it is ejected for one of them, or for all."""
    for number in range(1, 100):
        if fails(record, now, callers[number % len(callers)]):
            return number
    return 0


def test_a_run_of_failures_shows_soon_beside_a_good_peer_and_never_beside_one_that_fails_too() -> None:
    assert 3 <= until_ejected(Record(), 1.0, NOBODY_KNOWN) <= 6
    record = Record()
    assert not any(fails(record, 1.0, peers=[Standard(0.95)]) for _ in range(10_000))


def test_a_fifth_of_failures_shows_within_a_hundred_calls() -> None:
    record = Record()
    for number in range(100):
        if number % 5 != 4:
            record.succeeded(1.0)
        else:
            record.failed(1.0)
    assert record.condemned_by(NOBODY_KNOWN, [Standard(0.01)], 1.0) == NOBODY_KNOWN
    assert record.condemned_by(NOBODY_KNOWN, [Standard(0.12)], 1.0) is None  # less than a tenth more matters to nobody


def test_what_was_long_ago_does_not_count() -> None:
    record = Record()
    for _ in range(20):
        record.failed(1.0)
        record.succeeded(1.0)
    assert record.counts(5.0) == (40, 20)
    assert record.counts(20.0) == (0, 0)
    assert record.condemned_by(NOBODY_KNOWN, [Standard(0.01)], 20.0) is None


def test_it_is_out_for_longer_each_time_until_it_was_well_for_long() -> None:
    record, now, lengths = Record(), 0.0, []
    for _ in range(9):
        lengths.append(record.eject(now, ANN, ANN))
        now += lengths[-1]
        assert record.standing(now, ANN) is Standing.TRIAL
    assert lengths[:4] == [FIRST_SECONDS, 10.0, 20.0, 40.0]
    assert lengths[-1] == MOST_SECONDS
    assert record.eject(now + 3600, ANN, ANN) < 2 * FIRST_SECONDS


def test_on_trial_it_gets_single_calls_that_decide() -> None:
    record = Record()
    record.eject(0.0)
    assert record.standing(FIRST_SECONDS - 0.1) is Standing.OUT
    assert not record.succeeded(1.0)  # of a call begun before: no trial
    now = FIRST_SECONDS
    for number in range(TRIAL_CALLS):
        assert record.standing(now) is Standing.TRIAL
        assert record.standing(now + TRIAL_GAP / 2) is Standing.OUT
        assert record.succeeded(now) is (number == TRIAL_CALLS - 1)
        now += TRIAL_GAP
    assert not record.is_ejected()


@pytest.mark.parametrize(("peers", "ejects"), [(GOOD_PEERS, True), ([Standard(0.5)], False), ([], True)])
def test_on_trial_one_failure_is_enough_unless_the_peers_fail_as_much(peers: list[Standard], ejects: bool) -> None:
    """Or if there is nobody to compare it with now: then what was found before holds."""
    record = Record()
    record.eject(0.0, ANN, ANN)
    assert record.standing(FIRST_SECONDS, ANN) is Standing.TRIAL
    assert fails(record, FIRST_SECONDS, ANN, peers) is ejects
    assert record.is_out(FIRST_SECONDS + 1.0, ANN) is ejects


def test_one_that_is_out_is_not_judged_by_calls_that_were_begun_before() -> None:
    record = Record()
    record.eject(0.0)
    assert not any(fails(record, 0.1, peers=[Standard(0.01)]) for _ in range(100))


def test_one_that_was_started_anew_is_tried_at_once() -> None:
    record = Record()
    record.eject(0.0)
    record.pardon(1.0)
    assert record.standing(1.0) is Standing.TRIAL
    assert record.is_ejected()


def test_the_evidence_that_is_asked_for_is_a_millionth() -> None:
    assert math.exp(-SURE) == pytest.approx(1e-6, rel=0.05)


def standings(record: Record, now: float, *callers: Scopes) -> list[Standing]:
    return [record.standing(now, scopes) for scopes in callers]


def test_what_fails_for_one_caller_alone_keeps_his_own_calls_away_and_no_others() -> None:
    record = Record()
    assert 3 <= until_ejected(record, 1.0, EVE) <= 6
    assert standings(record, 2.0, EVE, ANN, NOBODY_KNOWN) == [Standing.OUT, Standing.IN, Standing.IN]


def test_however_often_one_caller_s_trials_fail_it_is_he_alone_who_stays_away() -> None:
    record, now = Record(), 1.0
    until_ejected(record, now, EVE)
    for _ in range(1000):
        now += 0.5
        if record.standing(now, EVE) is not Standing.OUT:
            fails(record, now, EVE)
        assert record.standing(now, ANN) is Standing.IN


def test_what_fails_for_several_callers_ejects_it_for_all_as_soon_as_for_one() -> None:
    record = Record()
    assert 3 <= until_ejected(record, 1.0, ANN, BOB) <= 6
    assert standings(record, 2.0, ANN, BOB, EVE) == [Standing.OUT] * 3


def test_one_that_failed_a_caller_needs_little_more_to_be_ejected_for_all() -> None:
    record = Record()
    until_ejected(record, 1.0, ANN)
    assert until_ejected(record, 2.0, BOB) <= 2
    assert record.standing(3.0, EVE) is Standing.OUT


def test_who_has_not_failed_tries_it_again_soon_whatever_the_calls_of_those_who_have_do() -> None:
    """It is ejected for all by two whose input is bad; a third one, who calls rarely, gets it back by his calls."""
    record, now = Record(), 1.0
    until_ejected(record, now, ANN, BOB)
    well, until = 0, now + MOST_SHARED_SECONDS
    while record.is_ejected(NOBODY_KNOWN):
        now += 0.01
        assert now < until + 10.0
        for scopes in (ANN, BOB):
            if record.standing(now, scopes) is not Standing.OUT:
                fails(record, now, scopes)
        if round(now * 100) % 100 == 0 and record.standing(now, EVE) is not Standing.OUT:
            record.succeeded(now, EVE)
            well += 1
    assert well == TRIAL_CALLS
    assert record.standing(now, EVE) is Standing.IN
    assert record.is_ejected(ANN)  # they have to show that theirs go well
    assert record.is_ejected(BOB)


def test_for_several_callers_it_is_out_for_no_more_than_seconds_at_a_time_however_many_fail() -> None:
    record, now = Record(), 0.0
    until_ejected(record, now, ANN, BOB)
    for number in range(50):
        new = scopes_of(f"caller {number}", None)
        while record.standing(now, new) is Standing.OUT:
            now += 0.1
        before = now
        assert fails(record, now, new)
    assert record.is_out(before + MOST_SHARED_SECONDS - 0.1)
    assert not record.is_out(before + MOST_SHARED_SECONDS)


def test_a_closed_set_of_callers_tries_a_broken_one_rarely() -> None:
    callers = [scopes_of(f"caller {number}", None) for number in range(10)]
    record, now, tried = Record(), 0.0, 0
    until_ejected(record, now, *callers)
    while now < 300.0:
        now += 0.05
        scopes = random.Random(now).choice(callers)
        if record.standing(now, scopes) is not Standing.OUT:
            tried += 1
            fails(record, now, scopes)
    assert tried < 60  # of 6,000 calls


def test_what_fails_for_one_user_of_a_caller_keeps_that_user_away_and_what_fails_for_several_their_caller() -> None:
    record = Record()
    until_ejected(record, 1.0, ANNS_FIRST)
    assert standings(record, 2.0, ANNS_FIRST, ANNS_SECOND, BOB) == [Standing.OUT, Standing.IN, Standing.IN]
    until_ejected(record, 2.0, ANNS_SECOND)
    third = scopes_of("ann", "3")
    assert standings(record, 3.0, ANNS_SECOND, third, BOB) == [Standing.OUT, Standing.OUT, Standing.IN]


def test_failures_of_one_caller_do_not_count_with_those_of_others_once_he_stays_away() -> None:
    record = Record()
    for _ in range(80):
        record.succeeded(1.0)
    until_ejected(record, 1.0, EVE)
    assert record.counts(1.0) == (80, 0)
    assert not fails(record, 1.0, ANN)  # one of 81
    assert record.standing(1.1, BOB) is Standing.IN


def test_callers_who_come_and_go_cost_no_memory_for_ever() -> None:
    record, now = Record(), 0.0
    for number in range(2000):
        caller = scopes_of(f"caller {number}", None)
        record.eject(now, caller, caller)
    assert len(record.ejections) <= 256
    record.succeeded(10_000.0)
    assert not record.ejections
