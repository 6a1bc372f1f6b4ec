"""When an endpoint's region is registered, doubted and let go of: what a scripted Triton is asked, and what follows."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from patience import wait_until
from tritonclient.grpc import service_pb2 as pb

from gateway.status import Code, Origin
from gateway.upstream.connection import Answer, CallFailed
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.kept import Unheard
from gateway.upstream.placed import Placed
from gateway.upstream.room import Room, SharedMemorySettings, is_this_host
from gateway.upstream.shared_memory import SharedMemory
from gateway.v2.shared_memory import RESERVED

MIB = 1 << 20
NAMES = "m", "", ""  # of a call: its model, version and id
UNKNOWN = CallFailed(Code.NOT_FOUND, "Unable to find system shared memory region: 'it'")
IN_USE = CallFailed(Code.INTERNAL, "Cannot unregister shared memory region 'it', it is currently in use.")


class Triton:
    """Answers what is asked about regions."""

    def __init__(self) -> None:
        self.losses = 0
        self.version = "2.51.0"
        self.asked: list[str] = []
        self.regions: dict[str, str] = {}
        self.failures: dict[str, CallFailed] = {}  # by the RPC
        self.hangs_at = ""  # the RPC that is never answered
        self.hangs = asyncio.Event()

    async def unary(self, path: str, body: bytes, metadata: Any, timeout: float | None) -> Answer:
        method = path.rpartition("/")[2]
        self.asked.append(method.removeprefix("SystemSharedMemory"))
        request = getattr(pb, f"{method}Request").FromString(body)
        answer = getattr(pb, f"{method}Response")()
        if method == self.hangs_at:
            self.hangs.set()
            await asyncio.Event().wait()
        if method in self.failures:
            raise self.failures[method]
        if method == "ServerMetadata":
            answer.version = self.version
        elif method.endswith("Register") and not method.endswith("Unregister"):
            self.regions[request.name] = request.key
        elif method.endswith("Unregister"):
            self.regions.pop(request.name, None)
        elif request.name and request.name not in self.regions:
            raise UNKNOWN
        else:
            for name in self.regions:
                answer.regions[name].name = name
        return Answer(answer.SerializeToString(), (), ())


class Rig:
    def __init__(
        self, folder: Path, address: str = "127.0.0.1:8001", room: Room | None = None, **settings: Any
    ) -> None:
        self.triton = Triton()
        self.folder = folder
        self.now = 1000.0
        self.endpoint = Endpoint("main", address, self.triton)  # type: ignore[arg-type]
        self.memory = SharedMemory(
            self.endpoint, SharedMemorySettings(MIB, 1, folder, **settings), room, clock=lambda: self.now
        )

    async def look(self) -> list[str]:
        """What is asked in one look."""
        self.triton.asked.clear()
        self.now += 1.0
        await self.memory.registration.look()
        return list(self.triton.asked)

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def placed(self, size: int = 1000) -> Placed | None:
        message = pb.ModelInferRequest(model_name="m", inputs=[{"name": "x"}], raw_input_contents=[bytes(size)])
        body = message.SerializeToString()
        placed = self.memory.maybe_place(body, len(body))
        if placed is not None:
            placed.feed_first(body)
        return placed

    def sent(self) -> Placed:
        placed = self.placed()
        assert placed is not None
        assert placed.request(NAMES) is not None
        placed.sent()
        return placed


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


async def test_a_region_is_registered_once_and_then_nothing_is_asked(rig: Rig) -> None:
    assert await rig.look() == ["ServerMetadata", "Register", "Status"]
    assert rig.files == set(rig.triton.regions)
    assert await rig.look() == []
    ((name, key),) = rig.triton.regions.items()
    assert (key, name.startswith(RESERVED), len(name)) == (f"/{name}", True, len(RESERVED) + 32)
    assert (rig.folder / name).stat().st_mode & 0o777 == 0o600


async def test_a_connection_that_was_lost_has_triton_asked_whether_it_knows_the_region(rig: Rig) -> None:
    await rig.look()
    rig.triton.losses += 1
    assert rig.placed() is None
    assert await rig.look() == ["Status"]
    assert rig.placed() is not None
    assert rig.memory.now().requests == {"no_region": 1}


async def test_a_triton_that_was_started_anew_gets_another_region(rig: Rig) -> None:
    await rig.look()
    before = rig.files
    rig.triton.losses += 1
    rig.triton.regions.clear()
    assert await rig.look() == ["Status", "ServerMetadata", "Register", "Status"]
    assert len(rig.files) == 1
    assert rig.files.isdisjoint(before)
    assert rig.memory.now().registrations == {"registered": 2, "forgotten": 1}


async def test_a_call_of_which_nobody_knows_retires_the_region_until_triton_lets_go(rig: Rig) -> None:
    await rig.look()
    sent, waiting = rig.sent(), rig.placed()
    assert waiting is not None
    sent.kept(NAMES).released(False)
    assert waiting.request(NAMES) is None  # it was being laid: it goes as bytes
    assert rig.placed() is None
    rig.triton.failures["SystemSharedMemoryUnregister"] = IN_USE
    for _ in range(3):
        assert await rig.look() == ["Unregister"]
    assert rig.memory.now().size == MIB
    del rig.triton.failures["SystemSharedMemoryUnregister"]
    sent.drop()
    waiting.drop()
    assert await rig.look() == ["Unregister", "ServerMetadata", "Register", "Status"]
    assert len(rig.files) == 1
    assert rig.memory.now().taken == 0
    assert rig.placed() is not None


async def test_a_region_that_is_in_doubt_twice_is_retired_once(rig: Rig) -> None:
    await rig.look()
    first, second = rig.sent(), rig.sent()
    first.kept(NAMES).released(False)
    first.drop()
    second.drop()  # by its caller, and not by Triton
    await rig.look()
    second.kept(NAMES).released(False)
    assert rig.placed() is not None
    assert rig.memory.now().registrations == {"registered": 2, "retired": 1, "unregistered": 1}


async def test_an_error_that_names_the_region_says_that_triton_does_not_know_it(rig: Rig) -> None:
    await rig.look()
    (name,) = rig.files
    sent = rig.sent()
    assert not sent.is_unknown("Unable to find shared memory region: 'theirs'")
    assert sent.is_unknown(f"Unable to find shared memory region: '{name}'")
    assert await rig.look() == []  # who has unregistered it may do so again
    assert rig.files == set()
    sent.drop()
    rig.now += 11
    rig.triton.regions.clear()
    assert await rig.look() == ["ServerMetadata", "Register", "Status"]


async def test_an_error_that_names_the_region_but_not_as_unknown_has_triton_asked(rig: Rig) -> None:
    """The call goes as bytes, and what one caller's tensors are refused for does not cost the others the region."""
    await rig.look()
    (name,) = rig.files
    sent = rig.sent()
    assert sent.is_unknown(f"Invalid offset + byte size for shared memory region: '{name}'")
    assert rig.placed() is None
    assert await rig.look() == ["Status"]
    assert rig.files == {name}
    assert rig.placed() is not None
    assert rig.memory.now().registrations == {"registered": 1}


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (CallFailed(Code.INTERNAL, "Unable to open shared memory region: '/x'"), "the same /dev/shm and the same user"),
        (CallFailed(Code.UNAVAILABLE, "not allowed"), "(not allowed); from 26.04 on it must be started with --allow-c"),
        (CallFailed(Code.DEADLINE_EXCEEDED, "late", origin=Origin.GIVEN_UP), "Triton did not answer"),
    ],
    ids=["another host", "not allowed", "no answer"],
)
async def test_a_refusal_is_said_once_and_tried_again_later(
    rig: Rig, failure: CallFailed, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig.triton.failures["SystemSharedMemoryRegister"] = failure
    await rig.look()
    assert rig.files == set()
    assert said in rig.memory.now().state
    assert await rig.look() == []
    rig.now += 61
    assert await rig.look() == ["ServerMetadata", "Register"]
    rig.triton.losses += 1  # it may have been started anew, with the flag
    assert await rig.look() == ["ServerMetadata", "Register"]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert rig.memory.now().registrations == {"refused": 3}


async def test_a_refusal_before_a_success_puts_off_nothing_after_it(rig: Rig) -> None:
    """As when a Triton dies while it is asked."""
    rig.triton.failures["SystemSharedMemoryRegister"] = CallFailed(Code.UNAVAILABLE, "gone", origin=Origin.LOST)
    await rig.look()
    del rig.triton.failures["SystemSharedMemoryRegister"]
    rig.triton.losses += 1
    assert await rig.look() == ["ServerMetadata", "Register", "Status"]
    rig.triton.losses += 1
    rig.triton.regions.clear()
    assert await rig.look() == ["Status", "ServerMetadata", "Register", "Status"]


@pytest.mark.parametrize(
    ("version", "is_used"), [("2.50.3", False), ("2.51.0", True), ("2.108", True), ("none", False)]
)
async def test_a_triton_that_may_unmap_memory_in_use_gets_none(rig: Rig, version: str, is_used: bool) -> None:
    rig.triton.version = version
    await rig.look()
    assert bool(rig.files) == is_used


async def test_memory_that_can_t_be_had_is_no_error(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "none")
    assert await rig.look() == ["ServerMetadata"]
    assert "can't be had" in rig.memory.now().state


async def test_endpoints_of_one_name_have_no_more_memory_than_the_config_says(tmp_path: Path) -> None:
    """How many there are behind a name is known to nobody before."""
    room = Room(2 * MIB)
    rigs = [Rig(tmp_path, room=room) for _ in range(3)]
    for rig in rigs:
        await rig.look()
    assert [rig.memory.now().size for rig in rigs] == [MIB, MIB, 0]
    assert rigs[2].memory.state == "all memory of the upstream is in use (2 MiB)"
    await rigs[0].memory.close()
    await rigs[2].look()
    assert [rig.memory.now().size for rig in rigs] == [0, MIB, MIB]
    for failing in (rigs[1], rigs[2]):
        await failing.memory.close()
    assert room.taken == 0


async def test_there_is_no_other_region_while_a_call_has_a_part_of_the_last_one(rig: Rig) -> None:
    """So that there is never more memory than the config says."""
    await rig.look()
    laid = rig.placed()
    assert laid is not None
    rig.triton.losses += 1
    rig.triton.regions.clear()
    assert await rig.look() == ["Status"]
    assert rig.files == set()
    assert rig.memory.now().size == MIB
    laid.drop()
    assert await rig.look() == ["ServerMetadata", "Register", "Status"]
    assert rig.memory.now().size == MIB


async def test_an_answer_is_read_though_its_region_is_gone_meanwhile(rig: Rig) -> None:
    """Triton may let go of a region, and say so, before an answer arrives that it has written there."""
    await rig.look()
    memory = rig.memory
    request = pb.ModelInferRequest(inputs=[{"name": "x"}], outputs=[{"name": "y"}], raw_input_contents=[b"1"])
    front = request.SerializeToString()
    answer = pb.ModelInferResponse(outputs=[{"name": "y", "datatype": "UINT8", "shape": [3]}])
    whole = pb.ModelInferResponse.FromString(answer.SerializeToString())
    answer.raw_output_contents.append(b"")
    whole.raw_output_contents.append(b"abc")
    memory.answers.learn("m", "", front, whole.SerializeToString())
    place = memory.maybe_answer_place("m", "", front)
    region = memory.registration._region
    assert place is not None
    assert region is not None
    place.sent()
    region.memory[place.slot.begin : place.slot.begin + 3] = b"abc"
    memory.registration.lost(region)
    await rig.look()
    place.slot.released(True)
    assert b"".join(place.pieces(answer.SerializeToString())) == whole.SerializeToString()
    await rig.look()  # by which its memory goes
    rig.now += 60.0
    assert "Register" in await rig.look()
    assert memory.now().taken == 0


async def test_an_answers_place_is_in_use_as_long_as_somebody_has_a_part_of_it(rig: Rig) -> None:
    """Where less than half of the region is: else it is copied, so that slow readers hold no more than that."""
    await rig.look()
    memory = rig.memory
    size = 300 * 1024
    request = pb.ModelInferRequest(inputs=[{"name": "x"}], outputs=[{"name": "y"}], raw_input_contents=[b"1"])
    front = request.SerializeToString()
    answer = pb.ModelInferResponse(outputs=[{"name": "y", "datatype": "UINT8", "shape": [size]}])
    whole = pb.ModelInferResponse.FromString(answer.SerializeToString())
    answer.raw_output_contents.append(b"")
    whole.raw_output_contents.append(bytes(size))
    memory.answers.learn("m", "", front, whole.SerializeToString())

    def answered() -> list[bytes | memoryview]:
        place = memory.maybe_answer_place("m", "", front)
        assert place is not None
        place.sent()
        place.slot.released(True)
        return list(place.pieces(answer.SerializeToString()))

    first, second = answered(), answered()
    assert b"".join(first) == b"".join(second) == whole.SerializeToString()
    assert memory.now().slots == 1
    part = memoryview(first[-1])[10:20]
    first.clear()
    await asyncio.sleep(0)
    assert memory.now().slots == 1
    del part
    await asyncio.sleep(0)
    assert memory.now().slots == memory.now().taken == 0


async def test_a_call_that_is_given_up_for_several_reasons_counts_once(rig: Rig) -> None:
    await rig.look()
    placed = rig.sent()
    kept = placed.kept(NAMES)
    told: list[str] = []
    kept.give_up(lambda: told.append("its caller has gone"))
    kept.give_up(lambda: told.append("the connection broke"))
    assert (rig.memory.unheard.count, told) == (1, [])
    kept.released(True)
    assert (rig.memory.unheard.count, told) == (0, ["its caller has gone", "the connection broke"])
    kept.give_up(lambda: told.append("too late"))
    assert (rig.memory.unheard.count, told[2:]) == (0, ["too late"])


async def test_a_place_that_steps_of_a_failed_ensemble_may_read_is_free_after_a_while(rig: Rig) -> None:
    await rig.look()
    placed = rig.sent()
    kept = placed.kept(NAMES)
    rig.memory.unheard.steps_seconds = 0.05
    assert rig.memory.suits("m")
    assert kept.is_own(Code.UNAVAILABLE, "in ensemble 'm', who knows", False)
    assert not rig.memory.suits("m")
    assert rig.memory.suits("other")
    kept.released(True)
    placed.drop()
    assert rig.memory.now().slots == 1
    await wait_until(lambda: rig.memory.now().slots == 0)
    assert rig.memory.now().state == "in use"


def test_ensembles_that_have_failed_are_forgotten_once_there_are_very_many() -> None:
    unheard = Unheard()
    for number in range(2000):
        unheard.failed_in_step(f"m{number}")
    kept = sum(unheard.has_steps(f"m{number}") for number in range(2000))
    assert 800 < kept <= 1024
    assert unheard.has_steps("m1999")


async def test_making_and_removing_a_large_region_takes_none_of_the_event_loops_time(tmp_path: Path) -> None:
    """The kernel takes half a millisecond for each MiB. Time of CPUs, which is the same on a busy machine."""
    rig = Rig(tmp_path)
    rig.memory.registration._settings = SharedMemorySettings(64 * MIB, 1, Path("/dev/shm"))
    whole, loops = time.process_time(), time.thread_time()
    await rig.look()
    assert rig.memory.state == "in use"
    await rig.memory.close()
    whole, loops = time.process_time() - whole, time.thread_time() - loops
    assert loops < whole / 2


@pytest.mark.parametrize("at", ["the memory is allocated", "Triton is asked to register it"])
async def test_an_end_while_a_region_is_made_leaves_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    begun, may_go_on = threading.Event(), threading.Event()
    allocate = os.posix_fallocate

    def slowly(fd: int, begin: int, size: int) -> None:
        begun.set()
        may_go_on.wait(10)
        allocate(fd, begin, size)

    if at == "the memory is allocated":
        monkeypatch.setattr(os, "posix_fallocate", slowly)
    else:
        rig.triton.hangs_at = "SystemSharedMemoryRegister"
    rig.memory.registration.look_soon()
    await asyncio.to_thread(begun.wait, 10) if at == "the memory is allocated" else await rig.triton.hangs.wait()
    assert len(rig.files) == 1
    closing = asyncio.ensure_future(rig.memory.close())
    await asyncio.sleep(0)
    may_go_on.set()
    await closing
    assert rig.files == set()
    assert rig.triton.regions == {}


async def test_the_end_unregisters_what_there_is_and_removes_it_all_the_same(rig: Rig) -> None:
    await rig.look()
    rig.triton.failures["SystemSharedMemoryUnregister"] = IN_USE
    await rig.memory.close()
    assert rig.files == set()
    assert rig.memory.now().registrations == {"registered": 1, "left": 1}
    assert await rig.look() == []


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:8001", True),
        ("127.9.9.9:8001", True),
        ("[::1]:8001", True),
        ("localhost:8001", True),
        ("unix:/run/triton", True),
        ("10.0.0.1:8001", False),
        ("triton:8001", False),
        ("localhost.example:8001", False),
        ("dns:///triton:8001", False),
    ],
)
def test_this_host_is_told_by_the_address(address: str, expected: bool) -> None:
    assert is_this_host(address) is expected


async def test_endpoints_elsewhere_are_tried_only_if_that_is_wanted(tmp_path: Path) -> None:
    assert await Rig(tmp_path, "triton:8001").look() == []
    assert await Rig(tmp_path, "triton:8001", anywhere=True).look() == ["ServerMetadata", "Register", "Status"]
