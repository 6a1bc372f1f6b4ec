"""h2spec's cases against the gateway's transport: alone, and under the whole gateway."""

from __future__ import annotations

import pytest
from frames import connect
from h2spec_cases import CASES, Case, run
from processes import Served

TOLERATED = {
    "http2/6.9.1/3": "a connection error, as section 5.4 allows: a stream error would invite MadeYouReset",
}
"""Cases that fail by h2spec's rule, and why that is right."""

ROWS = [pytest.param(case, id=case.id) for case in CASES]


@pytest.mark.parametrize("case", ROWS)
def test_the_transport_answers_as_the_rfcs_say(case: Case, echo: Served) -> None:
    _check(case, echo)


@pytest.mark.parametrize("case", ROWS)
def test_the_whole_gateway_answers_as_the_rfcs_say(case: Case, product: Served) -> None:
    _check(case, product)


def _check(case: Case, served: Served) -> None:
    with connect(served.port) as peer:
        verdict = run(case, peer, seconds=0.3 if case.id in TOLERATED else 3.0)
    wanted = case.id not in TOLERATED
    assert verdict.passed is wanted, f"{case.sent} ({case.clause}): {', '.join(verdict.came)}"
