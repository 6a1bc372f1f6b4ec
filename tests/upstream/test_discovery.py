"""Names are followed: new answers are told once, failures change nothing, the system is asked as it should be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection

import pytest

from gateway.upstream import discovery as discovery_module
from gateway.upstream.discovery import Discovery, addresses_of, resolve_by_system

POOL = ("pool.test", 8001)


class NameService:
    """Answers what it is told to."""

    def __init__(self) -> None:
        self.hosts: dict[str, list[str]] = {}
        self.asked = 0
        self._question = asyncio.Event()
        self.hangs = False

    async def resolve(self, host: str) -> Collection[str]:
        self.asked += 1
        self._question.set()
        if self.hangs:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if host not in self.hosts:
            raise OSError(-2, "Name or service not known")
        return self.hosts[host]

    async def until_asked(self, more: int) -> None:
        """Wait until so many further questions were answered."""
        wanted = self.asked + more + 1  # the one before it has been dealt with by then
        while self.asked < wanted:
            self._question.clear()
            await asyncio.wait_for(self._question.wait(), 60)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> NameService:
    monkeypatch.setattr(discovery_module, "_PERIOD_SECONDS", 0.002)
    monkeypatch.setattr(discovery_module, "_FIRST_RETRY_SECONDS", 0.002)
    return NameService()


@pytest.fixture
def told() -> list[tuple[str, ...]]:
    """What was known at each change."""
    return []


@pytest.fixture
async def discovery(names: NameService, told: list[tuple[str, ...]]) -> AsyncIterator[Discovery]:
    async with Discovery(lambda: told.append(running.addresses(POOL)), names.resolve) as running:
        yield running


async def test_a_name_is_known_once_it_is_learned(discovery: Discovery, names: NameService) -> None:
    names.hosts["pool.test"] = ["10.0.0.2", "10.0.0.1"]
    await discovery.learn([POOL], timeout=60)
    assert discovery.addresses(POOL) == ("10.0.0.1:8001", "10.0.0.2:8001")


async def test_each_change_is_told_once_whatever_the_order_of_the_answer(
    discovery: Discovery, names: NameService, told: list[tuple[str, ...]]
) -> None:
    names.hosts["pool.test"] = ["10.0.0.1", "10.0.0.2"]
    await discovery.learn([POOL], timeout=60)
    names.hosts["pool.test"] = ["10.0.0.2", "10.0.0.1", "10.0.0.1"]
    await names.until_asked(3)
    names.hosts["pool.test"] = ["10.0.0.3", "10.0.0.1"]
    await names.until_asked(3)
    assert told == [("10.0.0.1:8001", "10.0.0.2:8001"), ("10.0.0.1:8001", "10.0.0.3:8001")]


@pytest.mark.parametrize("answer", [None, []], ids=["no such name", "a name without addresses"])
async def test_a_failing_lookup_keeps_the_last_answer(
    discovery: Discovery, names: NameService, told: list[tuple[str, ...]], answer: list[str] | None
) -> None:
    names.hosts["pool.test"] = ["10.0.0.1"]
    await discovery.learn([POOL], timeout=60)
    if answer is None:
        del names.hosts["pool.test"]
    else:
        names.hosts["pool.test"] = answer
    await names.until_asked(2)
    assert discovery.addresses(POOL) == ("10.0.0.1:8001",)
    assert len(told) == 1
    assert "failure" in str(discovery.state())
    names.hosts["pool.test"] = ["10.0.0.1"]
    await names.until_asked(2)
    assert discovery.state() == {"pool.test:8001": {"addresses": ["10.0.0.1:8001"], "failure": None}}


async def test_a_name_that_appears_later_is_found_and_told(
    discovery: Discovery, names: NameService, told: list[tuple[str, ...]]
) -> None:
    await discovery.learn([POOL], timeout=60)
    assert discovery.addresses(POOL) == ()
    names.hosts["pool.test"] = ["10.0.0.1"]
    await names.until_asked(2)
    assert told == [("10.0.0.1:8001",)]


async def test_learning_does_not_wait_for_a_resolver_that_hangs(discovery: Discovery, names: NameService) -> None:
    names.hangs = True
    await discovery.learn([POOL], timeout=0.01)
    assert discovery.addresses(POOL) == ()


async def test_a_name_that_is_not_kept_is_not_asked_for_any_more(discovery: Discovery, names: NameService) -> None:
    names.hosts["pool.test"] = ["10.0.0.1"]
    await discovery.learn([POOL], timeout=60)
    discovery.keep([])
    asked = names.asked
    await asyncio.sleep(0.02)
    assert names.asked == asked
    assert discovery.addresses(POOL) == ()


async def test_an_answer_that_could_not_be_taken_over_is_told_again(names: NameService) -> None:
    names.hosts["pool.test"] = ["10.0.0.1"]
    calls = 0

    def changed() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("a certificate can't be read just now")

    async with Discovery(changed, names.resolve) as running:
        await running.learn([POOL], timeout=60)
        await names.until_asked(3)
    assert calls == 2


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["10.0.0.2", "10.0.0.1", "10.0.0.2"], ("10.0.0.1:1", "10.0.0.2:1")),
        (["fd00::2", "fd00::1"], ("[fd00::1]:1", "[fd00::2]:1")),
        (["fd00::1", "10.0.0.1"], ("10.0.0.1:1",)),
        ([], ()),
    ],
    ids=["sorted, each once", "IPv6 in brackets", "one kind of address for a pod that has both", "none"],
)
def test_addresses_are_endpoints(hosts: list[str], expected: tuple[str, ...]) -> None:
    assert addresses_of(hosts, 1) == expected


async def test_the_system_is_asked_and_says_what_it_knows() -> None:
    assert "127.0.0.1" in await resolve_by_system("localhost")
    with pytest.raises(OSError, match=r"."):
        await resolve_by_system("no-such-name.invalid")
    with pytest.raises(OSError, match="can't be a host name"):
        await resolve_by_system("a" * 300)
