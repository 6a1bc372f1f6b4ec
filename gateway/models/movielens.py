"""MovieLens 100K, as recbole carries it: which user liked which film. For research only, by GroupLens' terms.

source: recbole 1.2.1, `dataset_example/ml-100k`: tab-separated, one line of names and types on top.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOTICE = (
    "MovieLens 100K is for research only. GroupLens' terms: no endorsement may be implied, publications must cite "
    "it (Harper and Konstan, 2015), it may not be passed on without permission, and any commercial or "
    "revenue-bearing use needs permission from a faculty member of the GroupLens project."
)

LIKED = 4.0  # a rating of 1 … 5 from which on a film counts as liked


@dataclass(frozen=True)
class Likings:
    """users, items: of each liking, in the order of time. texts: title, year and genres of each item."""

    users: NDArray[Any]
    items: NDArray[Any]
    texts: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.users.max()) + 1, len(self.texts)


def read(wheel: Path) -> Likings:
    """wheel: the folder with the unpacked `sources.RECBOLE`. Items have their numbers of the data set, less one."""
    folder = wheel / "recbole/dataset_example/ml-100k"
    films = {int(number): " ".join(rest) for number, *rest in _rows(folder / "ml-100k.item")}
    ratings = [tuple(map(float, row)) for row in _rows(folder / "ml-100k.inter")]
    liked = sorted((row for row in ratings if row[2] >= LIKED), key=lambda row: (row[3], row[0], row[1]))
    texts = tuple(films.get(number, "") for number in range(1, max(films) + 1))
    return Likings(np.array([int(r[0]) - 1 for r in liked]), np.array([int(r[1]) - 1 for r in liked]), texts)


def _rows(file: Path) -> list[list[str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.reader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]


def last_of_each(likings: Likings) -> tuple[Likings, dict[int, int]]:
    """All but the last liking of each user who has five or more; and that last one: user → item."""
    held = {}
    keep = np.ones(len(likings.users), np.bool_)
    for user in np.unique(likings.users):
        (places,) = np.nonzero(likings.users == user)
        if len(places) >= 5:
            keep[places[-1]] = False
            held[int(user)] = int(likings.items[places[-1]])
    return Likings(likings.users[keep], likings.items[keep], likings.texts), held
