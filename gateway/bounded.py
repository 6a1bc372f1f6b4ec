"""Values: the bound of tables that peers fill, such as what was read of a head that may come again.

Such a table stays a plain dict, for it is read on every call; only who adds to it goes through here. docs/limits.md
lists them all.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Final

SHARE: Final = 8  # of a full table one part in so many goes at once, which makes room for as many more


def make_room(table: dict[Any, Any], most: int) -> None:
    """To be called before an entry is added. A table that has `most` loses its oldest entries, and never all of them.

    So whoever fills it costs the others what it takes to make some entries anew, and no single call does much work.
    """
    if len(table) >= most:
        for key in list(islice(table, most // SHARE + 1)):
            del table[key]
