"""Outcomes that nobody reports: agreement with a reference, confidence and size, from a Triton to the verdict."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from traffic import OK, config, gateway, until, write
from v2_calls import call, channel_to, infer, stream_all

from gateway.experimentation.reports import source_of, stored_report
from gateway.store.database import Store
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

KEY = "a key that nobody guesses"
MEASURED = {
    "differs": {"kind": "binary", "better": "lower", "measure": "disagreement", "reference": "reference"},
    "agrees": {"kind": "ratio", "better": "higher", "measure": "agreement", "reference": "reference"},
    "sure": {"kind": "numeric", "better": "higher", "measure": "confidence"},
    "bytes": {"kind": "numeric", "better": "lower", "measure": "size"},
}


async def test_an_experiment_is_decided_by_what_the_gateway_measures(triton: LocalTriton, tmp_path: Path) -> None:
    """One arm agrees with the reference, the other is 1 above it: it is surer, and never agrees."""
    names = {"same": "add_one_a", "other": "add_two", "reference": "add_one_b"}
    variants = {name: {"upstream": "main", "model": model} for name, model in names.items()}
    shadow = {"reference": {"share": 1, "in_flight": 64}}
    adder = {"variants": variants, "sticky": {"metadata": "x-user"}, "shadow": shadow}
    experiment = {
        "model": "adder",
        "arms": {"same": 1, "other": 1},
        "outcomes": MEASURED,
        "primary": "differs",
        "secondary": ["sure", "agrees", "bytes"],
        "smallest_effect": 0.01,
        "units": 300,
    }
    store = {"url": f"sqlite:///{tmp_path}/seen.db", "unit_key": KEY}
    content = config({"main": triton.grpc_address}, {"adder": adder}, experiments={"spring": experiment}, store=store)
    file = write(tmp_path / "gateway.yaml", content)
    async with gateway(file) as running, channel_to(running.listen) as channel:
        shadows = running._shadows
        for begin in range(0, 300, 30):  # a few at a time, so that no copy is dropped
            users = range(begin, begin + 30)
            ended = await asyncio.gather(
                *(
                    call(channel, infer("adder", [[1.0, 3.0 + user % 7]]), metadata=[("x-user", str(user))])
                    for user in users
                )
            )
            assert {each.code for each in ended} == {OK}
            await until(lambda: not shadows._held, 20, "copies", lambda: str(shadows.now()))
        await stream_all(channel, [infer("adder", [[1.0, 3.0]], id="1")], [("x-user", "on a stream")])
        await until(lambda: not shadows._held, 20, "copies", lambda: str(shadows.now()))
    seen = Store(store["url"], KEY)
    by_unit = {each.unit: each.arm for each in seen.exposures("spring")}
    found = list(seen.outcomes("spring", dict.fromkeys(MEASURED, True)))
    seen.close()
    assert Counter(each.name for each in found) == dict.fromkeys(MEASURED, 301)
    assert {(by_unit[each.unit], each.value) for each in found if each.name == "agrees"} == {("same", 1), ("other", 0)}
    assert {(by_unit[each.unit], each.value) for each in found if each.name == "differs"} == {("same", 0), ("other", 1)}
    report = stored_report(source_of(str(file), None), "spring", history=False).report
    (differs,), (sure, _, _) = report.primary, report.secondary
    assert (report.answer.value, differs.judgement.value) == ("baseline", "worse")
    assert (sure.judgement.value, round(sure.difference)) == ("better", 1)
