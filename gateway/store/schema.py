"""The tables of the store, and the steps from each version of them to the next. The same for SQLite and PostgreSQL.

A version is never changed once it was released; a change is a further step. Steps only add, so that a gateway of the
version before goes on working beside one that has taken the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Index,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    insert,
    inspect,
    select,
    text,
    update,
)

HASH: Final = 32  # characters of the hash of a unit, a request or a report: 128 bits
NAME: Final = 64  # characters of a name of the config
MODEL: Final = 200  # characters of the name of a public model
REASON: Final = 1000  # characters of why something was decided

metadata: Final = MetaData()

version: Final = Table("store_version", metadata, Column("number", BigInteger, nullable=False))

secrets: Final = Table(
    "store_secret",
    metadata,
    Column("name", String(NAME), primary_key=True),
    Column("value", String(200), nullable=False),
)

exposures: Final = Table(
    "exposure",
    metadata,
    Column("experiment", String(NAME), nullable=False),
    Column("unit", String(HASH), nullable=False),
    Column("arm", String(NAME), nullable=False),
    Column("forced", Boolean, nullable=False),
    Column("at", Double, nullable=False),  # Unix time, as all times here
    Column("epoch", BigInteger),  # of a bandit, from 0 on …
    Column("propensity", Double),  # … and the probability with which the unit got this arm
    PrimaryKeyConstraint("experiment", "unit", "arm", "forced"),
)
Index("exposure_at", exposures.c.at)

requests: Final = Table(
    "request",
    metadata,
    Column("request", String(HASH), primary_key=True),
    Column("unit", String(HASH), nullable=False),
    Column("at", Double, nullable=False),
)
Index("request_at", requests.c.at)

outcomes: Final = Table(
    "outcome",
    metadata,
    Column("report", String(HASH), primary_key=True),
    Column("experiment", String(NAME), nullable=False),  # "" for all
    Column("name", String(NAME), nullable=False),
    Column("unit", String(HASH), nullable=False),  # "" if a request says whose it is
    Column("request", String(HASH), nullable=False),
    Column("value", Double, nullable=False),
    Column("times", BigInteger, nullable=False),
    Column("at", Double, nullable=False),
)
Index("outcome_at", outcomes.c.at)
Index("outcome_name", outcomes.c.name, outcomes.c.experiment)

stops: Final = Table(
    "stop",
    metadata,
    Column("experiment", String(NAME), primary_key=True),
    Column("arm", String(NAME), nullable=False),  # that everybody gets
    Column("at", Double, nullable=False),
)


decisions: Final = Table(
    "rollout_decision",  # all of them; the last one of a rollout is in force
    metadata,
    Column("rollout", String(NAME), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("model", String(MODEL), nullable=False),
    Column("before", String(NAME), nullable=False),
    Column("after", String(NAME), nullable=False),
    Column("phase", String(NAME), nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("share", Double, nullable=False),
    Column("since", Double, nullable=False),
    Column("at", Double, nullable=False),
    Column("reason", String(REASON), nullable=False),
    PrimaryKeyConstraint("rollout", "version"),
)

leases: Final = Table(
    "rollout_lease",
    metadata,
    Column("rollout", String(NAME), primary_key=True),  # or a bandit; of an experiment's verdict `verdicts.lease_of`
    Column("holder", String(NAME), nullable=False),
    Column("until", Double, nullable=False),
)

calls: Final = Table(
    "rollout_calls",  # how calls of a variant have ended at one worker, since it started
    metadata,
    Column("rollout", String(NAME), nullable=False),
    Column("worker", String(NAME), nullable=False),
    Column("variant", String(NAME), nullable=False),
    Column("good", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),
    Column("unanswered", BigInteger, nullable=False),
    Column("finite", BigInteger, nullable=False),  # answers that were looked at, without NaN and infinity
    Column("not_finite", BigInteger, nullable=False),  # with them
    Column("at", Double, nullable=False),
    PrimaryKeyConstraint("rollout", "worker", "variant"),
)

crowds: Final = Table(
    "rollout_crowd",  # the same counts, with what has come to them since, and by whose the calls were
    metadata,
    Column("rollout", String(NAME), nullable=False),
    Column("worker", String(NAME), nullable=False),
    Column("variant", String(NAME), nullable=False),
    Column("counts", Text, nullable=False),  # JSON
    Column("at", Double, nullable=False),
    PrimaryKeyConstraint("rollout", "worker", "variant"),
)

parities: Final = Table(
    "parity",  # how copies of requests at a shadow have compared at one worker lately
    metadata,
    Column("worker", String(NAME), nullable=False),
    Column("gate", String(HASH), nullable=False),
    Column("compared", BigInteger, nullable=False),
    Column("agreed", BigInteger, nullable=False),
    Column("at", Double, nullable=False),
    PrimaryKeyConstraint("worker", "gate"),
)

epochs: Final = Table(
    "bandit_epoch",  # what units of an epoch are shared out by; never changed
    metadata,
    Column("experiment", String(NAME), nullable=False),
    Column("number", BigInteger, nullable=False),  # from 0 on
    Column("model", String(MODEL), nullable=False),
    Column("baseline", String(NAME), nullable=False),
    Column("slices", BigInteger, nullable=False),
    Column("since", Double, nullable=False),
    Column("units", BigInteger, nullable=False),  # whose rewards were known then
    Column("shares", Text, nullable=False),  # JSON: by arm
    PrimaryKeyConstraint("experiment", "number"),
)

measured: Final = Table(
    "measured",  # what the gateway measured of calls of many units in some seconds; `store.measured` reads the bytes
    metadata,
    Column("report", String(HASH), primary_key=True),
    Column("experiment", String(NAME), nullable=False),
    Column("at", Double, nullable=False),
    Column("data", LargeBinary, nullable=False),
)
Index("measured_at", measured.c.at)
Index("measured_experiment", measured.c.experiment)


verdicts: Final = Table(
    "verdict",  # what an experiment says so far, the latest alone; found anew whenever it is due
    metadata,
    Column("experiment", String(NAME), primary_key=True),
    Column("plan", String(HASH), nullable=False),  # of which plan it is
    Column("at", Double, nullable=False),
    Column("cost", Double, nullable=False),  # seconds of CPU time
    Column("data", Text, nullable=False),  # JSON
)

starts: Final = Table(
    "experiment_start",  # when the first unit came, which is known also when its exposure is too old to be kept
    metadata,
    Column("experiment", String(NAME), primary_key=True),
    Column("at", Double, nullable=False),
)


def _first(connection: Connection) -> None:
    metadata.create_all(connection, tables=[secrets, exposures, requests, outcomes, stops])


def _rollouts(connection: Connection) -> None:
    metadata.create_all(connection, tables=[decisions, leases, calls])


def _parity(connection: Connection) -> None:
    metadata.create_all(connection, tables=[parities])


def _bandits(connection: Connection) -> None:
    metadata.create_all(connection, tables=[epochs])
    there = {column["name"] for column in inspect(connection).get_columns(exposures.name)}
    for column in (exposures.c.epoch, exposures.c.propensity):  # a new store has them from the first step on
        if column.name not in there:
            kind = column.type.compile(connection.dialect)
            connection.execute(text(f"ALTER TABLE {exposures.name} ADD COLUMN {column.name} {kind}"))


def _crowds(connection: Connection) -> None:
    metadata.create_all(connection, tables=[crowds])


def _measured(connection: Connection) -> None:
    metadata.create_all(connection, tables=[measured])


def _verdicts(connection: Connection) -> None:
    metadata.create_all(connection, tables=[verdicts])


def _starts(connection: Connection) -> None:
    metadata.create_all(connection, tables=[starts])


STEPS: Final[Sequence[Callable[[Connection], None]]] = (
    _first,
    _rollouts,
    _parity,
    _bandits,
    _crowds,
    _measured,
    _verdicts,
    _starts,
)
"""The n-th takes a store of version n to version n + 1."""

_LOCK: Final = 0x67617465  # of PostgreSQL, "gate": one at a time takes steps


def version_of(connection: Connection) -> int:
    """0 for what is no store yet."""
    if not inspect(connection).has_table(version.name):
        return 0
    return int(connection.execute(select(version.c.number)).scalar() or 0)


def migrate(connection: Connection) -> int:
    """Take all steps that this store has not taken, in the transaction of this connection. Returns its version.

    A store of a later version is left as it is, since its steps have only added to what is known here.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    version.create(connection, checkfirst=True)
    found = connection.execute(select(version.c.number)).scalar()
    if found is None:
        connection.execute(insert(version).values(number=0))
    at = found or 0
    for step in STEPS[at:]:
        step(connection)
        at += 1
        connection.execute(update(version).values(number=at))
    return at
