"""Values: the bound of caches that peers fill, such as heads of requests that may come again.

Such a cache is a plain dict, since it is read on every call; only code that adds an entry comes here. docs/limits.md
lists all of them.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Final

SHARE: Final = 8  # an eighth of a full table is removed at once, which makes room for as many new entries


def make_room(table: dict[Any, Any], most: int) -> None:
    """Remove the oldest entries of a table that has `most`, before one is added; never all entries.

    So a peer that fills a table makes others lose some entries only, and no single call does much work.
    """
    if len(table) >= most:
        for key in list(islice(table, most // SHARE + 1)):
            del table[key]
