"""How an experiment stands, as JSON values: a report, the way to it, and since when guardrails are breached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from gateway.experiments.verdict import Guard, Report, distance, guardrail_sentence, plain

Json = Mapping[str, Any]
"""Any: it is JSON."""

MOST_POINTS: Final = 60  # of the way to a report: as many as a plot shows


def standing(report: Report, looks: Sequence[Report], stopped: Json | None) -> dict[str, Any]:
    """What is kept and shown of a report.

    looks:    what it was on the way here, the earliest first.
    stopped:  with which arm and when; None if it has not been.
    """
    made = report.as_json()
    primary = [
        {
            **_effect(effect),
            "path": _way([], [*(_point(look.as_json(), place) for look in looks), _point(made, place)]),
        }
        for place, effect in enumerate(made["primary"])
    ]
    guardrails = [
        {
            **_effect(told["effect"]),
            "state": told["state"],
            "worse_by": told["worse_by"],
            "distance": plain(distance(each)),
            "text": guardrail_sentence(each),
            "breached_at": report.at if each.state is Guard.BREACHED else None,
        }
        for told, each in zip(made["guardrails"], report.guardrails, strict=True)
    ]
    return {
        "name": report.experiment,
        "trouble": None,
        **{key: made[key] for key in ("at", "since", "units", "answer", "arm", "advice", "doubts", "seconds_left")},
        "left_out": report.left_out,
        "primary": primary,
        "guardrails": guardrails,
        "arms": made["sample_ratio"]["units"],
        "expected": made["sample_ratio"]["expected"],
        "stopped": stopped,
    }


def nothing(experiment: str, why: str) -> dict[str, Any]:
    """In place of a report that there can't be."""
    return {"name": experiment, "trouble": why}


def following(before: Json, now: Json) -> dict[str, Any]:
    """The later one of two, with the way to the earlier one, and the first breach of each guardrail.

    An interval is at a later look another one, so a guardrail may be undecided again after it was breached. The first
    time stays: at that look it was known, with the error rate that all looks share.
    """
    if before["trouble"] or now["trouble"]:
        return dict(now)
    ways = {_key(each): each["path"] for each in before["primary"]}
    since = {_key(each): each["breached_at"] for each in before["guardrails"]}
    return {
        **now,
        "primary": [{**each, "path": _way(ways.get(_key(each), []), each["path"])} for each in now["primary"]],
        "guardrails": [
            {**each, "breached_at": each["breached_at"] if since.get(_key(each)) is None else since[_key(each)]}
            for each in now["guardrails"]
        ],
    }


def first_breaches(before: Json | None, now: Json) -> list[Json]:
    """The guardrails of which nobody knew before that they are breached."""
    known = () if before is None or before["trouble"] else before["guardrails"]
    told = {_key(each) for each in known if each["breached_at"] is not None}
    found = () if now["trouble"] else now["guardrails"]
    return [each for each in found if each["state"] == Guard.BREACHED.value and _key(each) not in told]


def _key(effect: Json) -> tuple[str, str]:
    return effect["outcome"], effect["arm"]


def _effect(effect: Json) -> Json:
    keys = ("outcome", "arm", "baseline", "better", "value", "baseline_value", "difference", "low", "high", "judgement")
    return {key: effect[key] for key in (*keys, "relative", "relative_low", "relative_high", "alpha", "past", "method")}


def _point(report: Json, place: int) -> list[Any]:
    return [report["at"], *(report["primary"][place][key] for key in ("difference", "low", "high"))]


def _way(before: Sequence[list[Any]], now: Sequence[list[Any]]) -> list[list[Any]]:
    """Points by time; where there are too many, those go whose neighbours are closest to each other."""
    way = [*(each for each in before if each[0] < now[0][0]), *now]
    while len(way) > MOST_POINTS:
        _, place = min((way[place + 1][0] - way[place - 1][0], place) for place in range(1, len(way) - 1))
        del way[place]
    return way
