"""h2spec's cases against the gateway's transport: alone, and under the whole gateway."""

from __future__ import annotations

import pytest
from frames import HANG, connect
from h2spec_cases import CASES, Case, run
from processes import Served

ROWS = [pytest.param(case, id=case.id) for case in CASES]


@pytest.mark.parametrize("case", ROWS)
def test_the_transport_answers_as_the_rfcs_say(case: Case, echo: Served) -> None:
    _check(case, echo)


@pytest.mark.parametrize("case", ROWS)
def test_the_whole_gateway_answers_as_the_rfcs_say(case: Case, product: Served) -> None:
    _check(case, product)


def _check(case: Case, served: Served) -> None:
    with connect(served.port) as peer:
        verdict = run(case, peer, seconds=HANG)
    assert verdict.passed, f"{case.sent} ({case.clause}): {', '.join(verdict.came)}"
