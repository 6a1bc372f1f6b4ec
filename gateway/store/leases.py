"""Who decides: the lease of a rollout or a bandit, which one worker has at a time.

`now` is the database's own, so that replicas with clocks of their own agree on soak times, epochs and leases.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete, literal_column, select

from gateway.store import schema
from gateway.store.database import Store


class LeaseStore(Store):
    """The same database, for those of whom one decides. Each has a name of its own."""

    def now(self) -> float:
        """The database's Unix time.

        :raises StoreAway: if it can't be used.
        """
        self.open()
        with self.transaction(reads=True) as connection:
            return self.now_of(connection)

    def release(self, worker: str) -> None:
        """Give back the leases of a worker that ends.

        :raises StoreAway: if it can't be used.
        """
        self.open()
        with self.transaction() as connection:
            connection.execute(delete(schema.leases).where(schema.leases.c.holder == worker))

    def now_of(self, connection: Connection) -> float:
        """Unix time."""
        is_sqlite = connection.dialect.name == "sqlite"
        text = "(julianday('now') - 2440587.5) * 86400.0" if is_sqlite else "extract(epoch from clock_timestamp())"
        return float(connection.execute(select(literal_column(text))).scalar_one())

    def take_lease(self, connection: Connection, name: str, worker: str, now: float, seconds: float) -> bool:
        """Take or keep a lease, unless another worker has it. Returns whether this worker has it now.

        now:     the database's Unix time.
        seconds: for which the lease is.

        A lease that ends later than any that is taken now is from before the clock was put back, and does not count.
        """
        table = schema.leases.c
        until = now + seconds
        made = self.insert(schema.leases).values(rollout=name, holder=worker, until=until)
        connection.execute(
            made.on_conflict_do_update(
                index_elements=[table.rollout],
                set_={"holder": worker, "until": until},
                where=(table.holder == worker) | (table.until < now) | (table.until > now + 2.0 * seconds),
            )
        )
        return self.holds(connection, name, worker, now)

    @staticmethod
    def holds(connection: Connection, name: str, worker: str, now: float) -> bool:
        """Does this worker have the lease?"""
        table = schema.leases.c
        found = select(table.holder).where(table.rollout == name, table.until > now)
        return bool(connection.execute(found).scalar() == worker)
