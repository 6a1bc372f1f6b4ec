"""access (pure): lets calls in, by the header list alone, before anything of a request's body is read.

What a list says is found out once: equal lists share a `RequestHead`, which remembers it for as long as the same access
config, and the same keys of issuers, are in force. Behind the door a call has another head, in which credentials are
no more, and nor are the fields that only the gateway may set. So nothing behind it can pass on, keep or log them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias
from urllib.parse import quote

from gateway.access.api_keys import ApiKeys
from gateway.access.certificates import Certificate, Certificates
from gateway.access.policy import ALL, NOTHING, Grant, Names, Policy, Scope
from gateway.access.principal import NOBODY, Principal
from gateway.access.rpcs import HEALTH, PATHS, PROBES
from gateway.bounded import make_room
from gateway.errors import Forbidden, GatewayError, Unauthenticated, UnknownMethod
from gateway.http2.hpack import Field, NeverIndexed
from gateway.rpc.metadata import Fields
from gateway.rpc.requests import RequestHead

AUTHORIZATION: Final = b"authorization"
CALLER: Final = "gateway-caller"
"""The key under which routing and telemetry find the caller's name. Clients' own values of it never count."""

_ANY: Final = Names.of(["*"])
_REPLAYED: Final = b"gateway-replayed"  # what has it is not counted as its model's traffic, which is not for everybody
_CALLER_RAW: Final = CALLER.encode()
_BEARER: Final = "bearer "
_KEPT: Final = 1024  # tokens, and header lists with certificates, that are remembered; callers choose both
_PLAIN: Final = "!\"#$&'()*+,/:;<=>?@[]^`{|}~"  # characters of a name that a header field takes as they are

TokenReader = Callable[[str], Principal]
"""Checks a JWT. Raises Unauthenticated, or KeysAwaited."""


@dataclass(frozen=True, slots=True)
class DoorSettings:
    """How callers are known, and what they may."""

    policy: Policy
    api_keys: ApiKeys
    api_key_header: bytes = b"x-api-key"
    certificates: Certificates | None = None
    takes_tokens: bool = False
    open_probes: bool = True  # is health told to everybody?
    tell_upstream: bytes = b""  # the metadata key under which Triton hears of the caller; b"": it does not
    forward_credentials: bool = False
    is_open: bool = False  # does it matter no more what callers show?


class Access:
    """Who made a call, and what he may by this RPC. It refers to no head, so that it dies with its last reference."""

    __slots__ = ("_certificate", "_door", "_fields", "_path", "era", "principal", "scope")

    def __init__(  # noqa: PLR0917  (made for each new header list)
        self,
        principal: Principal,
        scope: Scope,
        era: object,
        door: Door,
        path: bytes,
        fields: Fields,
        certificate: Certificate | None,
    ) -> None:
        self.principal = principal
        self.scope = scope
        self.era = era  # of the door, in which this was found out
        self._door = door
        self._path = path
        self._fields = fields
        self._certificate = certificate

    @property
    def name(self) -> str:
        return self.principal.name

    def renewed(self) -> Access:
        """The same, if it still holds; what holds now, after a change. For calls that last.

        :raises GatewayError: if the caller would not be let in any more.
        """
        if self._door.still_holds(self):
            return self
        return self._door.found(self._path, self._fields, self._certificate)


class Entry:
    """What was found out about one header list, with one certificate or none."""

    __slots__ = ("access", "head", "most_bytes")

    def __init__(self, head: RequestHead, access: Access, most_bytes: int) -> None:
        self.head = head  # that a call has behind the door
        self.access = access
        self.most_bytes = most_bytes  # of a message; 0: no limit of its own


_Known: TypeAlias = "tuple[RequestHead | None, Certificate | None, Entry | None]"
_Shown: TypeAlias = "tuple[bytes, Field | None]"
"""A path, and the only credential that a call shows, or None."""
_NOTHING_KNOWN: Final[_Known] = (None, None, None)


class Door:
    """Decides about calls. One for all connections of a process."""

    def __init__(self, settings: DoorSettings, clock: Callable[[], float], read_token: TokenReader | None = None):
        """clock: Unix time."""
        self._clock = clock
        self.apply(settings, read_token)

    def apply(self, settings: DoorSettings, read_token: TokenReader | None) -> None:
        """Put another config in force: everything is found out anew."""
        self._settings = settings
        self._read_token = read_token
        self._identity = frozenset(
            name for name in (AUTHORIZATION, settings.api_key_header, settings.tell_upstream, _CALLER_RAW) if name
        )
        self.forget()

    def open_for_all(self) -> None:
        """Access is no longer checked: streams that came in while it was go on as if they had everything."""
        grant = Grant(anonymous=True, public=_ANY, direct=_ANY, rpcs=frozenset(PATHS.values()), allow=frozenset({ALL}))
        self.apply(DoorSettings(Policy((grant,), {}), ApiKeys(()), is_open=True), None)

    def forget(self) -> None:
        """Find out everything anew, since an issuer's keys have changed."""
        self._era = object()
        self._callers: dict[_Shown, tuple[Principal, Scope]] = {}
        self._tokens: dict[str, Principal] = {}
        self._with_certificates: dict[tuple[int, int], _Known] = {}

    def enter(self, head: RequestHead, certificate: Certificate | None) -> Entry:
        """Let a call in.

        certificate: of the connection, verified; None if the peer showed none.
        :raises GatewayError: if the call may not be made.
        """
        known: Entry | None = head.admitted
        if certificate is not None:
            _, _, known = self._with_certificates.get((id(head), id(certificate)), _NOTHING_KNOWN)
        if known is not None and self.still_holds(known.access):
            return known
        access = self.found(head.path, head.fields, certificate)
        inner = RequestHead(
            head.path, self._fields_behind(head.fields, access), head.encoding, head.accepts, head.timeout,
            head.size, head.http_status, None, access,
        )  # fmt: skip
        entry = Entry(inner, access, access.scope.most_bytes or 0)
        if certificate is None:
            head.admitted = entry
        else:
            make_room(self._with_certificates, _KEPT)
            # It holds both, so their ids stay their own.
            self._with_certificates[id(head), id(certificate)] = (head, certificate, entry)
        return entry

    def still_holds(self, access: Access) -> bool:
        """Has nothing changed, and nothing expired, since this was found out?"""
        until = access.principal.until
        return access.era is self._era and (until is None or self._clock() < until)

    def found(self, path: bytes, fields: Fields, certificate: Certificate | None) -> Access:
        """:raises GatewayError: if the call may not be made."""
        settings = self._settings
        shown = [field for field in fields if field[0] == AUTHORIZATION or field[0] == settings.api_key_header]
        # A look-up takes no longer for what is nearly right: a dict compares only what has the same keyed hash.
        key = (path, shown[0] if len(shown) == 1 else None) if certificate is None and len(shown) <= 1 else None
        known = self._callers.get(key) if key is not None else None
        if known is None or (known[0].until is not None and self._clock() >= known[0].until):
            rpc = PATHS.get(path, "")
            is_open = settings.is_open or (rpc in PROBES and settings.open_probes)
            principal = self._principal(shown, certificate, is_open=is_open)
            known = (principal, self._scope(principal, rpc))
            if key is not None:
                make_room(self._callers, _KEPT)
                self._callers[key] = known
        return Access(*known, self._era, self, path, fields, certificate)

    def _scope(self, principal: Principal, rpc: str) -> Scope:
        """:raises GatewayError: if it may not be called."""
        is_probe = rpc in PROBES
        if is_probe and (principal is not NOBODY or self._settings.open_probes):
            return self._settings.policy.maybe_scope(principal, HEALTH) or NOTHING
        scope = self._settings.policy.maybe_scope(principal, rpc) if rpc and not is_probe else None
        if scope is not None:
            return scope
        if principal is NOBODY:
            raise Unauthenticated(self.how_to, "none")
        if not rpc:
            raise UnknownMethod("Method not found!")
        raise Forbidden(f"{rpc} is not for this caller; a grant with `rpcs: [{rpc}]` in the gateway's config lets it")

    # Who it is

    def _principal(self, shown: Fields, certificate: Certificate | None, *, is_open: bool) -> Principal:
        """:raises Unauthenticated: if what he shows does not count. Of an RPC that is open to all he is nobody then."""
        try:
            found = self._named(shown, certificate)
        except GatewayError:
            if is_open:
                return NOBODY
            raise
        return self._settings.policy.known(found) if found is not NOBODY else found

    def _named(self, shown: Fields, certificate: Certificate | None) -> Principal:
        """Whom the credentials name: what the call itself shows counts before its connection's certificate."""
        settings = self._settings
        if len(shown) > 1:
            raise Unauthenticated("the call has several credentials; send one of them", "several")
        if not shown:
            if certificate and settings.certificates is not None:
                return settings.certificates.principal(certificate)
            return NOBODY
        name, value = shown[0]
        text = value.decode("latin-1").strip()
        if name == AUTHORIZATION:
            if text[: len(_BEARER)].lower() != _BEARER:
                raise Unauthenticated(f"the scheme of 'authorization' is not Bearer; {self.how_to}", "malformed")
            text = text[len(_BEARER) :].strip()
            if self._read_token is not None and text.count(".") == 2:
                return self._of_token(text, self._read_token)
        return settings.api_keys.principal(text, self._clock())

    def _of_token(self, token: str, read: TokenReader) -> Principal:
        known = self._tokens.get(token)
        if known is None:
            known = read(token)
            make_room(self._tokens, _KEPT)
            self._tokens[token] = known
        elif known.until is not None and self._clock() >= known.until:
            raise Unauthenticated("the token has expired", "expired")
        return known

    @property
    def how_to(self) -> str:
        """What would be right."""
        settings = self._settings
        ways = []
        if settings.api_keys:
            ways.append(f"an API key in '{settings.api_key_header.decode()}' or as 'authorization: Bearer …'")
        if settings.takes_tokens:
            ways.append("a JWT as 'authorization: Bearer …'")
        if settings.certificates is not None:
            ways.append("a client certificate")
        return f"say who is calling: {', or '.join(ways)}" if ways else "nobody can call: no way to say who is calling"

    # What the call has behind the door

    def _fields_behind(self, fields: Fields, access: Access) -> Fields:
        settings, principal = self._settings, access.principal
        is_free = access.scope.allows_all
        passed = settings.forward_credentials
        kept = [
            field
            for field in fields
            if (field[0] not in self._identity and (is_free or field[0] != _REPLAYED))
            or (passed and field[0] in (AUTHORIZATION, settings.api_key_header) and field[0] != settings.tell_upstream)
        ]
        if settings.tell_upstream and principal is not NOBODY:
            kept.append(NeverIndexed(settings.tell_upstream, quote(principal.name, _PLAIN).encode()))
        return tuple(kept)
