"""A server that hangs costs callers of a hedged model a moment and no answer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from played_triton import hangs, played
from test_upstream_faults import infer
from traffic import OK, config, gateway, http, write
from v2_calls import call, channel_to

MODEL: dict[str, Any] = {
    "net": {"variants": {"only": {"upstream": "all", "model": "net"}}, "hedge": {"after": "50ms"}, "share": {}}
}


async def test_one_of_two_servers_hangs_and_every_caller_is_answered(tmp_path: Path) -> None:
    async with played() as one, played() as two:
        file = write(tmp_path / "g.yaml", config({"all": [one.address, two.address]}, MODEL))
        async with gateway(file) as running, channel_to(running.listen) as channel:
            one.behaviour = hangs
            calls = [call(channel, infer(size=4 + number), timeout=60) for number in range(10)]
            calls += [call(channel, infer(size=4), timeout=60) for _ in range(10)]  # identical to one another
            answers = await asyncio.gather(*calls)
            assert {answer.code for answer in answers} == {OK}
            assert {answer.trailers["gateway-endpoint"] for answer in answers} == {two.address}
            metrics = (await http(running.admin_address, "/metrics"))[1]
            assert 'gateway_hedges_total{model="net",what="won"}' in metrics
            assert 'gateway_attempts_total{address="' + one.address + '",meaning="ended"' in metrics
