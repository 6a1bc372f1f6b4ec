"""One database: opened, brought up to date, written to in batches and read. All calls wait for it: on a thread."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice
from pathlib import Path
from sqlite3 import OperationalError
from time import monotonic, sleep
from typing import Any, Final

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    case,
    create_engine,
    delete,
    event,
    func,
    make_url,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
    SQLAlchemyError,
)

from gateway.bounded import make_room
from gateway.experiments.records import Exposure, Outcome
from gateway.store import schema
from gateway.store.measured import UNITS, decoded, encoded
from gateway.store.rows import (
    ExposureRow,
    MeasuredRow,
    OutcomeRow,
    RequestRow,
    Row,
    Stop,
    StoreAway,
    StoreFailed,
    StoreReadOnly,
)

_CONNECT_SECONDS: Final = 3
_STATEMENT_SECONDS: Final = 10
_PURGED: Final = 10_000  # rows that one statement deletes, so that others need not wait long
_NOT_READY: Final = ("42501", "42P01", "3F000")  # SQLSTATE: no right, no table, no schema
_READ_ONLY: Final = ("42501", "25006")  # of who writes: no right, a transaction that only reads, as of a standby
_WRITES_NOT: Final = "readonly database"  # as SQLite says it
_LOCKED: Final = "database is locked"  # likewise
_SQLITE_WAITS_SECONDS: Final = 5.0  # for a file that others write
_SQLITE_PAUSE_SECONDS: Final = 0.01
_UNITS_KEPT: Final = 20_000  # whose hash is remembered: most of what is written of a unit comes at once
_LONGEST: Final = 100  # characters of one that is
_READ: Final = 10_000  # rows that are fetched at once
_READ_BLOCKS: Final = 20  # likewise, of some 100 KB


class Store:
    """Opened at its first use, and anew after it was away."""

    def __init__(self, url: str, unit_key: str | None = None) -> None:
        """unit_key: for the hash of units and requests; without it the store has one.

        :raises StoreAway: if there is no driver for such a URL.
        """
        self._engine = _engine(url)
        self._key = None if unit_key is None else unit_key.encode()
        self._is_open = False
        self._units: dict[str, str] = {}  # by what callers said; for as long as the key is the same
        self.name = _shown(self._engine.url)
        insert: Any = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        self.insert = insert

    def close(self) -> None:
        self._engine.dispose()
        self._is_open = False

    @contextmanager
    def transaction(self, *, reads: bool = False) -> Iterator[Connection]:
        """:raises StoreAway: if it can't be used; StoreReadOnly: to be written. StoreFailed: if it refuses what is."""
        try:
            with self._engine.connect().execution_options(reads=reads) as connection, connection.begin():
                yield connection
        except SQLAlchemyError as error:
            if _is_of_the_rows(error):
                raise StoreFailed(_reason(error)) from error
            if not reads and _is_read_only(error):
                raise StoreReadOnly(f"it can only be read here: {_reason(error)}") from error
            self._is_open = False
            self._engine.dispose()
            raise StoreAway(_reason(error)) from error

    def open(self) -> None:
        """Take the steps to this version, unless that is done, and know the key. What can only be read is opened so.

        :raises StoreAway: if it can't be used.
        """
        if self._is_open:
            return
        try:
            with self.transaction() as connection:
                schema.migrate(connection)
                if self._key is None:
                    self._key = self._own_key(connection)
        except StoreReadOnly as error:
            with self.transaction(reads=True) as connection:
                self._read_only(connection, str(error))
        self._is_open = True

    def _read_only(self, connection: Connection, why: str) -> None:
        """:raises StoreAway: if what only who writes could make is not there."""
        known = len(schema.STEPS)
        version = schema.version_of(connection)
        if version < known:
            raise StoreAway(f"its tables are of version {version}, and {known} is needed; {why}")
        if self._key is None:
            self._key = self._found_key(connection)

    def _own_key(self, connection: Connection) -> bytes:
        """The key that is kept in the store, made by whoever comes first."""
        made = self.insert(schema.secrets).values(name="unit_key", value=secrets.token_hex(32))
        connection.execute(made.on_conflict_do_nothing())
        return self._found_key(connection)

    @staticmethod
    def _found_key(connection: Connection) -> bytes:
        found = select(schema.secrets.c.value).where(schema.secrets.c.name == "unit_key")
        return str(connection.execute(found).scalar_one()).encode()

    # Writing

    def hashed(self, kind: str, text: str) -> str:
        """A unit, a request or a report as the store knows it. "" stays so.

        Other people's texts never go to the database: it learns nobody's id, and is given nothing that it can't hold.
        """
        if not text:
            return ""
        assert self._key is not None  # noqa: S101  (it is open)
        message = f"{kind}\0{text}".encode("utf-8", "surrogatepass")
        return hmac.digest(self._key, message, sha256).hex()[: schema.HASH]

    def _unit(self, text: str) -> str:
        """Of units, which come several times."""
        if len(text) > _LONGEST:
            return self.hashed("unit", text)
        known = self._units.get(text)
        if known is None:
            make_room(self._units, _UNITS_KEPT)
            known = self._units[text] = self.hashed("unit", text)
        return known

    def write(self, rows: Sequence[Row]) -> int:
        """Write a batch, all or nothing. Returns how many reports were known already.

        :raises StoreAway: if it can't be used.
        :raises StoreFailed: if it refuses what is in the batch.
        """
        self.open()
        exposed: dict[tuple[str, str, str, bool], dict[str, Any]] = {}
        asked: dict[str, dict[str, Any]] = {}
        reported: dict[str, dict[str, Any]] = {}
        measured: list[dict[str, Any]] = []
        reports = 0
        for row in rows:
            if isinstance(row, ExposureRow):
                key = (row.experiment, self._unit(row.unit), row.arm, row.is_forced)
                known = exposed.get(key)
                if known is None or row.at < known["at"]:
                    exposed[key] = {"at": row.at, "epoch": row.epoch, "propensity": row.propensity}
            elif isinstance(row, RequestRow):
                request = self.hashed("request", row.request_id)
                asked.setdefault(request, {"request": request, "unit": self._unit(row.unit), "at": row.at})
            elif isinstance(row, MeasuredRow):
                measured += self._blocks(row)
            else:
                reports += 1
                values = self._values(row)
                reported.setdefault(values["report"], values)
        # Sorted, so that two writers never wait for each other.
        with self.transaction() as connection:
            if exposed:
                names = ("experiment", "unit", "arm", "forced")
                values_of = [dict(zip(names, key, strict=True), **exposed[key]) for key in sorted(exposed)]
                connection.execute(self._earliest(), values_of)
                first: dict[str, float] = {}
                for met in values_of:
                    first[met["experiment"]] = min(met["at"], first.get(met["experiment"], met["at"]))
                started = [{"experiment": name, "at": first[name]} for name in sorted(first)]
                connection.execute(self.insert(schema.starts).on_conflict_do_nothing(), started)
            if asked:
                each = [asked[key] for key in sorted(asked)]
                connection.execute(self.insert(schema.requests).on_conflict_do_nothing(), each)
            if measured:
                connection.execute(self.insert(schema.measured).on_conflict_do_nothing(), measured)
            if not reported:
                return 0
            each = [reported[key] for key in sorted(reported)]
            made = self.insert(schema.outcomes).on_conflict_do_nothing()
            # RETURNING would tell of each that is new, at three times the CPU time with psycopg.
            written = connection.execute(made, each, execution_options={"preserve_rowcount": True})
            return reports - written.rowcount

    def _values(self, row: OutcomeRow) -> dict[str, Any]:
        return {
            "report": self.hashed("report", f"{row.name} {row.report_id}"),
            "experiment": row.experiment,
            "name": row.name,
            "unit": self._unit(row.unit),
            "request": self.hashed("request", row.request_id),
            "value": row.value,
            "times": 1,  # more in rows of the version before, which wrote here what the gateway had measured
            "at": row.at,
        }

    def _blocks(self, row: MeasuredRow) -> Iterator[dict[str, Any]]:
        """Rows of the store, the same each time."""
        found = iter(row.tallies.items())
        for block in range(-(-len(row.tallies) // UNITS)):
            part = [(self._unit(unit), tally) for unit, tally in islice(found, UNITS)]
            report = f"{row.writer}{row.number:011x}{block:05x}"
            data = encoded(row.outcomes, part)
            yield {"report": report, "experiment": row.experiment, "at": row.at, "data": data}

    def _earliest(self) -> Any:  # Any: an insert of either dialect
        statement = self.insert(schema.exposures)
        table, new = schema.exposures.c, statement.excluded
        return statement.on_conflict_do_update(
            index_elements=[table.experiment, table.unit, table.arm, table.forced],
            set_={"at": case((new.at < table.at, new.at), else_=table.at)},
        )

    def stop(self, stop: Stop) -> None:
        """Record that an experiment has ended. A later stop names another arm; the end stays when it was.

        :raises StoreAway: if it can't be used.
        """
        self.open()
        made = self.insert(schema.stops).values(experiment=stop.experiment, arm=stop.arm, at=stop.at)
        with self.transaction() as connection:
            connection.execute(
                made.on_conflict_do_update(index_elements=[schema.stops.c.experiment], set_={"arm": stop.arm})
            )

    def exchange_parity(
        self, worker: str, counts: Mapping[str, tuple[int, int]], now: float, since: float
    ) -> dict[str, tuple[int, int]]:
        """Say how copies have compared here, by gate, and learn how they have at all other workers together.

        since: what others said before that does not count, as they may be gone.
        :raises StoreAway: if it can't be used.
        """
        self.open()
        table = schema.parities.c
        made = self.insert(schema.parities)
        new = {name: made.excluded[name] for name in ("compared", "agreed", "at")}
        upsert = made.on_conflict_do_update(index_elements=[table.worker, table.gate], set_=new)
        rows = [
            {"worker": worker, "gate": gate, "compared": compared, "agreed": agreed, "at": now}
            for gate, (compared, agreed) in sorted(counts.items())
        ]
        asked = (
            select(table.gate, func.sum(table.compared), func.sum(table.agreed))
            .where(table.gate.in_(list(counts)), table.worker != worker, table.at >= since)
            .group_by(table.gate)
        )
        with self.transaction() as connection:
            connection.execute(upsert, rows)
            return {gate: (int(compared), int(agreed)) for gate, compared, agreed in connection.execute(asked)}

    def purge(self, before: float) -> int:
        """Delete some of what is from before that time. Returns how many rows; 0 once there are none.

        :raises StoreAway: if it can't be used.
        """
        self.open()
        deleted = 0
        kept = (schema.outcomes, schema.measured, schema.requests, schema.exposures, schema.parities, schema.verdicts)
        for table in kept:
            with self.transaction() as connection:
                # By time and not by key: of one moment all or none go, and some thousands of moments at once.
                border = connection.execute(
                    select(table.c.at).where(table.c.at < before).order_by(table.c.at).offset(_PURGED).limit(1)
                ).scalar()
                found = connection.execute(delete(table).where(table.c.at < (before if border is None else border)))
                deleted += found.rowcount
        return deleted

    # Reading

    def stops(self) -> Mapping[str, Stop]:
        """By experiment.

        :raises StoreAway: if it can't be used.
        """
        self.open()
        with self.transaction(reads=True) as connection:
            found = connection.execute(select(schema.stops.c.experiment, schema.stops.c.arm, schema.stops.c.at))
            return {row.experiment: Stop(row.experiment, row.arm, row.at) for row in found}

    def arms(self, experiment: str) -> dict[str, int]:
        """How many units were seen in each arm, without those that a rule sent there.

        :raises StoreAway: if it can't be used.
        """
        self.open()
        table = schema.exposures.c
        asked = (
            select(table.arm, func.count())
            .where(table.experiment == experiment, table.forced.is_(False))
            .group_by(table.arm)
        )
        with self.transaction(reads=True) as connection:
            return {arm: int(count) for arm, count in connection.execute(asked)}

    def arms_by_epoch(self, experiment: str) -> dict[int, dict[str, int]]:
        """The same of a bandit, by the number of the epoch.

        :raises StoreAway: if it can't be used.
        """
        self.open()
        table = schema.exposures.c
        asked = (
            select(table.epoch, table.arm, func.count())
            .where(table.experiment == experiment, table.forced.is_(False), table.epoch.is_not(None))
            .group_by(table.epoch, table.arm)
        )
        found: dict[int, dict[str, int]] = {}
        with self.transaction(reads=True) as connection:
            for epoch, arm, count in connection.execute(asked):
                found.setdefault(int(epoch), {})[arm] = int(count)
        return found

    def maybe_start(self, experiment: str) -> float | None:
        """When the first unit came, whose exposure may be too old to be kept; None if nobody has.

        :raises StoreAway: if it can't be used.
        """
        self.open()
        asked = select(schema.starts.c.at).where(schema.starts.c.experiment == experiment)
        with self.transaction(reads=True) as connection:
            found = connection.execute(asked).scalar()
            return None if found is None else float(found)

    def exposures(self, experiment: str) -> list[Exposure]:
        """:raises StoreAway: if it can't be used."""
        self.open()
        table = schema.exposures.c
        columns = (table.arm, table.unit, table.at, table.forced, table.epoch, table.propensity)
        asked = select(*columns).where(table.experiment == experiment)
        with self.transaction(reads=True) as connection:
            found = connection.execution_options(yield_per=_READ).execute(asked.order_by(table.at, table.unit))
            return [
                Exposure(arm, unit, at, bool(forced), "", epoch, propensity)
                for arm, unit, at, forced, epoch, propensity in found
            ]

    def outcomes(self, experiment: str, measured: Mapping[str, bool]) -> Iterator[Outcome]:
        """What is known of units, of this experiment or any. A report about a request is about its unit.

        experiment: or a step of a rollout, `NAME/STEP`, whose reports may name it without the step.
        measured: the outcomes that count, and whether the gateway measures them; then they are of one experiment.
        :raises StoreAway: if it can't be used.
        """
        self.open()
        table, request = schema.outcomes.c, schema.requests.c
        unit = case((table.unit != "", table.unit), else_=func.coalesce(request.unit, ""))
        asked = (
            select(table.experiment, table.name, table.value, table.at, unit, table.report, table.times)
            .select_from(schema.outcomes.outerjoin(schema.requests, table.request == request.request))
            .where(table.name.in_(list(measured)), table.experiment.in_(["", experiment, experiment.partition("/")[0]]))
        )
        block = schema.measured.c
        blocks = select(block.at, block.data).where(block.experiment == experiment)
        with self.transaction(reads=True) as connection:
            found = connection.execution_options(yield_per=_READ).execute(asked)
            for of, name, value, at, whose, report, times in found:
                if of or not measured[name]:
                    yield Outcome(name, value, at, whose, "", report if times == 1 else "", times)
            if not any(measured.values()):
                return
            for at, data in connection.execution_options(yield_per=_READ_BLOCKS).execute(blocks):
                for whose, name, value, calls in decoded(data):
                    if measured.get(name):
                        yield Outcome(name, value, at, whose, times=calls)


def why_not_there(url: str) -> str:
    """Why a command must not open such a store: its file is not there, and what is written to a new one nobody reads.
    "" if it may, or if that can't be told."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return ""
    name = parsed.database or ""
    if parsed.get_backend_name() != "sqlite" or name in {"", ":memory:"} or name.startswith("file:"):
        return ""
    path = Path(name)
    if path.exists():
        return ""
    return f"there is no store at {path.absolute()}: no gateway has made it yet, or it is in another working directory"


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
            options = f"-c statement_timeout={_STATEMENT_SECONDS * 1000} -c lock_timeout={_STATEMENT_SECONDS * 1000}"
            arguments = {
                "connect_timeout": _CONNECT_SECONDS,
                "options": options,
                "tcp_user_timeout": _STATEMENT_SECONDS * 1000,  # so that a host that has vanished is noticed
                "application_name": "inference-gateway",
            }
            return create_engine(parsed, pool_size=1, max_overflow=1, connect_args=arguments, hide_parameters=True)
        engine = create_engine(parsed, connect_args={"timeout": _SQLITE_WAITS_SECONDS}, hide_parameters=True)
    except ModuleNotFoundError as error:
        raise StoreAway("needs psycopg: pip install 'inference-gateway[postgresql]'") from error
    except (ArgumentError, NoSuchModuleError) as error:
        raise StoreAway(f"its URL can't be used: {type(error).__name__}") from error
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: object) -> None:  # Any: sqlite3's
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says
    connection.execute("PRAGMA synchronous=NORMAL")
    last = monotonic() + _SQLITE_WAITS_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except OperationalError as error:
            if _WRITES_NOT in str(error):
                return  # a copy that can only be read, such as one of `VACUUM INTO`, is read as it is
            # SQLite waits for no lock here, so of several who open a new file at once some are told that it is locked.
            if _LOCKED not in str(error) or monotonic() > last:
                raise
        sleep(_SQLITE_PAUSE_SECONDS)


def _begin_sqlite(connection: Connection) -> None:
    # At once for writing: a transaction that reads first, and finds that another one has written, could only fail.
    reads = connection.get_execution_options().get("reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _is_of_the_rows(error: SQLAlchemyError) -> bool:
    """Would a database that is well refuse these rows too? What lacks rights or tables may have them later."""
    if isinstance(error, ProgrammingError):
        return getattr(error.orig, "sqlstate", None) not in _NOT_READY
    return isinstance(error, DataError | IntegrityError)


def _is_read_only(error: SQLAlchemyError) -> bool:
    cause = getattr(error, "orig", None)
    return getattr(cause, "sqlstate", None) in _READ_ONLY or _WRITES_NOT in str(cause)


def _shown(url: URL) -> str:
    """For people, without secrets."""
    if url.get_backend_name() == "sqlite":
        return f"sqlite {url.database}"
    return f"postgresql {url.host or 'local'}/{url.database}"


def _reason(error: SQLAlchemyError) -> str:
    """The driver's first line, without the statement."""
    text = str(getattr(error, "orig", None) or error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'no reason given'}"
