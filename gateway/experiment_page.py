"""A report of an experiment as one HTML page that needs nothing else: words, and plots as inline SVG. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from html import escape

from gateway.experiments.plan import Plan
from gateway.experiments.verdict import Effect, Report, headline, sentence

_WIDTH, _HEIGHT = 720, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 16, 12, 28

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6575; --paper: #fff; --line: #2b62c9; --band: #2b62c93a;
  --grid: #d5dae2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #a3acbb; --paper: #14171c; --line: #7ea6f4; --band: #7ea6f43a; --grid: #333a46; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 780px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.band { fill: var(--band); } .effect { fill: none; stroke: var(--line); stroke-width: 2; }
.grid { stroke: var(--grid); } .zero { stroke: var(--ink); stroke-dasharray: 4 3; }
.bar { fill: var(--line); } pre { white-space: pre-wrap; font: 13px/1.5 ui-monospace, monospace; }
"""


def page(plan: Plan, report: Report, looks: Sequence[Report]) -> str:
    """The whole page. looks: what the report was on the way here, earliest first."""
    return "\n".join(_parts(plan, report, [*looks, report]))


def _parts(plan: Plan, report: Report, looks: Sequence[Report]) -> Iterator[str]:
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(report.experiment)}</title>'
    yield f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    yield f"<h1>{escape(headline(report))}</h1>"
    yield f"<p>{escape(report.advice)}</p>"
    yield f"<p>{_day(report.at)}; public model {escape(plan.model or '-')}; unit: {escape(plan.unit)}.</p>"
    for place, effect in enumerate(report.primary):
        yield f"<h2>{escape(effect.outcome)} of '{escape(effect.arm)}' less '{escape(effect.baseline)}'</h2>"
        yield f"<p>{escape(sentence(effect))}</p>"
        yield _effect_over_time([(look.at, look.primary[place]) for look in looks])
    yield "<h2>Units by arm, as seen and (outlined) as planned</h2>"
    yield _arms(report)
    yield "<h2>All of it</h2>"
    yield f"<pre>{escape(chr(10).join(report.lines()))}</pre></html>"


def _effect_over_time(looks: Sequence[tuple[float, Effect]]) -> str:
    """The difference with its band. Of intervals that have no end yet nothing is drawn."""
    drawn = [(at, e) for at, e in looks if all(map(math.isfinite, (e.difference, e.low, e.high)))]
    if len(drawn) < 2:
        return "<p>Too few units for a plot yet.</p>"
    # The first bands are so wide that the later ones would be a line.
    widths = sorted(max(abs(e.low), abs(e.high)) for _, e in drawn)
    most = widths[len(widths) // 2] * 2.0 or 1.0
    first, last = drawn[0][0], drawn[-1][0]
    span = last - first or 1.0

    def x(at: float) -> float:
        return _LEFT + (at - first) / span * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        shown = max(-most, min(most, value))
        return _TOP + (1.0 - shown / most) / 2.0 * (_HEIGHT - _TOP - _BOTTOM)

    upper = [f"{x(at):.1f},{y(e.high):.1f}" for at, e in drawn]
    lower = [f"{x(at):.1f},{y(e.low):.1f}" for at, e in reversed(drawn)]
    line = [f"{x(at):.1f},{y(e.difference):.1f}" for at, e in drawn]
    grid = "".join(
        f'<line class="{"zero" if value == 0.0 else "grid"}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" '
        f'y2="{y(value):.1f}"/><text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:+.3g}</text>'
        for value in (-most, -most / 2.0, 0.0, most / 2.0, most)
    )
    foot = _HEIGHT - 8
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="The effect over time, with its interval">{grid}'
        f'<polygon class="band" points="{" ".join(upper + lower)}"/>'
        f'<polyline class="effect" points="{" ".join(line)}"/>'
        f'<text x="{_LEFT}" y="{foot}">{_day(first)}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{foot}" text-anchor="end">{_day(last)}</text></svg>'
    )


def _arms(report: Report) -> str:
    ratio = report.sample_ratio
    most = max((*ratio.units.values(), *ratio.expected.values()), default=0) or 1
    rows = []
    for place, (arm, count) in enumerate(ratio.units.items()):
        top, wide = place * 30, _WIDTH - 320
        planned = ratio.expected[arm] / most * wide
        rows.append(
            f'<text x="0" y="{top + 18}">{escape(arm)}</text>'
            f'<rect class="bar" x="140" y="{top + 6}" height="16" width="{count / most * wide:.1f}"/>'
            f'<rect fill="none" stroke="currentColor" x="140" y="{top + 4}" height="20" width="{planned:.1f}"/>'
            f'<text x="{150 + wide}" y="{top + 18}">{count} of {ratio.expected[arm]:.0f}</text>'
        )
    label = "Units by arm beside what was planned"
    high = 30 * len(rows)
    return f'<svg viewBox="0 0 {_WIDTH} {high}" role="img" aria-label="{label}">{"".join(rows)}</svg>'


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
