"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perf.report import Run
from perf.summary import DIRECT, ENVOY, GATEWAY, GRPC_AIO, HAPROXY, MERGING, NGINX, NULL, SHARING, Sample, in_order, of

_COLOURS = {
    GATEWAY: "#0b6e4f",
    GRPC_AIO: "#7fc8a9",
    MERGING: "#2a9d8f",
    SHARING: "#8ab17d",
    ENVOY: "#c1121f",
    NGINX: "#f4a261",
    HAPROXY: "#457b9d",
    DIRECT: "#888888",
    NULL: "#cccccc",
}


def draw(run: Run, folder: Path) -> list[Path]:
    """Write those PNGs for which there is data."""
    import matplotlib as mpl  # noqa: PLC0415  # of the extra `perf`; a run without pictures needs none

    mpl.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    made: list[Path] = []
    for name, fill in (("latency", _latency), ("cpu", _cpu), ("payload", _payload), ("growth", _growth)):
        figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
        if fill(axes, run.samples):
            made.append(folder / f"{name}.png")
            figure.savefig(made[-1], dpi=110)
        pyplot.close(figure)
    return made


# `axes` is matplotlib's, which has no types of its own worth naming.


def _latency(axes: Any, samples: Sequence[Sample]) -> bool:
    names = [name for name in in_order(s.scenario for s in samples) if name.startswith("tiny-")]
    for system in _systems(samples, names):
        points = [(of(samples, name, system, "rate"), of(samples, name, system, "p50")) for name in names]
        known = [(rate.middle, p50.middle / 1000) for rate, p50 in points if rate and p50]
        axes.plot(*zip(*known, strict=True), "o-", label=system, color=_COLOURS.get(system))
    _label(axes, "Tiny tensors: " + ", ".join(name[5:] for name in names) + " clients", "answers per second", "p50, ms")
    axes.set_yscale("log")
    return bool(names)


def _cpu(axes: Any, samples: Sequence[Sample]) -> bool:
    names = [name for name in in_order(s.scenario for s in samples) if name.startswith("tiny-")]
    systems = [system for system in _systems(samples, names) if system != DIRECT]
    width = 0.8 / max(1, len(systems))
    for n, system in enumerate(systems):
        found = [of(samples, name, system, "cpu") for name in names]
        heights = [each.middle if each else 0.0 for each in found]
        axes.bar([at + n * width for at in range(len(names))], heights, width, label=system, color=_COLOURS.get(system))
    axes.set_xticks([at + 0.4 - width / 2 for at in range(len(names))], [f"{name[5:]} clients" for name in names])
    _label(axes, "CPU of the proxy per request, tiny tensors", "", "µs")
    return bool(names)


def _payload(axes: Any, samples: Sequence[Sample]) -> bool:
    return _against(axes, samples, "payload-", "CPU of the proxy as payload grows", "bytes in, and as many out")


def _growth(axes: Any, samples: Sequence[Sample]) -> bool:
    drawn = False
    for what, style in (("routes", "s:"), ("variants", "^--"), ("connections", "o-")):
        found = _curve(samples, f"{what}-", GATEWAY)
        drawn = drawn or bool(found)
        if found:
            axes.plot(*zip(*found, strict=True), style, label=what, color=_COLOURS[GATEWAY])
    envoy = _curve(samples, "connections-", ENVOY)
    if envoy:
        axes.plot(*zip(*envoy, strict=True), "o-", label="connections, Envoy", color=_COLOURS[ENVOY])
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    _label(axes, "CPU of the gateway per request as there are more …", "how many", "µs")
    return drawn


def _against(axes: Any, samples: Sequence[Sample], prefix: str, title: str, across: str) -> bool:
    names = [name for name in in_order(s.scenario for s in samples) if name.startswith(prefix)]
    for system in _systems(samples, names):
        found = _curve(samples, prefix, system)
        axes.plot(*zip(*found, strict=True), "o-", label=system, color=_COLOURS.get(system))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _label(axes, title, across, "µs per request")
    return bool(names)


def _curve(samples: Sequence[Sample], prefix: str, system: str) -> list[tuple[int, float]]:
    """CPU against the number in the scenario's name."""
    names = [name for name in in_order(s.scenario for s in samples) if name.startswith(prefix)]
    found = [(int(name.removeprefix(prefix)), of(samples, name, system, "cpu")) for name in names]
    return sorted((number, cpu.middle) for number, cpu in found if cpu)


def _systems(samples: Sequence[Sample], names: Sequence[str]) -> list[str]:
    return in_order(s.system for s in samples if s.scenario in names)


def _label(axes: Any, title: str, across: str, up: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
