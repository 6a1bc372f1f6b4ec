"""access (pure): API keys, of which only hashes are kept.

A key has 256 random bits, so one round of SHA-256 is enough: nobody can try all keys, and a slow hash, which is made
for passwords that people choose, would be work that strangers can ask for.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Final

from gateway.access.principal import Principal, is_name
from gateway.errors import Unauthenticated

PREFIX: Final = "igk_"  # by which scanners for leaked secrets find keys
RANDOM_BYTES: Final = 32
MOST_KEY: Final = 512  # characters; a longer text is none
_SHORT: Final = 8  # bytes of a hash by which it is found; the rest is compared


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key."""

    caller: str
    sha256: bytes
    until: float | None = None  # Unix time


def new_key(random: bytes) -> str:
    """A key. random: `RANDOM_BYTES` from a source that is meant for secrets."""
    if len(random) != RANDOM_BYTES:
        raise ValueError(f"a key is made of {RANDOM_BYTES} random bytes")
    return PREFIX + base64.urlsafe_b64encode(random).decode().rstrip("=")


def hash_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class ApiKeys:
    """The keys in force."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._by_short: dict[bytes, list[ApiKey]] = {}
        for key in keys:
            self._by_short.setdefault(key.sha256[:_SHORT], []).append(key)

    def __bool__(self) -> bool:
        return bool(self._by_short)

    def principal(self, key: str, now: float) -> Principal:
        """Whose key it is.

        The look-up is by a hash, whose bytes nobody who guesses can steer, and the comparison takes constant time.
        :raises Unauthenticated: if it is nobody's.
        """
        digest = hash_of(key) if len(key) <= MOST_KEY else b""
        for known in self._by_short.get(digest[:_SHORT], ()):
            if hmac.compare_digest(known.sha256, digest):
                if known.until is not None and now >= known.until:
                    raise Unauthenticated("the API key has expired", "expired")
                return Principal(known.caller, by="api_key", until=known.until)
        raise Unauthenticated("the API key is not known", "unknown_key")


def parse_keys(text: str) -> Iterator[tuple[int, ApiKey | str]]:
    """The keys of a file: each line has a caller's name, a SHA-256 in hex, and maybe a date on which it expires.

    returns:  the line's number with its key, or with what is wrong with it.
    """
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        found: ApiKey | str
        try:
            found = _parsed(words)
        except ValueError as error:
            found = str(error)
        yield number, found


def _parsed(words: list[str]) -> ApiKey:
    """:raises ValueError: with what is wrong."""
    if len(words) not in (2, 3):
        raise ValueError("needs a caller's name, a SHA-256, and maybe a date: NAME SHA256 [YYYY-MM-DD]")
    if not is_name(words[0]):
        raise ValueError("needs a caller's name of at most 200 printable characters first")
    return ApiKey(words[0], parse_hash(words[1]), parse_date(words[2]) if len(words) == 3 else None)


def parse_hash(text: str) -> bytes:
    """:raises ValueError: if it is no SHA-256 in hex. The text itself may be a key, so no error repeats it."""
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise ValueError("needs a SHA-256 of 64 hex digits, as `inference-gateway keys new NAME` prints it")
    return digest


def parse_date(text: str) -> float:
    """The Unix time at which a date, or a date and time, begins in UTC.

    :raises ValueError: if it is none.
    """
    try:
        at = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise ValueError("needs a date as 2030-01-31, or a date and time as 2030-01-31T12:00:00+00:00") from None
    return (at if at.tzinfo is not None else at.replace(tzinfo=timezone.utc)).timestamp()
