"""Verdicts in the store: the latest of each experiment, found by whoever has its lease and read by all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, select

from gateway.experiments.plan import Plan
from gateway.experiments.standing import Json
from gateway.store import schema
from gateway.store.leases import LeaseStore
from gateway.store.rows import StoreReadOnly


def lease_of(experiment: str) -> str:
    """The name of its lease. The experiment's name alone is the bandit's lease, and no name in a config has a `!`."""
    return f"{experiment}!"


def mark_of(plan: Plan) -> str:
    """By which a verdict is known to be of this plan. A plan that says something else has another one."""
    return sha256(repr(plan).encode()).hexdigest()[: schema.HASH]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an experiment said at one time."""

    experiment: str
    plan: str  # its mark
    at: float  # Unix time by the database's clock
    cost: float  # seconds of CPU time that it took
    data: Json  # as of `experiments.standing`


@dataclass(frozen=True, slots=True)
class VerdictsLook:
    """What the store said at one time."""

    now: float
    verdicts: Mapping[str, Verdict]  # of each experiment that has one
    led: frozenset[str] = frozenset()  # experiments whose lease this worker has
    read_only: str = ""  # why no lease was asked for, if the store can only be read


class VerdictStore(LeaseStore):
    """The same database, for verdicts."""

    def look(self, worker: str, known: Mapping[str, Verdict | None], seconds: float) -> VerdictsLook:
        """Read the verdicts of these experiments, and ask for their leases.

        known:   what is known of each already, which is not read again.
        seconds: for which a lease is; 0: none is asked for.
        :raises StoreAway: if it can't be used.
        """
        self.open()
        with self.transaction(reads=True) as connection:
            now, found = self.now_of(connection), _read(connection, known)
        if not seconds:
            return VerdictsLook(now, found)
        try:
            with self.transaction() as connection:
                now = self.now_of(connection)
                led = (
                    name for name in sorted(known) if self.take_lease(connection, lease_of(name), worker, now, seconds)
                )
                return VerdictsLook(now, found, frozenset(led))
        except StoreReadOnly as error:
            return VerdictsLook(now, found, read_only=str(error))

    def has_units(self, experiment: str) -> bool:
        """Has anybody come to take part?

        :raises StoreAway: if it can't be used.
        """
        self.open()
        table = schema.exposures.c
        asked = select(table.unit).where(table.experiment == experiment, table.forced.is_(False)).limit(1)
        with self.transaction(reads=True) as connection:
            return connection.execute(asked).first() is not None

    def put(self, verdict: Verdict, worker: str) -> bool:
        """Write it in place of the one before. False: this worker has not the lease any more.

        :raises StoreAway: if it can't be used.
        """
        self.open()
        values = {"plan": verdict.plan, "at": verdict.at, "cost": verdict.cost, "data": json.dumps(verdict.data)}
        made = self.insert(schema.verdicts).values(experiment=verdict.experiment, **values)
        with self.transaction() as connection:
            if not self.holds(connection, lease_of(verdict.experiment), worker, self.now_of(connection)):
                return False
            connection.execute(made.on_conflict_do_update(index_elements=[schema.verdicts.c.experiment], set_=values))
        return True


def _read(connection: Connection, known: Mapping[str, Verdict | None]) -> dict[str, Verdict]:
    table = schema.verdicts.c
    times = select(table.experiment, table.plan, table.at).where(table.experiment.in_(list(known)))
    found: dict[str, Verdict] = {}
    for name, plan, at in connection.execute(times).all():
        before = known[name]
        if before is not None and (before.plan, before.at) == (plan, at):
            found[name] = before
            continue
        row = connection.execute(select(schema.verdicts).where(table.experiment == name)).first()
        if row is not None:
            found[name] = _verdict(row)
    return found


def _verdict(row: Any) -> Verdict:  # Any: SQLAlchemy's
    return Verdict(row.experiment, row.plan, float(row.at), float(row.cost), json.loads(row.data))
