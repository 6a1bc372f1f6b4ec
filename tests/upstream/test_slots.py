"""Parts of a region never overlap, and are free again exactly when all holders of all of their slots have let go."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from gateway.upstream.slots import GRAIN, Slot, Slots

SIZE = 16 * GRAIN


def taken(slots: Slots, size: int) -> Slot:
    slot = slots.maybe_take(size)
    assert slot is not None
    return slot


class Model(RuleBasedStateMachine):
    """The judge is a table of who holds which grain."""

    slots_taken = Bundle("slots_taken")

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(SIZE + 100)
        self.holders: dict[Slot, set[str]] = {}
        self.parts: dict[Slot, Slot] = {}  # by slot, the first one of its part
        self.stuck: set[Slot] = set()
        self.told = 0
        self.slots.on_stuck = self.tell

    def tell(self) -> None:
        self.told += 1

    def held(self) -> set[Slot]:
        """The first slots of the parts that somebody holds."""
        return {self.parts[slot] for slot, holders in self.holders.items() if holders or slot in self.stuck}

    def grains(self) -> list[int]:
        held = self.held()
        return [grain for slot in held for grain in range(slot.begin // GRAIN, (slot.begin + slot.size) // GRAIN)]

    @rule(target=slots_taken, size=st.integers(1, 6 * GRAIN))
    def take(self, size: int) -> Slot | object:
        used = set(self.grains())
        wanted = -(-size // GRAIN)
        fits = any(used.isdisjoint(range(at, at + wanted)) for at in range(SIZE // GRAIN - wanted + 1))
        slot = self.slots.maybe_take(size)
        assert (slot is not None) == fits
        if slot is None:
            return multiple()
        assert slot.size >= size
        self.holders[slot] = {"call"}
        self.parts[slot] = slot
        return slot

    @rule(target=slots_taken, slot=slots_taken)
    def again(self, slot: Slot) -> Slot | object:
        if self.parts[slot] not in self.held():
            return multiple()
        other = slot.again()
        assert (other.begin, other.size) == (slot.begin, slot.size)
        self.holders[other] = {"call"}
        self.parts[other] = self.parts[slot]
        return other

    @rule(slot=slots_taken)
    def sent(self, slot: Slot) -> None:
        if "call" in self.holders[slot] and slot not in self.stuck:
            slot.sent()
            self.holders[slot].add("server")

    @rule(slot=slots_taken)
    def answered(self, slot: Slot) -> None:
        """Also of a slot that was never sent, and twice: then it means nothing."""
        if slot not in self.stuck:
            slot.released(True)
            self.holders[slot].discard("server")

    @rule(slot=slots_taken)
    def lost(self, slot: Slot) -> None:
        if slot in self.stuck:
            return
        slot.released(False)
        if "server" in self.holders[slot]:
            self.stuck.add(slot)

    @rule(slot=slots_taken)
    def dropped(self, slot: Slot) -> None:
        slot.drop()
        self.holders[slot].discard("call")

    @invariant()
    def nothing_overlaps_and_all_is_counted(self) -> None:
        grains = self.grains()
        assert len(grains) == len(set(grains))
        assert self.slots.taken == GRAIN * len(grains)
        assert self.slots.open == len(self.held())
        assert self.slots.stuck == self.told == len(self.stuck)


TestSlots = Model.TestCase
TestSlots.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_the_first_part_that_fits_is_used_again() -> None:
    slots = Slots(SIZE)
    first = taken(slots, 1)
    taken(slots, 1)
    first.drop()
    assert taken(slots, GRAIN).begin == first.begin


def test_a_call_that_is_over_frees_nothing_that_its_server_may_read() -> None:
    slots = Slots(SIZE)
    slot = taken(slots, SIZE)
    slot.sent()
    slot.drop()
    assert slots.maybe_take(1) is None
    slot.released(True)
    assert taken(slots, SIZE).begin == 0


def test_an_answer_frees_nothing_that_its_call_may_need_again() -> None:
    slots = Slots(SIZE)
    slot = taken(slots, SIZE)
    slot.sent()
    slot.released(True)
    assert slots.maybe_take(1) is None
    slot.drop()
    assert taken(slots, SIZE).begin == 0


def test_nothing_fits_a_region_without_a_grain() -> None:
    assert Slots(GRAIN - 1).maybe_take(1) is None
