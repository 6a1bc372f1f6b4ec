"""Rollouts in the store: decisions, of which each follows one before it, and counts of calls."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Select, delete, func, select

from gateway.experiments.rollout import ENDED, Phase, RolloutPlan, State
from gateway.store import schema
from gateway.store.leases import LeaseStore
from gateway.store.rows import StoreReadOnly

_FORGET_SECONDS: Final = 3600.0
"""After so long the counts of a worker that is gone are deleted. One that is there tells its own again earlier."""


class Counts(NamedTuple):
    """How calls of one variant have ended at one worker, and what was found in answers, since it started.

    The last four are by the place of whose they are, as `experiments.crowd` has it; () if that is not known.
    """

    good: int = 0
    errors: int = 0
    unanswered: int = 0
    finite: int = 0
    not_finite: int = 0
    wrong: int = 0
    left_alone: int = 0
    ended_good: tuple[int, ...] = ()
    ended_bad: tuple[int, ...] = ()
    seen_good: tuple[int, ...] = ()
    seen_bad: tuple[int, ...] = ()

    def since(self, last: Counts) -> Counts:
        """What has come to it; all of it if it was counted anew, as after a config that had no rollout for a moment."""
        if any(now < then for now, then in zip(self[:_SUMS], last[:_SUMS], strict=True)):
            return self
        sums = [now - then for now, then in zip(self[:_SUMS], last[:_SUMS], strict=True)]
        places = [_since(now, then) for now, then in zip(self[_SUMS:], last[_SUMS:], strict=True)]
        return Counts._make([*sums, *places])


_SUMS: Final = 7  # of the fields above
_KNOWN_BEFORE: Final = ("good", "errors", "unanswered", "finite", "not_finite")
"""Fields that have columns: what gateways of the version before read. To them what else is bad is an error."""


def _since(now: Sequence[int], then: Sequence[int]) -> tuple[int, ...]:
    return tuple(one - other for one, other in zip(now, then, strict=True)) if then else tuple(now)


class Decision(NamedTuple):
    """A state, and of which variants it is: a name may have been used for others."""

    model: str
    before: str
    after: str
    state: State

    def is_of(self, plan: RolloutPlan) -> bool:
        return (self.model, self.before, self.after) == (plan.model, plan.before, plan.after)


@dataclass(frozen=True, slots=True)
class Look:
    """What the store said at one time."""

    now: float
    decisions: Mapping[str, Decision]  # the last one of each rollout that has any
    led: frozenset[str] = frozenset()  # rollouts whose lease this worker has
    counts: Mapping[str, Mapping[tuple[str, str], Counts]] = field(default_factory=dict)
    """Of those, by worker and variant."""
    read_only: str = ""  # why nothing was told nor asked for, if the store can only be read


class RolloutStore(LeaseStore):
    """The same database, for rollouts."""

    def look(
        self, worker: str, plans: Mapping[str, RolloutPlan], counts: Mapping[tuple[str, str], Counts], seconds: float
    ) -> Look:
        """Read the state of these rollouts, tell this worker's counts, and ask for the lease of those under way.

        counts: by rollout and variant, those that have changed. seconds: for which a lease is.
        :raises StoreAway: if it can't be used.
        """
        self.open()
        with self.transaction(reads=True) as connection:
            now = self.now_of(connection)
            decisions = {row.rollout: _decision(row) for row in connection.execute(_last_of(plans))}
        led = sorted(name for name, plan in plans.items() if name not in decisions or _is_open(decisions[name], plan))
        if not led:
            return Look(now, decisions)
        try:
            with self.transaction() as connection:
                now = self.now_of(connection)
                self._tell(connection, worker, counts, now)
                held = frozenset(name for name in led if self.take_lease(connection, name, worker, now, seconds))
                return Look(now, decisions, held, self._counts(connection, held))
        except StoreReadOnly as error:
            return Look(now, decisions, read_only=str(error))

    def _tell(self, connection: Connection, worker: str, counts: Mapping[tuple[str, str], Counts], now: float) -> None:
        if not counts:
            return
        whose = [
            {"rollout": rollout, "worker": worker, "variant": variant, "at": now} for rollout, variant in sorted(counts)
        ]
        each = [counts[key] for key in sorted(counts)]
        sums = [row | _columns(count) for row, count in zip(whose, each, strict=True)]
        crowds = [row | {"counts": json.dumps(count)} for row, count in zip(whose, each, strict=True)]
        for table, rows in ((schema.calls, sums), (schema.crowds, crowds)):
            made = self.insert(table)
            keys = [table.c[name] for name in ("rollout", "worker", "variant")]
            new = {name: made.excluded[name] for name in rows[0] if name not in table.primary_key.columns}
            connection.execute(made.on_conflict_do_update(index_elements=keys, set_=new), rows)

    @staticmethod
    def _counts(connection: Connection, names: Collection[str]) -> dict[str, dict[tuple[str, str], Counts]]:
        if not names:
            return {}
        table, crowd = schema.calls.c, schema.crowds.c
        columns = [table[name] for name in _KNOWN_BEFORE]
        same = (table.rollout == crowd.rollout) & (table.worker == crowd.worker) & (table.variant == crowd.variant)
        asked = (
            select(table.rollout, table.worker, table.variant, crowd.counts, *columns)
            .select_from(schema.calls.outerjoin(schema.crowds, same))
            .where(table.rollout.in_(list(names)))
        )
        found: dict[str, dict[tuple[str, str], Counts]] = {}
        for rollout, worker, variant, written, *counts in connection.execute(asked):
            known = Counts(*counts) if written is None else _read(written)
            found.setdefault(rollout, {})[worker, variant] = known
        return found

    def decide(self, plan: RolloutPlan, state: State, worker: str = "") -> bool:
        """Write a state in place of the one that its version follows. False: another one was written meanwhile.

        worker: who must have the lease; "" if a person asks for it, which takes none.
        :raises StoreAway: if it can't be used.
        """
        self.open()
        table = schema.decisions
        row = {
            "rollout": plan.name,
            "model": plan.model,
            "before": plan.before,
            "after": plan.after,
            "phase": state.phase.value,
            "reason": state.reason[: schema.REASON],
            **{name: getattr(state, name) for name in ("version", "step", "share", "since", "at")},
        }
        with self.transaction() as connection:
            if worker and not self.holds(connection, plan.name, worker, self.now_of(connection)):
                return False
            last = connection.execute(select(func.max(table.c.version)).where(table.c.rollout == plan.name)).scalar()
            if (last or 0) != state.version - 1:
                return False
            made = self.insert(table).values(row).on_conflict_do_nothing()
            written = connection.execute(made, execution_options={"preserve_rowcount": True})
            if written.rowcount != 1:
                return False
            for counts in (schema.calls, schema.crowds):
                connection.execute(delete(counts).where(counts.c.at < state.at - _FORGET_SECONDS))
            return True

    def history(self, name: str) -> list[Decision]:
        """Every decision about a rollout, the first one first.

        :raises StoreAway: if it can't be used.
        """
        self.open()
        table = schema.decisions
        asked = select(table).where(table.c.rollout == name).order_by(table.c.version)
        with self.transaction(reads=True) as connection:
            return [_decision(row) for row in connection.execute(asked)]


def _columns(counts: Counts) -> dict[str, int]:
    told = counts._replace(errors=counts.errors + counts.wrong + counts.left_alone)._asdict()
    return {name: told[name] for name in _KNOWN_BEFORE}


def _read(written: str) -> Counts:
    """What `json.dumps` made of one."""
    fields = json.loads(written)
    return Counts._make([*fields[:_SUMS], *map(tuple, fields[_SUMS:])])


def _decision(row: Any) -> Decision:  # Any: SQLAlchemy's
    state = State(
        Phase(row.phase), int(row.step), float(row.share), float(row.since), float(row.at), row.reason, int(row.version)
    )
    return Decision(row.model, row.before, row.after, state)


def _last_of(names: Iterable[str]) -> Select[Any]:
    table = schema.decisions
    chosen = table.c.rollout.in_(list(names))
    last = select(table.c.rollout, func.max(table.c.version).label("version")).where(chosen).group_by(table.c.rollout)
    each = last.subquery()
    return select(table).join(each, (table.c.rollout == each.c.rollout) & (table.c.version == each.c.version))


def _is_open(decision: Decision, plan: RolloutPlan) -> bool:
    """May it be decided about?"""
    return decision.state.phase not in ENDED and decision.is_of(plan)
