"""Calls end in every way while their tensors lie in shared memory, in any order: no call gets or overwrites another's.

What can befall one call befalls others too: a connection to Triton that breaks, or a Triton that dies, takes all calls.
So several are in memory at once, in the states in which a slot can be, and things happen to them one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from command_line import free_address
from faulty_proxy import FaultyProxy, faulty_proxy
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ledger import LARGE, OK, Ledger, request
from patience import wait_until
from scripted_triton import ScriptedTriton
from traffic import config, gateway, write
from tritonclient.grpc import service_pb2_grpc
from v2_gateways import endpoint_of

from gateway.app import Gateway
from gateway.upstream.kept import MOST_GIVEN_UP
from gateway.upstream.shared_memory import SharedMemory

TIMES = max(1, int(os.environ.get("SOAK_SECONDS", "60")) // 360)
GIVEN_UP = (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
BROKEN = (*GIVEN_UP, grpc.StatusCode.UNAVAILABLE)

pytestmark = pytest.mark.timeout(300 * TIMES)


class Working(ScriptedTriton):
    """Its models work until they may end."""

    def __init__(self, book: str) -> None:
        super().__init__(book, 0)
        self.may_end = asyncio.Event()

    async def work(self) -> None:
        await self.may_end.wait()


class Triton:
    """A server in this process that is killed, and started again as one that knows no memory."""

    def __init__(self, book: Path) -> None:
        self.address, self.book = free_address(), book
        book.touch()

    async def start(self) -> None:
        self.model = Working(str(self.book))
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self.model, self._server)
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def kill(self) -> None:
        await self._server.stop(0)
        self.model.may_end.set()


@dataclass
class Rig:
    triton: Triton
    running: Gateway
    link: FaultyProxy  # between gateway and server
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def memory(self) -> SharedMemory:
        memory = endpoint_of(self.running, "main").memory
        assert memory is not None
        return memory

    async def is_as_before(self) -> None:
        await wait_until(lambda: self.memory.now().state == "in use")
        await wait_until(lambda: self.memory.now().slots == self.memory.now().taken == 0)
        assert endpoint_of(self.running, "main").in_flight == 0


@contextlib.asynccontextmanager
async def rigged(
    folder: Path,
    size: str,
    variant: dict[str, object] | None = None,
    model: dict[str, object] | None = None,
    **more: object,
) -> AsyncIterator[Rig]:
    """size: of the memory. variant, model, more: further keys of the model's variant, of it, and of the config."""
    triton = Triton(folder / "book")
    await triton.start()
    async with faulty_proxy(int(triton.address.rpartition(":")[2])) as link:
        main = {"endpoints": [f"127.0.0.1:{link.port}"], "probe_interval": "100ms", "shared_memory": {"bytes": size}}
        variants = {"only": {"upstream": "main", "model": "echo", **(variant or {})}}
        models = {"m": {"variants": variants, **(model or {})}}
        async with gateway(write(folder / "gateway.yaml", config({"main": main}, models, **more))) as running:
            yield Rig(triton, running, link)
    await triton.kill()


@pytest.fixture(scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    async with rigged(tmp_path_factory.mktemp("slots"), "1MiB") as made:
        yield made


class Asking:
    """A caller with one call, which can be held up while its tensor arrives."""

    def __init__(self, rig: Rig, way: FaultyProxy, seconds: float) -> None:
        self.rig, self.way = rig, way
        self.id = rig.ledger.begin(seconds)
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{way.port}", [("grpc.use_local_subchannel_pool", 1)])
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.call = stub.ModelInfer(request(self.id, size=LARGE), timeout=seconds)

    async def laying(self) -> None:
        """Until a part of its tensor is in memory, or cannot be."""
        self.way.hold_after = LARGE // 2
        before = self.rig.memory.now()
        await self._until(lambda: self.rig.memory.now().slots > before.slots or self._is_refused_since(before.requests))

    def _is_refused_since(self, before: dict[str, int]) -> bool:
        now = self.rig.memory.now().requests
        return any(now.get(why, 0) > before.get(why, 0) for why in ("no_region", "no_slot"))

    async def read(self) -> None:
        """Until a model works with it."""
        await self._until(lambda: self.id in self.rig.triton.book.read_text().split())

    async def _until(self, is_so: Callable[[], bool]) -> None:
        await wait_until(lambda: self.call.done() or is_so())

    async def ended(self) -> grpc.StatusCode:
        answer = b""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            answer = (await self.call).raw_output_contents[0]
        code = await self.call.code()
        self.rig.ledger.end(self.id, code, await self.call.details() or "", answer)
        self.rig.ledger.entries[self.id].attempts = 3  # one that is cancelled is told of none
        await self.channel.close()
        return code


# What happens


async def nothing(asking: Asking) -> None:
    pass


async def is_cancelled(asking: Asking) -> None:
    asking.call.cancel()


async def is_too_late(asking: Asking) -> None:
    """Its deadline was set when it began."""


async def caller_vanishes(asking: Asking) -> None:
    asking.way.cut()


async def connection_is_cut(asking: Asking) -> None:
    asking.rig.link.cut()


async def triton_is_killed(asking: Asking) -> None:
    await asking.rig.triton.kill()
    await asking.rig.triton.start()


async def triton_ends_its_calls(asking: Asking) -> None:
    asking.rig.triton.model.may_end.set()


async def memory_is_forgotten(asking: Asking) -> None:
    """Somebody unregisters what is not in use."""
    model = asking.rig.triton.model
    for name in list(model._regions):
        if not model._in_use[name]:
            del model._regions[name]


STATES = {"laid": Asking.laying, "read": Asking.read}
EVENTS: dict[str, Callable[[Asking], Awaitable[None]]] = {
    event.__name__: event
    for event in (
        *(nothing, is_cancelled, is_too_late, caller_vanishes, connection_is_cut, triton_is_killed),
        *(triton_ends_its_calls, memory_is_forgotten),
    )
}


@settings(max_examples=16 * TIMES, phases=[Phase.generate], derandomize=TIMES == 1, deadline=None)
@given(
    plan=st.lists(st.tuples(st.sampled_from(list(STATES)), st.sampled_from(list(EVENTS))), min_size=1, max_size=4),
    order=st.permutations(range(4)),
)
async def test_whatever_befalls_a_slot_no_call_gets_or_overwrites_anothers(
    rig: Rig, plan: list[tuple[str, str]], order: list[int]
) -> None:
    await rig.is_as_before()
    rig.triton.model.may_end.clear()
    port = int(rig.running.listen.rpartition(":")[2])
    async with contextlib.AsyncExitStack() as exits:
        asking: list[Asking] = []
        after: list[Asking] = []
        free_way = await exits.enter_async_context(faulty_proxy(port))
        for state, event in plan:
            way = await exits.enter_async_context(faulty_proxy(port))
            if state == "laid":
                way.hold_after = LARGE // 2
            asking.append(Asking(rig, way, 0.3 if event == "is_too_late" else 20.0))
            await STATES[state](asking[-1])
        for number in order:
            if number < len(plan):
                await EVENTS[plan[number][1]](asking[number])
                after.append(Asking(rig, free_way, 20.0))  # which would get its slot
                await after[-1].read()
        for each in asking:
            each.way.heal()
        rig.triton.model.may_end.set()
        codes = [await each.ended() for each in asking]
        assert {await each.ended() for each in after} <= {OK, grpc.StatusCode.UNAVAILABLE}
    for code, (_, event) in zip(codes, plan, strict=True):
        assert code is OK or code in BROKEN
        if event in ("nothing", "memory_is_forgotten", "triton_ends_its_calls"):
            assert code not in GIVEN_UP
    if not {event for _, event in plan} & {"connection_is_cut", "triton_is_killed"}:
        assert all(code is OK or code in GIVEN_UP for code in codes if code is not grpc.StatusCode.UNAVAILABLE)
    await rig.is_as_before()
    rig.ledger.check([rig.triton.book])


async def given_up(rig: Rig, way: FaultyProxy, count: int) -> None:
    """So many calls that a model works at, and whose callers have gone."""
    asking = [Asking(rig, way, 20.0) for _ in range(count)]
    for each in asking:
        await each.read()
        each.call.cancel()
        assert await each.ended() is grpc.StatusCode.CANCELLED
    await wait_until(lambda: rig.memory.now().given_up == count)


@pytest.mark.parametrize("limited", ["the model", "the caller", "who shares answers"])
async def test_who_cancels_has_no_more_computed_than_who_waits(tmp_path: Path, limited: str) -> None:
    """A call that is given up keeps its places until Triton has answered."""
    variant = {"limit": 2} if limited == "the model" else {}
    quotas = {"caller": "x-tenant", "default": {"concurrent": 2}} if limited != "the model" else {}
    model: dict[str, object] = {"share": {}} if limited == "who shares answers" else {}
    async with (
        rigged(tmp_path, "16MiB", variant, model, quotas=quotas) as rig,
        faulty_proxy(int(rig.running.listen.rpartition(":")[2])) as way,
    ):
        await rig.is_as_before()
        await given_up(rig, way, 2)
        assert endpoint_of(rig.running, "main").in_flight == 2
        code = await Asking(rig, way, 0.5).ended()
        assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)
        rig.triton.model.may_end.set()
        await rig.is_as_before()
        assert await Asking(rig, way, 20.0).ended() is OK
        assert rig.memory.now().given_up == 0
        rig.ledger.check([rig.triton.book])
        assert len(rig.triton.book.read_text().split()) == 3


async def test_where_too_much_is_computed_for_nobody_tensors_go_as_bytes(tmp_path: Path) -> None:
    """So that what is given up next ends in Triton, too."""
    async with (
        rigged(tmp_path, "16MiB") as rig,
        faulty_proxy(int(rig.running.listen.rpartition(":")[2])) as way,
    ):
        await rig.is_as_before()
        await given_up(rig, way, MOST_GIVEN_UP)
        more = Asking(rig, way, 20.0)
        await more.read()
        assert rig.memory.now().requests == {"placed": MOST_GIVEN_UP, "given_up": 1}
        rig.triton.model.may_end.set()
        assert await more.ended() is OK
        await rig.is_as_before()
        assert await Asking(rig, way, 20.0).ended() is OK
        assert rig.memory.now().requests["placed"] == MOST_GIVEN_UP + 1
        rig.ledger.check([rig.triton.book])


async def test_a_server_that_hangs_costs_a_large_request_one_attempt_and_not_the_call(tmp_path: Path) -> None:
    """It is here whole when it is sent, so an attempt has its time as that of a small one."""
    async with (
        rigged(tmp_path, "16MiB", {"attempt_timeout": "200ms"}) as rig,
        faulty_proxy(int(rig.running.listen.rpartition(":")[2])) as way,
    ):
        await rig.is_as_before()
        asking = Asking(rig, way, 20.0)
        assert await asking.ended() is grpc.StatusCode.UNAVAILABLE
        assert "only: late" in await asking.call.details()
        assert rig.memory.now().requests == {"placed": 1}
        assert rig.memory.now().given_up == 1
        rig.triton.model.may_end.set()
        await rig.is_as_before()
        rig.ledger.check([rig.triton.book])
