"""Admin: who may read it, if that is configured, and who may change something: never a page in a browser.

Whoever is on this host may, as may a certificate that TLS has verified, and a token: `Authorization: Bearer TOKEN`, or
the password of a login, which browsers ask for. Tokens are made as API keys are, and known by their hashes alone.
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aiohttp import web

from gateway.access.api_keys import MOST_KEY, hash_of

_CHALLENGE = {"WWW-Authenticate": 'Basic realm="gateway admin", charset="UTF-8"'}


@dataclass(frozen=True, slots=True)
class AdminAccess:
    """How the admin plane is guarded."""

    hashes: tuple[bytes, ...] = ()  # SHA-256 of tokens
    open_paths: frozenset[str] = frozenset({"/healthz", "/readyz"})  # for probes, which have no credentials
    tls: tuple[str, str, str | None] | None = None  # PEM files: certificate, key, authority of clients

    @property
    def asks(self) -> bool:
        return bool(self.hashes) or (self.tls is not None and self.tls[2] is not None)

    @property
    def told(self) -> dict[str, list[str]]:
        """What of it may change while the gateway runs, as JSON values."""
        return {"tokens": [digest.hex() for digest in self.hashes], "open": sorted(self.open_paths)}

    @classmethod
    def from_told(cls, told: Mapping[str, Sequence[str]]) -> AdminAccess:
        return cls(tokens_of(told["tokens"]), frozenset(told["open"]))

    def context(self) -> ssl.SSLContext | None:
        """:raises OSError: if a file can't be used."""
        if self.tls is None:
            return None
        certificate, key, client_ca = self.tls
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(certificate, key)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_OPTIONAL  # probes have none
        return context


def maybe_refusal(access: AdminAccess, request: web.Request, *, is_local: bool) -> web.Response | None:
    """The answer for somebody who may not read this; None if he may.

    is_local: does the admin plane listen on this host alone?
    """
    if is_local and not _names_this_host(request.host):
        # A page in a browser of this host whose name leads here (DNS rebinding), for which the browser would read it.
        return _text(421, "this is the admin plane of a gateway; ask for it as localhost or by its address")
    if not access.asks or request.path in access.open_paths or _is_from_here(request):
        return None
    if request.transport is not None and request.transport.get_extra_info("peercert"):
        return None
    token = _token_of(request)
    digest = hash_of(token) if len(token) <= MOST_KEY else b""
    found = False
    for known in access.hashes:  # all of them, however early one fits
        found |= hmac.compare_digest(known, digest)
    if token and found:
        return None
    answer = _text(401, "a token, or a client certificate, is needed (admin.tokens in the gateway's config)")
    answer.headers.update(_CHALLENGE)
    return answer


def maybe_refusal_of_change(access: AdminAccess, request: web.Request) -> web.Response | None:
    """The answer for somebody who may read this and may not change anything; None if he may.

    A browser says where a POST comes from, whatever page makes it send one, so what says so is refused: it could have
    the operator's login, or be on his host. Where nobody is asked who he is, only who is on this host may.
    """
    if "Origin" in request.headers or "Sec-Fetch-Site" in request.headers:
        return _text(403, "pages in browsers change nothing here; use a command, such as curl")
    if not access.asks and not _is_from_here(request):
        return _text(403, "only from this host, or with a token (admin.tokens in the gateway's config)")
    return None


def _text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text + "\n", headers={"Cache-Control": "no-store"})


def _token_of(request: web.Request) -> str:
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value.strip(), validate=True).decode("utf-8", "replace").partition(":")[2]
    except ValueError:
        return ""


def _is_from_here(request: web.Request) -> bool:
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    if not isinstance(peer, tuple):
        return peer is not None  # a unix socket, which only this user may use
    return _is_loopback(str(peer[0]))


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _names_this_host(host: str) -> bool:
    """host: as of the field `Host`, with or without a port. A name without a dot is in no DNS that strangers fill."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    return "." not in name.rstrip(".") or _is_loopback(name)


def tokens_of(texts: Sequence[str]) -> tuple[bytes, ...]:
    """texts: hashes in hex."""
    return tuple(bytes.fromhex(text) for text in texts)
