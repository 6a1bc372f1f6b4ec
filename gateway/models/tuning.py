"""Which instances, threads and batch sizes to try for a model on this host, and which of them to choose.

Decisions only: `gateway.optimise` starts servers and measures. The work is that of NVIDIA's Model Analyzer, for a CPU:
there instances and their threads share the same cores, so what is worth trying is few.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

ALIKE: Final = 0.05
"""Rates that differ by less are taken for equal: closed loops of a few seconds repeat no better."""

WORTH_A_BATCH: Final = 0.10
"""What a larger batch must gain, as a share of the rate, to be worth a request's waiting for others."""


class NoFigures(Exception):
    """What perf_analyzer wrote has no figures; the text says what was missing."""


@dataclass(frozen=True, order=True)
class Setting:
    """What an instance group would say."""

    instances: int
    threads: int

    def __str__(self) -> str:
        return f"{_many(self.instances, 'instance')} of {_many(self.threads, 'thread')}"


@dataclass(frozen=True)
class Figures:
    """One measurement, or the median of several. rate: rows per second. p50, p99: of a request, in ms."""

    rate: float
    p50: float
    p99: float


Measured = Mapping[tuple[Setting, int], Figures]
"""By setting and rows of a request."""


@dataclass(frozen=True)
class Choice:
    """preferred: batch sizes to put together; () if that gains nothing. why: a reason in each line."""

    setting: Setting
    preferred: tuple[int, ...]
    why: tuple[str, ...]


def settings(cores: int) -> list[Setting]:
    """Instances and threads in powers of two and up to all cores, never more threads in all than there are cores."""
    sizes = sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})
    return [Setting(i, t) for i in sizes for t in sizes if i * t <= cores]


def batches(most: int) -> list[int]:
    """Rows of a request to try, for a model that takes `most` (0: it knows no batches)."""
    return sorted({size for size in (4, most) if 0 < size <= most} | {1})


def read_figures(table: str) -> Figures:
    """From the CSV that perf_analyzer writes with `-f`, whose times are in µs.

    :raises NoFigures: if it has no line, or not the columns.
    """
    row = next(csv.DictReader(io.StringIO(table)), None)
    if row is None:
        raise NoFigures("it has no line of figures")
    try:
        rate, p50, p99 = (float(row[column]) for column in ("Inferences/Second", "p50 latency", "p99 latency"))
    except KeyError as error:
        raise NoFigures(f"it has no column {error}") from error
    except (TypeError, ValueError) as error:
        raise NoFigures(f"a figure of it is no number: {error}") from error
    if not rate > 0:
        raise NoFigures("no request was answered")
    return Figures(rate, p50 / 1000, p99 / 1000)


def middle(rounds: Iterable[Figures]) -> Figures:
    """The median of each figure."""
    found = list(rounds)
    return Figures(median(f.rate for f in found), median(f.p50 for f in found), median(f.p99 for f in found))


def choose(measured: Measured, most_ms: float | None = None) -> Choice:
    """The setting with the highest rate; of those that are alike the one with the shortest p99, then the least of all.

    most_ms:  what the p99 of a request may be, in ms; measurements above it do not count, unless all are.
    """
    allowed = {key: f for key, f in measured.items() if most_ms is None or f.p99 <= most_ms}
    why = []
    if not allowed:
        allowed = dict(measured)
        why.append(f"no setting keeps the p99 under {most_ms:g} ms, so it is not heeded")
    best = max(figures.rate for figures in allowed.values())
    of_each: dict[Setting, Figures] = {}
    for (setting, _), figures in allowed.items():
        if setting not in of_each or figures.rate > of_each[setting].rate:
            of_each[setting] = figures
    alike = [setting for setting, figures in of_each.items() if figures.rate >= best * (1 - ALIKE)]
    smallest = {setting: min(f.p99 for (s, _), f in allowed.items() if s == setting) for setting in alike}
    setting = min(alike, key=lambda s: (round(smallest[s], 1), s))
    why.append(f"{setting}: {of_each[setting].rate:.0f} rows/s" + _beside(setting, alike, of_each, smallest))
    preferred, reason = _preferred({batch: f for (s, batch), f in allowed.items() if s == setting})
    return Choice(setting, preferred, (*why, reason))


def _beside(
    setting: Setting, alike: Sequence[Setting], rates: Mapping[Setting, Figures], p99: Mapping[Setting, float]
) -> str:
    others = [other for other in alike if other != setting]
    if others:
        slower = ", ".join(f"{other} ({p99[other]:.1f} ms)" for other in others)
        return f", no more than {ALIKE:.0%} from the best, and a p99 of {p99[setting]:.1f} ms; alike: {slower}"
    below = [figures.rate for other, figures in rates.items() if other != setting]
    return f", {rates[setting].rate / max(below) - 1:.0%} more than the next setting" if below else ""


def _preferred(by_batch: Mapping[int, Figures]) -> tuple[tuple[int, ...], str]:
    """The batch sizes worth putting together, and the reason."""
    least = min(by_batch)
    single, best = by_batch[least].rate, max(figures.rate for figures in by_batch.values())
    gain = best / single - 1
    if len(by_batch) == 1:
        return (), "batches: there is one size only"
    if gain < WORTH_A_BATCH:
        return (), f"batches of more than {_many(least, 'row')} gain {gain:.0%}, not worth a wait: no preferred sizes"
    sizes = tuple(
        size for size, f in sorted(by_batch.items()) if size > least and f.rate >= single * (1 + WORTH_A_BATCH)
    )
    return sizes, f"batches of {', '.join(map(str, sizes))} gain up to {gain:.0%}; none waits for others to come"


def table(measured: Measured) -> list[str]:
    """What was measured, a line each."""
    lines = [f"{'instances':>9} {'threads':>7} {'rows':>4} {'rows/s':>8} {'p50 ms':>8} {'p99 ms':>8}"]
    for (setting, batch), f in sorted(measured.items()):
        where = f"{setting.instances:>9} {setting.threads:>7} {batch:>4}"
        lines.append(f"{where} {f.rate:>8.1f} {f.p50:>8.2f} {f.p99:>8.2f}")
    return lines


def config_text(choice: Choice, *, batched: bool) -> str:
    """The parts of a config.pbtxt that say it. batched: does the model's config have `dynamic_batching`?"""
    parts = [f"instance_group [ {{ kind: KIND_CPU count: {choice.setting.instances} }} ]"]
    for kind, count in (("intra_op", choice.setting.threads), ("inter_op", 1)):
        parts.append(f'parameters {{ key: "{kind}_thread_count" value: {{ string_value: "{count}" }} }}')
    if batched:
        sizes = f" preferred_batch_size: [ {', '.join(map(str, choice.preferred))} ]" if choice.preferred else ""
        parts.append(f"dynamic_batching {{{sizes} max_queue_delay_microseconds: 0 }}")
    return "\n".join(parts)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
