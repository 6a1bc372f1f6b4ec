"""`inference-gateway experiment analyse`: exposures and outcomes from files, and the verdict in words or as JSON.

CSV with a header, or Parquet, by the ending of the file's name. Columns that nobody knows are left alone.

exposures: `unit`, `arm`, `at`; optional `experiment`, `forced`, `request_id`. Of arms whose shares changed on the way,
           such as a bandit's, `propensity`, or with more than two arms `propensity_ARM` for each of them.
outcomes:  `name`, `value`, `at`, and `unit` or `request_id`; optional `experiment`, `report_id`.
Times are ISO 8601 (UTC where they name no zone) or seconds since 1970.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from gateway.config.experiment_file import load_experiments
from gateway.config.findings import known, show
from gateway.errors import CommandFailed, Misused
from gateway.experiments.epochs import Epoch
from gateway.experiments.plan import Kind, Plan
from gateway.experiments.records import Exposure, Outcome

_MOST_FAULTS = 20  # that are told of one file
_SHORTEST_MILLISECONDS = 100_000_000_000  # seconds of the year 5138: a larger number was meant in milliseconds
_CLOCK_SKEW = 300.0  # seconds that a record may be ahead of this machine's clock
_HOUR = 3600.0
_TRUE = {
    "1": True,
    "true": True,
    "yes": True,
    "t": True,
    "0": False,
    "false": False,
    "no": False,
    "f": False,
    "": False,
}
_ROUNDED = 1e-3  # by which the sum of propensities may differ from 1
_DIGITS = 6  # of a propensity
_DECIMAL = re.compile(r"\.(\d+)")

Row = Mapping[str, Any]
"""One row by column: texts from CSV, values of several types from Parquet."""


class BadFile(Misused):
    """A file of records that cannot be used; the text says where and why."""


class _Fault(Exception):
    """What is wrong with one row."""


def plan_of(config: str, name: str | None) -> Plan:
    """The experiment of this name in the file, or the only one.

    :raises ConfigError: with the findings of the file.
    :raises BadFile: if it has not that one, or none, or several and no name was given.
    """
    plans = load_experiments(config, os.environ)
    if name is None:
        if len(plans) > 1:
            raise BadFile(f"{config}: has several experiments; name one by --name: {', '.join(plans)}")
        if not plans:
            raise BadFile(f"{config}: has no experiments")
        return next(iter(plans.values()))
    if name not in plans:
        raise BadFile(f"{config}: no experiment '{name}'; {known(tuple(plans), name)}")
    return plans[name]


def analyse(plan: Plan, exposures: str, outcomes: str, *, each: int | None, as_json: bool, now: float) -> Iterator[str]:
    """Lines to print: the report at each look if that is asked for, and at the end.

    now: Unix time; records from after it are faults.

    :raises BadFile: if a file cannot be used.
    :raises CommandFailed: if SciPy is missing.
    """
    if importlib.util.find_spec("scipy") is None:
        raise CommandFailed("needs SciPy for its statistics: pip install 'inference-gateway[experiments]'")
    from gateway.experiments.analysis.experiment import analysed, looks  # noqa: PLC0415
    from gateway.experiments.units import join  # noqa: PLC0415

    epochs = _FileEpochs()
    met, told = read_exposures(plan, exposures, now, epochs), read_outcomes(plan, outcomes, now)
    if _are_rounded(told) and not _are_rounded(met):
        raise BadFile(
            f"{outcomes}: 'at' are whole days or hours, and those of {exposures} are not, so what became of a unit on "
            "its first day would count as its past; say when in both, or round both"
        )
    units = join(plan, met, told, epochs.in_order())
    if not units.at.size:
        account = units.account
        raise BadFile(f"{exposures}: no unit counts: {_excluded(account.forced_units, account.units_in_two_arms)}")
    reports = looks(plan, units, each) if each is not None else iter(())
    if as_json:
        shown = [report.as_json() for report in reports] if each is not None else None
        yield json.dumps(analysed(plan, units).as_json() | ({} if shown is None else {"looks": shown}), indent=2)
        return
    for report in reports:
        first = report.primary[0]
        yield (
            f"{report.units:>8} units  {report.answer.value:10} {first.difference:+.4g} "
            f"[{first.low:+.4g}, {first.high:+.4g}]  p = {first.p_value:.2g}"
        )
    yield from analysed(plan, units).lines()


def _are_rounded(records: Sequence[Exposure] | Sequence[Outcome]) -> bool:
    """Have they days or hours in place of times? A day begins at a full hour of UTC in nearly all time zones."""
    return bool(records) and all(each.at % _HOUR == 0.0 for each in records)


def _excluded(forced: int, two: int) -> str:
    return f"{forced} were forced into an arm, {two} were seen in two arms" if forced or two else "there is none"


class _FileEpochs:
    """The propensities that a file has, as epochs: each in the order of its first row."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[tuple[str, float], ...], int] = {}
        self._since: list[float] = []

    def number(self, shares: Mapping[str, float], at: float) -> int:
        key = tuple(shares.items())
        number = self._numbers.setdefault(key, len(self._numbers))
        if number == len(self._since):
            self._since.append(at)
        self._since[number] = min(self._since[number], at)
        return number

    def in_order(self) -> list[Epoch]:
        return [Epoch(dict(shares), since) for shares, since in zip(self._numbers, self._since, strict=True)]


def _propensities(plan: Plan, row: Row, arm: str) -> Mapping[str, float] | None:
    """The probabilities with which the unit was to get each arm; None if the file does not have them."""
    arms = plan.order
    if all(f"propensity_{each}" in row for each in arms):
        found = {each: _probability(row, f"propensity_{each}") for each in arms}
        if abs(sum(found.values()) - 1.0) > _ROUNDED:
            raise _Fault(f"the propensities have the sum {sum(found.values()):.6g}; 1")
        return found
    if "propensity" not in row:
        return None
    own = _probability(row, "propensity")
    if len(arms) > 2:
        raise _Fault(f"'propensity' is not enough for {len(arms)} arms; {_column(plan)}")
    # Rounded, so that both arms of an epoch are known to be of it: 1 - 0.7 is not 0.3.
    return {each: round(own if each == arm else 1.0 - own, _DIGITS) for each in arms}


def _probability(row: Row, column: str) -> float:
    try:
        value = _number(row[column])
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0.0 < value < 1.0:
        raise _Fault(f"'{column}' is {show(row[column])}; a probability above 0 and below 1")
    return round(value, _DIGITS)


def read_exposures(plan: Plan, file: str, now: float, epochs: _FileEpochs | None = None) -> list[Exposure]:
    """The exposures of this experiment. epochs: to be filled with what the file has of them.

    :raises BadFile: with the lines that cannot be used.
    """
    arms, known_epochs = plan.order, _FileEpochs() if epochs is None else epochs

    def parse(row: Row) -> Exposure:
        arm = _text(row, "arm")
        if arm not in plan.shares:
            raise _Fault(f"arm {show(arm)} is not in the plan; {known(arms, arm)}")
        unit = _text(row, "unit")
        if not unit:
            raise _Fault("'unit' is empty")
        forced = _text(row, "forced").lower()
        if forced not in _TRUE:
            raise _Fault(f"'forced' is {show(row['forced'])}; true or false")
        at, request = _time(row, now), _text(row, "request_id")
        shares = None if _TRUE[forced] else _propensities(plan, row, arm)
        if shares is not None:
            return Exposure(arm, unit, at, False, request, known_epochs.number(shares, at), shares[arm])
        if plan.bandit is not None and not _TRUE[forced]:
            raise BadFile(f"{file}: has no column {_column(plan)}, without which a bandit's units can't be weighed")
        return Exposure(arm, unit, at, _TRUE[forced], request)

    return _records(plan, file, ("unit", "arm", "at"), parse)


def _column(plan: Plan) -> str:
    """What tells the propensities of a plan's arms."""
    return "'propensity'" if len(plan.order) == 2 else ", ".join(f"'propensity_{arm}'" for arm in plan.order)


def read_outcomes(plan: Plan, file: str, now: float) -> list[Outcome]:
    """The reports of this experiment.

    :raises BadFile: with the lines that cannot be used.
    """
    kinds = {each.name: each.kind for each in plan.outcomes}

    def parse(row: Row) -> Outcome:
        name, unit, request = _text(row, "name"), _text(row, "unit"), _text(row, "request_id")
        if not name:
            raise _Fault("'name' is empty")
        if not unit and not request:
            raise _Fault("has neither 'unit' nor 'request_id'")
        value = _value(row)
        kind = kinds.get(name)
        if kind is Kind.BINARY and value not in (0.0, 1.0):
            raise _Fault(f"'value' is {show(row['value'])}; 0 or 1, since '{name}' is binary")
        if kind is Kind.DURATION and value < 0.0:
            raise _Fault(f"'value' is {show(row['value'])}; not negative, since '{name}' is a duration in seconds")
        return Outcome(name, value, _time(row, now), unit, request, _text(row, "report_id"))

    return _records(plan, file, ("name", "value", "at"), parse)


def _records(plan: Plan, file: str, needed: Sequence[str], parse: Callable[[Row], Any]) -> list[Any]:  # Any: a record
    """What the rows of this experiment say; all faults at once."""
    records, faults = [], []
    for where, row in _rows(file, needed):
        try:
            if _text(row, "experiment") in ("", plan.name):
                records.append(parse(row))
        except _Fault as fault:
            faults.append(f"{where}: {fault}")
            if len(faults) == _MOST_FAULTS:
                faults.append(f"{file}: and perhaps more, after so many")
                break
    if faults:
        raise BadFile("\n".join(faults))
    return records


def _rows(file: str, needed: Sequence[str]) -> Iterator[tuple[str, Row]]:
    try:
        yield from _of_parquet(file, needed) if file.endswith((".parquet", ".pq")) else _of_csv(file, needed)
    except OSError as error:
        raise BadFile(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadFile(f"{file}: is not UTF-8 text; Parquet files are named *.parquet") from error
    except csv.Error as error:
        raise BadFile(f"{file}: is not CSV: {error}") from error


def _of_csv(file: str, needed: Sequence[str]) -> Iterator[tuple[str, Row]]:
    with open(file, encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened, strict=True)
        header = [name.strip() for name in next(reader, [])]
        _check_columns(file, header, needed)
        for cells in reader:
            if not cells:
                continue
            where = f"{file}:{reader.line_num}"
            if len(cells) != len(header):
                raise BadFile(f"{where}: has {len(cells)} cells, the header {len(header)}")
            yield where, dict(zip(header, cells, strict=True))


def _of_parquet(file: str, needed: Sequence[str]) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow  # noqa: PLC0415
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise CommandFailed(
            "needs pyarrow for Parquet: pip install 'inference-gateway[experiments]', or CSV"
        ) from error
    try:
        with parquet.ParquetFile(file) as opened:
            _check_columns(file, opened.schema_arrow.names, needed)
            place = 0
            for batch in opened.iter_batches():
                for row in _with_microseconds(batch).to_pylist():
                    place += 1
                    yield f"{file}, row {place}", row
    except pyarrow.ArrowInvalid as error:
        raise BadFile(f"{file}: is not Parquet: {str(error).splitlines()[0]}") from error


def _with_microseconds(batch: Any) -> Any:  # Any: pyarrow has no types
    """The batch with times that Python has: a nanosecond is more than `datetime` knows."""
    import pyarrow  # noqa: PLC0415

    for place, each in enumerate(batch.schema):
        if pyarrow.types.is_timestamp(each.type) and each.type.unit == "ns":
            column = batch.column(place).cast(pyarrow.timestamp("us", each.type.tz), safe=False)
            batch = batch.set_column(place, each.name, column)
    return batch


def _check_columns(file: str, header: Sequence[str], needed: Iterable[str]) -> None:
    missing = [name for name in needed if name not in header]
    if missing:
        found = ", ".join(header) or "none"
        raise BadFile(f"{file}: has no column {', '.join(map(repr, missing))}; its columns: {found[:500]}")
    twice = {name for name in header if name and header.count(name) > 1}
    if twice:
        raise BadFile(f"{file}: has column {', '.join(map(repr, sorted(twice)))} twice")


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    return "" if value is None else str(value).strip()


def _value(row: Row) -> float:
    try:
        value = _number(row["value"])
    except (TypeError, ValueError, OverflowError):
        raise _Fault(f"'value' is {show(row['value'])}; a number") from None
    if not math.isfinite(value):
        raise _Fault(f"'value' is {show(row['value'])}; a finite number")
    return value


def _number(cell: Any) -> float:  # Any: a cell
    """As `float`, but for digits with '_' in between, which no other program writes."""
    if isinstance(cell, str) and "_" in cell:
        raise ValueError(cell)
    return float(cell)


def _time(row: Row, now: float) -> float:
    given = row["at"]
    seconds = _of_moment(given) if isinstance(given, datetime) else _seconds(given)
    if not seconds >= 0.0:
        raise _Fault(f"'at' is {show(given)}, before 1970")
    if seconds >= _SHORTEST_MILLISECONDS:
        raise _Fault(f"'at' is {show(given)}; seconds since 1970, not milliseconds")
    if seconds > now + _CLOCK_SKEW:
        raise _Fault(f"'at' is {show(given)}, which is in the future")
    return seconds


def _seconds(given: Any) -> float:  # Any: a cell
    try:
        seconds = _number(given)
    except (TypeError, ValueError, OverflowError):
        pass
    else:
        if math.isfinite(seconds):
            return seconds
    text = str(given).strip()
    if sys.version_info < (3, 11):  # which reads no Z, and three or six digits of a second only
        text = re.sub(r"[Zz]$", "+00:00", text)
        text = _DECIMAL.sub(lambda found: "." + found[1][:6].ljust(6, "0"), text)
    try:
        return _of_moment(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        raise _Fault(f"'at' is {show(given)}; ISO 8601, or seconds since 1970") from None


def _of_moment(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
