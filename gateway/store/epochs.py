"""Bandits in the store: epochs, of which each follows one before it and is never changed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, func, select

from gateway.experiments.epochs import Epoch, Epochs
from gateway.store import schema
from gateway.store.leases import LeaseStore
from gateway.store.rows import StoreReadOnly


@dataclass(frozen=True, slots=True)
class EpochsLook:
    """What the store said at one time."""

    now: float
    epochs: Mapping[str, Epochs]  # of each bandit that has any
    stopped: frozenset[str] = frozenset()  # experiments that have ended
    led: frozenset[str] = frozenset()  # bandits whose lease this worker has
    read_only: str = ""  # why no lease was asked for, if the store can only be read


class EpochStore(LeaseStore):
    """The same database, for bandits."""

    def look(self, worker: str, names: Collection[str], seconds: float) -> EpochsLook:
        """Read the epochs of these bandits, and ask for the lease of those that may have more of them.

        seconds: for which a lease is.
        :raises StoreAway: if it can't be used.
        """
        self.open()
        with self.transaction(reads=True) as connection:
            now, found = self.now_of(connection), _read(connection, names)
            stopped = frozenset(connection.execute(select(schema.stops.c.experiment)).scalars())
        led = sorted(
            name
            for name in names
            if name not in stopped and (name not in found or len(found[name].so_far) < found[name].slices)
        )
        if not led:
            return EpochsLook(now, found, stopped)
        try:
            with self.transaction() as connection:
                now = self.now_of(connection)
                held = frozenset(name for name in led if self.take_lease(connection, name, worker, now, seconds))
                return EpochsLook(now, found, stopped, held)
        except StoreReadOnly as error:
            return EpochsLook(now, found, stopped, read_only=str(error))

    def begin(self, name: str, epochs: Epochs, worker: str) -> bool:
        """Write the last of these epochs, which is in force then. False: another one has that number already, or this
        worker has not the lease any more.

        :raises StoreAway: if it can't be used.
        """
        self.open()
        number, epoch, table = len(epochs.so_far) - 1, epochs.so_far[-1], schema.epochs
        row = {
            "experiment": name,
            "number": number,
            "model": epochs.model,
            "baseline": epochs.baseline,
            "slices": epochs.slices,
            "since": epoch.since,
            "units": epoch.units,
            "shares": json.dumps(dict(epoch.shares)),
        }
        with self.transaction() as connection:
            if not self.holds(connection, name, worker, self.now_of(connection)):
                return False
            begun = connection.execute(select(func.count()).where(table.c.experiment == name)).scalar_one()
            if begun != number:
                return False
            made = self.insert(table).values(row).on_conflict_do_nothing()
            return bool(connection.execute(made, execution_options={"preserve_rowcount": True}).rowcount == 1)

    def epochs(self, names: Collection[str]) -> Mapping[str, Epochs]:
        """Of each of these bandits that has any.

        :raises StoreAway: if it can't be used.
        """
        self.open()
        with self.transaction(reads=True) as connection:
            return _read(connection, names)


def _read(connection: Connection, names: Collection[str]) -> dict[str, Epochs]:
    table = schema.epochs
    asked = select(table).where(table.c.experiment.in_(list(names))).order_by(table.c.experiment, table.c.number)
    found: dict[str, Epochs] = {}
    for row in connection.execute(asked):
        known = found.get(row.experiment) or Epochs(row.model, row.baseline, int(row.slices))
        found[row.experiment] = replace(known, so_far=(*known.so_far, _epoch(row)))
    return found


def _epoch(row: Any) -> Epoch:  # Any: SQLAlchemy's
    shares = {str(arm): float(share) for arm, share in json.loads(row.shares).items()}
    return Epoch(shares, float(row.since), int(row.units))
