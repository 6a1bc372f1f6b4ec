"""access (pure): who a caller is, as an authenticator has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MOST_NAME: Final = 200  # characters of a name; it goes into logs and metadata
MOST_GROUPS: Final = 200  # groups of one caller; a token that names more is refused and not cut, since that hid some

REFUSALS: Final = (
    "none", "several", "malformed", "unknown_key", "expired", "certificate",
    "issuer", "audience", "algorithm", "unknown_kid", "invalid", "claims",
    "permission_denied", "unavailable",
)  # fmt: skip
"""Why calls are not let in, in words for metrics: what their credentials lack; that the method is not for them; that
the keys of an issuer are still awaited."""


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller with a name. `NOBODY` is one who gave no credentials."""

    name: str
    groups: frozenset[str] = frozenset()
    by: str = ""  # which authenticator knew him: "api_key", "jwt" or "certificate"
    until: float | None = None  # Unix time at which what he showed expires; None: it does not

    def with_groups(self, more: frozenset[str]) -> Principal:
        return Principal(self.name, self.groups | more, self.by, self.until) if more else self


NOBODY: Final = Principal("")


def is_name(text: object) -> bool:
    """Can this be a caller's or a group's name? It is shown in logs, so no control characters."""
    return isinstance(text, str) and 0 < len(text) <= MOST_NAME and text.isprintable()
