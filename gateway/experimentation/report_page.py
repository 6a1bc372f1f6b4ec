"""A report of an experiment as one HTML page that needs nothing else: words, and plots as inline SVG. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from gateway.experiments.analysis.distributions import Distribution
from gateway.experiments.plan import Better, Plan
from gateway.experiments.verdict import Effect, Report, headline, moment, sentence

_WIDTH, _HEIGHT = 720, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 16, 12, 28

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6575; --paper: #fff; --line: #2b62c9; --band: #2b62c93a;
  --grid: #d5dae2; --other: #b3541e; --third: #1f7a4d; --bad: #b3212d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #a3acbb; --paper: #14171c; --line: #7ea6f4; --band: #7ea6f43a; --grid: #333a46;
    --other: #f0a26b; --third: #7bd396; --bad: #ff9a9a; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 780px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.band { fill: var(--band); } .effect { fill: none; stroke: var(--line); stroke-width: 2; }
.grid { stroke: var(--grid); } .zero { stroke: var(--ink); stroke-dasharray: 4 3; }
.planned { fill: none; stroke: var(--ink); } .point { fill: var(--line); }
.bound { stroke: var(--bad); stroke-width: 2; }
.step { fill: none; stroke-width: 2; } .arm0 { stroke: var(--line); fill: var(--line); }
.arm1 { stroke: var(--other); fill: var(--other); } .arm2 { stroke: var(--third); fill: var(--third); }
polyline.arm0, polyline.arm1, polyline.arm2 { fill: none; } polyline.arm1 { stroke-dasharray: 7 3; }
polyline.arm2 { stroke-dasharray: 2 3; } svg text.key { stroke: none; }
.bar { fill: var(--line); } pre { white-space: pre-wrap; font: 13px/1.5 ui-monospace, monospace; }
"""


def page(
    plan: Plan, report: Report, looks: Sequence[Report], spread: Sequence[Distribution] = (), ended: str = ""
) -> str:
    """The whole page.

    looks:   what the report was on the way here, earliest first.
    spread:  how the outcomes are spread in each arm.
    ended:   how it was stopped, in place of advice; "" if it was not.
    """
    return "\n".join(_parts(plan, report, [*looks, report], spread, ended))


def _parts(
    plan: Plan, report: Report, looks: Sequence[Report], spread: Sequence[Distribution], ended: str
) -> Iterator[str]:
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(report.experiment)}</title>'
    yield f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    yield f"<h1>{escape(headline(report))}</h1>"
    yield f"<p>{escape(ended or report.advice)}</p>"
    yield f"<p>{moment(report.at)}; public model {escape(plan.model or '-')}; unit: {escape(plan.unit)}.</p>"
    for place, effect in enumerate(report.primary):
        yield f"<h2>{escape(effect.outcome)} of '{escape(effect.arm)}' less '{escape(effect.baseline)}'</h2>"
        yield f"<p>{escape(sentence(effect))}</p>"
        yield _effect_over_time([(look.at, look.primary[place]) for look in looks])
    yield "<h2>All intervals, relative to the baseline; a bar in red is what a guardrail allows</h2>"
    yield _intervals(report)
    for each in spread:
        yield f"<h2>How {escape(each.outcome)} is spread, by arm: share of {each.what}</h2>"
        yield _spread(each)
    if report.epochs:
        yield "<h2>A bandit: by which shares the units of each epoch came to arms</h2>"
        yield _shares_over_time(report)
    yield "<h2>Units by arm, as seen and (outlined) as planned</h2>"
    yield _arms(report)
    yield "<h2>Units by arm over time</h2>"
    yield _units_over_time([(look.at, look.sample_ratio.units) for look in looks])
    yield "<h2>All of it</h2>"
    yield f"<pre>{escape(chr(10).join(report.lines(ended)))}</pre></html>"


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
        f'<text x="{_LEFT}" y="{foot}">{moment(first)}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{foot}" text-anchor="end">{moment(last)}</text></svg>'
    )


def _intervals(report: Report) -> str:
    """Each effect at this look as an interval, on one axis of per cent of the baseline."""
    bounds = {id(each.effect): each.worse_by for each in report.guardrails}
    effects = [*report.primary, *(each.effect for each in report.guardrails), *report.secondary]
    drawn = [e for e in effects if all(map(math.isfinite, (e.relative, e.relative_low, e.relative_high)))]
    if not drawn:
        return "<p>No interval has an end yet.</p>"
    limits = [max(abs(e.relative_low), abs(e.relative_high)) for e in drawn]
    limits += [b.size for b in (bounds.get(id(e)) for e in drawn) if b is not None and b.is_relative]
    most = min(max(limits), 8.0 * sorted(limits)[len(limits) // 2]) or 1.0
    left, wide = 230.0, _WIDTH - 230.0 - _RIGHT

    def x(value: float) -> float:
        return left + (max(-most, min(most, value)) / most + 1.0) / 2.0 * wide

    rows = [f'<line class="zero" x1="{x(0.0):.1f}" x2="{x(0.0):.1f}" y1="0" y2="{len(drawn) * 28}"/>']
    for place, effect in enumerate(drawn):
        at = place * 28 + 14
        rows.append(
            f'<text x="0" y="{at + 4}">{escape(effect.outcome)} of {escape(effect.arm)}</text>'
            f'<rect class="band" x="{x(effect.relative_low):.1f}" y="{at - 7}" height="14" '
            f'width="{max(1.0, x(effect.relative_high) - x(effect.relative_low)):.1f}"/>'
            f'<circle class="point" cx="{x(effect.relative):.1f}" cy="{at}" r="4"/>'
        )
        bound = bounds.get(id(effect))
        if bound is not None and bound.is_relative:
            worst = x(-bound.size if effect.better is Better.HIGHER else bound.size)
            rows.append(f'<line class="bound" x1="{worst:.1f}" x2="{worst:.1f}" y1="{at - 10}" y2="{at + 10}"/>')
    foot = len(drawn) * 28 + 14
    for value, how in ((-most, "start"), (0.0, "middle"), (most, "end")):
        rows.append(f'<text x="{x(value):.1f}" y="{foot}" text-anchor="{how}">{value * 100:+.3g} %</text>')
    label = "The interval of each outcome, relative to the baseline"
    return f'<svg viewBox="0 0 {_WIDTH} {foot + 6}" role="img" aria-label="{label}">{"".join(rows)}</svg>'


def _spread(given: Distribution) -> str:
    """The arms' histograms as outlines over each other."""
    most = max(max(shares) for shares in given.shares.values()) or 1.0
    low, high = given.edges[0], given.edges[-1]

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(share: float) -> float:
        return _TOP + (1.0 - share / most) * (_HEIGHT - _TOP - _BOTTOM)

    lines = []
    for place, (arm, shares) in enumerate(given.shares.items()):
        edges = zip(given.edges, given.edges[1:], shares, strict=False)
        points = [f"{x(at):.1f},{y(share):.1f} {x(to):.1f},{y(share):.1f}" for at, to, share in edges]
        lines.append(f'<polyline class="step arm{place % 3}" points="{" ".join(points)}"/>')
        lines.append(_key(place, f"{arm}, median {given.medians[arm]:.4g}", at_end=True))
    ends = [(low, "start"), ((low + high) / 2.0, "middle"), (high, "end")]
    foot = [f'<text x="{x(at):.1f}" y="{_HEIGHT - 8}" text-anchor="{how}">{at:.4g}</text>' for at, how in ends]
    axis = f'<text x="{_LEFT - 6}" y="{y(most) + 8:.1f}" text-anchor="end">{most:.1%}</text>'
    label = f"How {escape(given.outcome)} is spread in each arm"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{axis}{"".join([*lines, *foot])}</svg>'
    )


def _shares_over_time(report: Report) -> str:
    """The shares of each epoch's units, from its begin to the next one's."""
    first, last = report.epochs[0].since, max(report.at, report.epochs[-1].since)
    span, high = last - first or 1.0, _HEIGHT - _TOP - _BOTTOM
    ends = [*(epoch.since for epoch in report.epochs[1:]), last]
    lines = []
    for place, (arm, latest) in enumerate(report.epochs[-1].shares.items()):
        points = []
        for epoch, end in zip(report.epochs, ends, strict=True):
            y = _TOP + (1.0 - epoch.shares[arm]) * high
            for at in (epoch.since, end):
                points.append(f"{_LEFT + (at - first) / span * (_WIDTH - _LEFT - _RIGHT):.1f},{y:.1f}")
        lines.append(f'<polyline class="step arm{place % 3}" points="{" ".join(points)}"/>')
        lines.append(_key(place, f"{arm}, {latest:.1%} now", at_end=True, top=_TOP + high // 3))  # between the lines
    foot = (
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{moment(first)}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{moment(last)}</text>'
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end">100 %</text>'
        f'<text x="{_LEFT - 6}" y="{_TOP + high}" text-anchor="end">0 %</text>'
    )
    label = "Shares of arms by epoch"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(lines)}{foot}</svg>'


def _units_over_time(looks: Sequence[tuple[float, dict[str, int]]]) -> str:
    first, last = looks[0][0], looks[-1][0]
    if len(looks) < 2 or last <= first:
        return "<p>Too few units for a plot yet.</p>"
    most = max(max(units.values()) for _, units in looks) or 1
    lines = []
    for place, arm in enumerate(looks[-1][1]):
        points = [
            f"{_LEFT + (at - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT):.1f},"
            f"{_TOP + (1.0 - units[arm] / most) * (_HEIGHT - _TOP - _BOTTOM):.1f}"
            for at, units in looks
        ]
        lines.append(f'<polyline class="step arm{place % 3}" points="{" ".join(points)}"/>{_key(place, arm)}')
    foot = (
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{moment(first)}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{moment(last)}</text>'
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end">{most}</text>'
    )
    label = "Units by arm over time"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(lines)}{foot}</svg>'


def _key(place: int, text: str, *, at_end: bool = False, top: int = _TOP) -> str:
    x, how = (_WIDTH - _RIGHT, "end") if at_end else (_LEFT + 10, "start")
    at = top + 14 * (place + 1)
    return f'<text class="key arm{place % 3}" x="{x}" y="{at}" text-anchor="{how}">{escape(text)}</text>'


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
            f'<rect class="planned" x="140" y="{top + 4}" height="20" width="{planned:.1f}"/>'
            f'<text x="{150 + wide}" y="{top + 18}">{count} of {ratio.expected[arm]:.0f}</text>'
        )
    label = "Units by arm beside what was planned"
    high = 30 * len(rows)
    return f'<svg viewBox="0 0 {_WIDTH} {high}" role="img" aria-label="{label}">{"".join(rows)}</svg>'
