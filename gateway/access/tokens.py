"""access (pure): JWTs, checked by PyJWT. What is here beside that is what it leaves to its users.

Only algorithms with public keys can be configured, so neither `none` nor an HMAC that takes a public key for its
secret can pass. What a token says of where its key is (`jku`, `jwk`, `x5u`) is never read. Keys come from the issuer's
JWKS, which others fetch (`gateway.key_fetching`).
source: RFC 7519, RFC 7517, RFC 8725 (best current practices).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jwt
from jwt.exceptions import ExpiredSignatureError, InvalidAudienceError, InvalidTokenError, PyJWKError, PyJWTError

from gateway.access.principal import MOST_GROUPS, Principal, is_name
from gateway.errors import Unauthenticated

MOST_TOKEN: Final = 8192  # characters: header lists end there too
_MOST_KEYS: Final = 100  # of one issuer
_MOST_KID: Final = 200  # characters

_KINDS: Final = {
    "RS256": "RSA", "RS384": "RSA", "RS512": "RSA", "PS256": "RSA", "PS384": "RSA", "PS512": "RSA",
    "ES256": "EC", "ES384": "EC", "ES512": "EC", "EdDSA": "OKP",
}  # fmt: skip
ALGORITHMS: Final = tuple(_KINDS)
_LEAST_RSA_BITS: Final = 2048  # RFC 7518 section 3.3


class UnknownKid(Unauthenticated):
    """A token's key is not among those that are known of its issuer, which may have a new one."""


@dataclass(frozen=True, slots=True)
class Issuer:
    """An issuer whose tokens count."""

    issuer: str
    audience: tuple[str, ...]
    algorithms: tuple[str, ...] = ("RS256", "ES256")
    caller: str = "sub"  # the claim with the caller's name; dots lead into objects
    groups: str = ""  # the claim with his groups; "": none
    prefix: str = ""  # before his name and each group
    leeway: float = 30.0  # seconds that clocks may differ


@dataclass(frozen=True, slots=True)
class _Key:
    kid: str
    kind: str
    key: Any  # a public key of `cryptography`


class KeySet:
    """The public keys of one issuer, the first `_MOST_KEYS`. Others than signing keys that can be used are left out.

    left_out: how many further ones there are.
    """

    def __init__(self, jwks: Any, algorithms: Sequence[str]) -> None:
        """jwks: a JSON Web Key Set, as an issuer may send it. raises: ValueError if it is none, or of no use."""
        listed = jwks.get("keys") if isinstance(jwks, dict) else None
        if not isinstance(listed, list):
            raise ValueError("is no JSON Web Key Set: it has no list 'keys'")
        kinds = {_KINDS[algorithm] for algorithm in algorithms}
        fitting = [each for each in listed if _may_sign(each, kinds)]
        self.left_out = max(0, len(fitting) - _MOST_KEYS)
        self._keys = [key for each in fitting[:_MOST_KEYS] if (key := _maybe_key(each)) is not None]
        if not self._keys:
            raise ValueError("has no public key for the algorithms that are configured")

    def fitting(self, kid: str, algorithm: str) -> Sequence[_Key]:
        """The keys that a token may be signed with. A token without a `kid` fits a set with one key of its kind."""
        same = [key for key in self._keys if key.kind == _KINDS[algorithm]]
        if not kid:
            return same if len(same) == 1 else []
        return [key for key in same if key.kid == kid]


def _may_sign(jwk: Any, kinds: set[str]) -> bool:
    """Is it meant to be a public key that tokens may be signed with?"""
    if not isinstance(jwk, dict) or not isinstance(jwk.get("kty"), str):
        return False
    return jwk["kty"] in kinds and jwk.get("use", "sig") == "sig" and "d" not in jwk


def _maybe_key(jwk: dict[str, Any]) -> _Key | None:
    try:
        key = jwt.PyJWK(jwk).key
    except (PyJWKError, PyJWTError, ValueError, TypeError, NotImplementedError):
        return None
    if getattr(key, "key_size", _LEAST_RSA_BITS) < _LEAST_RSA_BITS and jwk["kty"] == "RSA":
        return None
    kid = jwk.get("kid", "")
    return _Key(kid, jwk["kty"], key) if isinstance(kid, str) and len(kid) <= _MOST_KID else None


class Tokens:
    """Checks the tokens of several issuers."""

    def __init__(self, issuers: Sequence[Issuer], keys: Mapping[str, KeySet]) -> None:
        """keys: by issuer; one that is missing has not been read yet."""
        self._issuers = {issuer.issuer: issuer for issuer in issuers}
        self._keys = keys

    def principal(self, token: str) -> Principal:
        """Who a token is for. PyJWT compares its times with the clock of this machine.

        :raises UnknownKid: if another key set of the issuer may know the key. `issuer` names it.
        :raises Unauthenticated: if the token does not count.
        """
        if len(token) > MOST_TOKEN:
            raise Unauthenticated("the token is too long", "malformed")
        header, issuer = self._unverified(token)
        algorithm, kid = header.get("alg"), header.get("kid", "")
        if algorithm not in issuer.algorithms:
            raise Unauthenticated("the token's algorithm is not among those that are configured", "algorithm")
        if "crit" in header or not isinstance(kid, str) or len(kid) > _MOST_KID:
            raise Unauthenticated("the token's header has something that is not understood", "malformed")
        known = self._keys.get(issuer.issuer)
        fitting = known.fitting(kid, algorithm) if known is not None else ()
        if not fitting:
            raise UnknownKid("the token is signed with a key that its issuer does not publish", issuer.issuer)
        for key in fitting[:-1]:
            try:
                return _principal(issuer, _claims(token, key, issuer, algorithm))
            except Unauthenticated:
                continue
        return _principal(issuer, _claims(token, fitting[-1], issuer, algorithm))

    def _unverified(self, token: str) -> tuple[dict[str, Any], Issuer]:
        """A token's header, and its issuer; both are what it says of itself, so they only choose how it is checked."""
        try:
            whole = jwt.decode_complete(token, options={"verify_signature": False})
        except (PyJWTError, ValueError, RecursionError, TypeError):
            raise Unauthenticated("the bearer token is no JWT", "malformed") from None
        payload = whole.get("payload")
        named = payload.get("iss") if isinstance(payload, dict) else None
        issuer = self._issuers.get(named) if isinstance(named, str) else None
        if issuer is None:
            raise Unauthenticated("the token's issuer is not one that is configured", "issuer")
        return whole["header"], issuer


def _claims(token: str, key: _Key, issuer: Issuer, algorithm: str) -> dict[str, Any]:
    try:
        claims: dict[str, Any] = jwt.decode(
            token,
            key.key,
            algorithms=[algorithm],
            audience=list(issuer.audience),
            issuer=issuer.issuer,
            leeway=issuer.leeway,
            options={"require": ["exp", "iss", "aud"]},
        )
    except ExpiredSignatureError:
        raise Unauthenticated("the token has expired", "expired") from None
    except InvalidAudienceError:
        raise Unauthenticated("the token is not meant for this gateway: its audience is another", "audience") from None
    except InvalidTokenError as error:
        raise Unauthenticated(f"the token does not count ({type(error).__name__})", "invalid") from None
    except (PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
        raise Unauthenticated("the token does not count", "invalid") from None
    return claims


def _principal(issuer: Issuer, claims: Mapping[str, Any]) -> Principal:
    name = _claim(claims, issuer.caller)
    if not isinstance(name, str) or not is_name(issuer.prefix + name) or not name:
        raise Unauthenticated(f"the token's claim '{issuer.caller}' is no name of a caller", "claims")
    found: Any = _claim(claims, issuer.groups) if issuer.groups else ()
    if isinstance(found, str):
        found = found.split()  # as `scope` lists them
    is_list = isinstance(found or (), list | tuple)
    groups = [issuer.prefix + group for group in found or () if isinstance(group, str) and group] if is_list else []
    if not is_list or len(groups) > MOST_GROUPS:
        raise Unauthenticated(f"the token's claim '{issuer.groups}' is no list of groups that fits", "claims")
    try:
        until = float(claims["exp"]) + issuer.leeway
    except OverflowError:
        raise Unauthenticated("the token's claim 'exp' is no time", "claims") from None
    return Principal(
        issuer.prefix + name, frozenset(group for group in groups if is_name(group)), by="jwt", until=until
    )


def _claim(claims: Mapping[str, Any], path: str) -> Any:
    """A claim by its name; else by a path of names with dots between them, as Keycloak's `realm_access.roles`."""
    if path in claims:
        return claims[path]
    found: Any = claims
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
