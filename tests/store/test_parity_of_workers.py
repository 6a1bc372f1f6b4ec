"""Workers and replicas that share a store find together whether a shadow may stand in for others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from played_triton import played
from traffic import OK, config, gateway, http, until, write
from v2_calls import call, channel_to, infer

from gateway.app import Gateway
from gateway.explain import explain_now
from gateway.store.database import Store

KEY = "a key that nobody guesses"
VARIANTS = {name: {"upstream": "main", "model": f"net_{name}"} for name in ("a", "b")}


@contextlib.asynccontextmanager
async def serving(folder: Path, triton: str, url: str, copies: int) -> AsyncIterator[Gateway]:
    shadow = {"b": {"share": 1, "in_flight": 64, "parity": {"copies": copies, "agreement": 1}}}
    models = {"net": {"variants": VARIANTS, "split": {"a": 1}, "shadow": shadow}}
    file = write(folder / "gateway.yaml", config({"main": triton}, models, store={"url": url, "unit_key": KEY}))
    async with gateway(file) as running:
        yield running


async def ask(running: Gateway, times: int) -> None:
    async with channel_to(running.listen) as channel:
        answers = await asyncio.gather(*(call(channel, infer("net")) for _ in range(times)))
    assert {answer.code for answer in answers} == {OK}


def parity(running: Gateway) -> Any:
    (shadow,) = running._shadows.now()
    return shadow.parity


async def until_known(running: Gateway, compared: int, is_open: bool) -> None:
    holds = lambda: (parity(running).compared, parity(running).is_open) == (compared, is_open)  # noqa: E731
    await until(holds, 30, f"{compared} copies, open: {is_open}", lambda: parity(running))


async def test_copies_of_all_gateways_on_one_store_open_the_gate_of_each(tmp_path: Path, url: str) -> None:
    for name in ("one", "other", "strict"):
        (tmp_path / name).mkdir()
    async with (
        played() as triton,
        serving(tmp_path / "one", triton.address, url, 30) as one,
        serving(tmp_path / "other", triton.address, url, 30) as other,
        serving(tmp_path / "strict", triton.address, url, 40) as strict,
    ):
        await ask(one, 20)
        await until_known(other, 20, False)
        await ask(other, 10)
        for each in (one, other):
            await until_known(each, 30, True)
            state = (await http(each.admin_address, "/state"))[1]
            told = "    calls may fall back to it: 30 of 30 copies agreed; needed are 100% of 30"
            assert told in explain_now(state, "net")
        assert parity(strict).compared == 0  # what asks for something else is another gate


def test_what_a_worker_said_counts_while_it_is_fresh_and_never_for_itself(url: str) -> None:
    store = Store(url, KEY)
    try:
        assert store.exchange_parity("one", {"x": (5, 4), "y": (1, 1)}, 100.0, 90.0) == {}
        assert store.exchange_parity("two", {"x": (7, 7)}, 101.0, 91.0) == {"x": (5, 4)}
        assert store.exchange_parity("one", {"x": (6, 5)}, 102.0, 92.0) == {"x": (7, 7)}
        assert store.exchange_parity("three", {"x": (0, 0), "y": (0, 0)}, 103.0, 93.0) == {"x": (13, 12), "y": (1, 1)}
        assert store.exchange_parity("three", {"x": (0, 0), "y": (0, 0)}, 132.0, 101.5) == {"x": (6, 5)}
    finally:
        store.close()
