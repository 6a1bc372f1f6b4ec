"""h2spec's cases against the gateway's transport: alone, and under the whole gateway."""

from __future__ import annotations

import pytest
from frames import connect
from h2spec_cases import CASES, Case, run
from processes import Served

TOLERATED = {
    "http2/5.1/8": "frames after the peer's own RST_STREAM are dropped; section 5.1 allows that",
    "http2/5.1/9": "frames after the peer's own RST_STREAM are dropped; section 5.1 allows that",
    "http2/5.1/11": "frames on a closed stream are dropped; section 5.1 allows that",
    "http2/5.1/12": "frames on a closed stream are dropped; section 5.1 allows that",
    "http2/5.1.1/2": "nghttp2 takes a skipped stream for a closed one, and drops its frames",
    "http2/5.3.1/2": "RFC 9113 has no priorities; PRIORITY is counted and not read",
    "http2/6.3/1": "PRIORITY is counted and not read",
    "http2/6.9.1/3": "answered by a connection error, which section 5.4 allows and MadeYouReset asks for",
}
"""Cases that fail by h2spec's rule, and why that harms nobody. Envoy and nghttpx fail most of them as well."""

ROWS = [
    pytest.param(
        case,
        id=case.id,
        marks=pytest.mark.xfail(reason=TOLERATED[case.id], strict=True) if case.id in TOLERATED else (),
    )
    for case in CASES
]


@pytest.mark.parametrize("case", ROWS)
def test_the_transport_answers_as_the_rfcs_say(case: Case, echo: Served) -> None:
    _check(case, echo)


@pytest.mark.parametrize("case", ROWS)
def test_the_whole_gateway_answers_as_the_rfcs_say(case: Case, product: Served) -> None:
    _check(case, product)


def _check(case: Case, served: Served) -> None:
    with connect(served.port) as peer:
        verdict = run(case, peer, seconds=0.3 if case.id in TOLERATED else 3.0)
    assert verdict.passed, f"{case.sent} ({case.clause}): {', '.join(verdict.came)}"
