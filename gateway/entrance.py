"""How calls get in: the door that a config describes, the keys of issuers, and the transport's question for each call.

Without `access` in the config there is no door, and the transport asks nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.access.api_keys import ApiKey, ApiKeys, parse_date, parse_hash, parse_keys
from gateway.access.certificates import Certificates
from gateway.access.door import Door, DoorSettings
from gateway.api.doorkeeper import Doorkeeper
from gateway.assemble import policy_of
from gateway.config import Config
from gateway.config.access import Access as AccessConfig
from gateway.config.access import Jwt
from gateway.rpc.server import ServerCall

if TYPE_CHECKING:  # PyJWT is imported only where a config needs it
    from gateway.key_fetching import IssuerKeys, KeySource

Admit = Callable[[ServerCall], bool]
Prepared = tuple[DoorSettings, "Sequence[KeySource]"]


class Entrance:
    """The door in force, if there is one."""

    def __init__(self, refused: Callable[[str], None]) -> None:
        """refused: hears of each call that is refused, and why."""
        self._refused = refused
        self._door: Door | None = None
        self._admit: Admit | None = None
        self._keys: IssuerKeys | None = None
        self._tell: Callable[[Admit | None], None] = lambda admit: None

    def watch(self, tell: Callable[[Admit | None], None]) -> None:
        """Have `tell` called with what is to be asked about each call, now and after each change."""
        self._tell = tell
        tell(self._admit)

    def apply(self, prepared: Prepared | None) -> None:
        """Put a config in force, for calls that come from now on and for messages of streams that are open."""
        if prepared is None:
            self._admit = None
            if self._door is not None:  # for streams that came in by it
                self._door.open_for_all()
            if self._keys is not None:
                self._keys.apply(())
        else:
            settings, sources = prepared
            if sources and self._keys is None:
                from gateway.key_fetching import IssuerKeys  # noqa: PLC0415

                self._keys = IssuerKeys(self._keys_changed)
            if self._keys is not None:
                self._keys.apply(sources)
            read = self._keys.read if self._keys is not None and sources else None
            if self._door is None:
                self._door = Door(settings, time.time, read)
            else:
                self._door.apply(settings, read)
            self._admit = Doorkeeper(self._door, self._refused).admit
        self._tell(self._admit)

    async def wait_first_keys(self, seconds: float) -> None:
        if self._keys is not None:
            await self._keys.wait_first(seconds)

    async def aclose(self) -> None:
        if self._keys is not None:
            await self._keys.aclose()

    def _keys_changed(self) -> None:
        if self._door is not None:
            self._door.forget()


def prepared(config: Config) -> Prepared | None:
    """What a config says of access; None if it says nothing.

    :raises OSError, ValueError: if a file that it names can't be used.
    """
    access = config.checked_access
    if access is None:
        return None
    settings = DoorSettings(
        policy_of(access),
        ApiKeys(_keys_of(access)),
        access.api_key_header.encode(),
        None if access.certificates is None else _certificates(access),
        takes_tokens=bool(access.jwt),
        open_probes=access.health == "open",
        tell_upstream=(access.tell_upstream or "").encode(),
        forward_credentials=access.forward_credentials,
    )
    return settings, [_source(each) for each in access.jwt]


def _keys_of(access: AccessConfig) -> Sequence[ApiKey]:
    """:raises OSError, ValueError: if the file with keys can't be used."""
    keys = [
        ApiKey(key.caller, parse_hash(key.sha256), parse_date(key.expires) if key.expires is not None else None)
        for key in access.api_keys
    ]
    if access.api_key_file is not None:
        for number, found in parse_keys(Path(access.api_key_file).read_text()):
            if isinstance(found, str):
                raise ValueError(f"{access.api_key_file}:{number}: {found}")
            keys.append(found)
    return keys


def _certificates(access: AccessConfig) -> Certificates:
    named = access.certificates
    assert named is not None  # noqa: S101  (the caller has looked)
    return Certificates(named.name, named.trust_domain or "", named.prefix)


def _source(jwt: Jwt) -> KeySource:
    from gateway.access.tokens import Issuer, KeySet  # noqa: PLC0415
    from gateway.key_fetching import KeySource  # noqa: PLC0415

    issuer = Issuer(jwt.issuer, jwt.audience, jwt.algorithms, jwt.caller, jwt.groups or "", jwt.prefix, jwt.leeway)
    keys = None
    if jwt.jwks_file is not None:
        keys = KeySet(json.loads(Path(jwt.jwks_file).read_bytes()), jwt.algorithms)
    return KeySource(issuer, keys, jwt.jwks or "", jwt.ca, jwt.refresh)
