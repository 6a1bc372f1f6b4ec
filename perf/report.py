"""A run as data, and as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from perf.bars import lines
from perf.summary import NULL, Sample, Spread, in_order, of, ratio

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes of a process: at rest, and at most during a situation."""

    situation: str
    system: str
    at_rest: int
    peak: int


@dataclass(slots=True)
class Run:
    """Everything that one run found. `failures` has what could not be measured, and why."""

    machine: dict[str, str]
    settings: dict[str, str]
    samples: list[Sample] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def markdown(run: Run, titles: dict[str, str]) -> str:
    """titles: what each scenario is, in words."""
    parts = [_machine(run), _bars(run.samples)]
    parts += [
        _scenario(run.samples, name, titles.get(name, name)) for name in in_order(s.scenario for s in run.samples)
    ]
    if run.memory:
        parts.append(_memory(run.memory))
    if run.failures:
        parts.append("## Not measured\n\n" + "\n".join(f"- {each}" for each in run.failures))
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *rows))


def _machine(run: Run) -> str:
    told = {**run.machine, **run.settings}
    rows = "\n".join(f"- {name}: {value}" for name, value in told.items() if value)
    return f"## Machine and run\n\n{rows}"


def _bars(samples: Sequence[Sample]) -> str:
    told = {"aim": "aim reached", "must": "yes", "no": "**no**", "": ""}
    rows = [(each.what, each.must, each.aim, each.measured, told[each.met]) for each in lines(samples)]
    what = "The gateway (or the merging one) ÷ the other, median of the rounds' ratios (least–most)."
    return f"## Must, aim, measured\n\n{what}\n\n" + table(("", "must", "aim", "measured", "met"), rows)


def _scenario(samples: Sequence[Sample], scenario: str, title: str) -> str:
    here = [each for each in samples if each.scenario == scenario]
    columns: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("answers/s", "rate", lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.1f}"),
        ("p50 ms", "p50", lambda v: f"{v / 1000:.2f}"),
        ("p99 ms", "p99", lambda v: f"{v / 1000:.2f}"),
        ("CPU µs", "cpu", lambda v: f"{v:,.0f}"),
        ("Triton's CPU µs", "triton_cpu", lambda v: f"{v:,.0f}"),
        ("sent late", "late", lambda v: f"{v:.0%}"),
    )
    columns = tuple(each for each in columns if any(getattr(sample, each[1]) for sample in here))

    def rows() -> Iterator[Sequence[str]]:
        for system in in_order(each.system for each in here):
            yield system, *(_cell(of(here, scenario, system, name), show) for _, name, show in columns)

    whole = table((scenario, *(head for head, _, _ in columns)), rows())
    shares = _shares(here, scenario) if any(each.system == NULL for each in here) else ""
    return f"## {title}\n\n{whole}{shares}"


def _shares(samples: Sequence[Sample], scenario: str) -> str:
    """Every figure as a share of the null server's, which is as far as one can get."""
    columns = (("answers/s", "rate"), ("p50", "p50"), ("p99", "p99"), ("CPU", "cpu"))

    def rows() -> Iterator[Sequence[str]]:
        for system in in_order(each.system for each in samples if each.system != NULL):
            found = (ratio(samples, scenario, name, system, NULL) for _, name in columns)
            yield system, *(_cell(each, lambda v: f"{v:.2f}") for each in found)

    return f"\n\nThe same ÷ the {NULL}'s:\n\n" + table(("", *(head for head, _ in columns)), rows())


def _cell(value: Spread | None, show: Callable[[float], str]) -> str:
    if value is None or not value.high:
        return "–"
    return f"{show(value.middle)} ({show(value.low)}–{show(value.high)})"


def _memory(found: Sequence[Memory]) -> str:
    rows = [(each.situation, each.system, f"{each.at_rest / MIB:.0f}", f"{each.peak / MIB:.0f}") for each in found]
    return "## Memory of the process, MiB\n\n" + table(("", "system", "at rest", "at most"), rows)
