"""Config: findings about access: files that can't be used, listeners that are open, policies that nobody can meet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path as FilePath

from gateway.access.api_keys import parse_keys
from gateway.access.policy import Names
from gateway.access.rpcs import CONTROL, named_by
from gateway.config.access import Access, is_safe_url
from gateway.config.findings import Path, Problem, Severity, known, show
from gateway.config.schema import Config
from gateway.config.units import is_loopback_host, split_address
from gateway.rpc.metadata import is_metadata

_AT: Path = ("access",)
_MOST = 20  # findings of one kind
_OF_ONE_HOP = ("traceparent", "tracestate", "user-agent")
"""Metadata that is not passed on, beside the protocol's own. `forwarding.metadata` decides; a test compares them."""


def problems(config: Config) -> Iterator[Problem]:
    """All problems of who may call what. Reads the files that `access` names."""
    if config.access is None:
        yield from _open(config)
    access = config.checked_access
    if access is None:
        return
    yield from _jwt(access)
    file_callers, faults = _file_callers(access)
    yield from faults
    yield from _unknowable(config, access)
    yield from _grants(config, access, {key.caller for key in access.api_keys} | file_callers)


def _open(config: Config) -> Iterator[Problem]:
    tls = config.server.tls
    is_closed = tls is not None and tls.client_ca is not None and tls.client_certificate == "required"
    if not is_loopback_host(split_address(config.listen)[0]) and not is_closed:
        wrong = "everybody who reaches it may call every model, since there is no 'access'"
        right = "'access' (docs/access.md); or 'access: {open: true}' if the network lets in only who may"
        yield Problem(("listen",), wrong, right, Severity.WARNING)


def _jwt(access: Access) -> Iterator[Problem]:
    if access.jwt and find_spec("jwt") is None:
        yield Problem((*_AT, "jwt"), "needs PyJWT", "pip install 'inference-gateway[access]'")
        return
    seen: set[str] = set()
    for index, jwt in enumerate(access.jwt):
        at = (*_AT, "jwt", index)
        if jwt.issuer in seen:
            yield Problem((*at, "issuer"), f"{show(jwt.issuer)} is listed twice", "write one entry per issuer")
        seen.add(jwt.issuer)
        if jwt.jwks is not None and jwt.jwks_file is not None:
            yield Problem((*at, "jwks_file"), "is given beside 'jwks'", "one of them")
        if jwt.jwks_file is not None:
            yield from _jwks((*at, "jwks_file"), jwt.jwks_file, jwt.algorithms)
        elif jwt.jwks is None and not is_safe_url(jwt.issuer):
            wrong = "is no https URL, so it can't be asked where its keys are"
            yield Problem((*at, "issuer"), wrong, "an https URL, or 'jwks' or 'jwks_file'")


def _jwks(at: Path, file: str, algorithms: tuple[str, ...]) -> Iterator[Problem]:
    from gateway.access.tokens import KeySet  # noqa: PLC0415  (PyJWT is there only where it is needed)

    try:
        left_out = KeySet(json.loads(FilePath(file).read_bytes()), algorithms).left_out
    except (OSError, ValueError, RecursionError) as error:
        wrong = str(error) if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError) else ""
        yield Problem(at, wrong or "is no JSON Web Key Set", "the JSON that the issuer publishes as its jwks_uri")
        return
    if left_out:
        wrong = f"has too many keys: {left_out} are left out, and tokens signed by them don't count"
        yield Problem(at, wrong, "the keys that are in use", Severity.WARNING)


def _file_callers(access: Access) -> tuple[set[str], list[Problem]]:
    """The callers whose keys are in the file, and what is wrong with it. No finding shows a line: it may have a key."""
    names: set[str] = set()
    faults: list[Problem] = []
    if access.api_key_file is None:
        return names, faults
    at = (*_AT, "api_key_file")
    try:
        for number, found in parse_keys(FilePath(access.api_key_file).read_text("utf-8")):
            if not isinstance(found, str):
                names.add(found.caller)
            elif len(faults) < _MOST:
                faults.append(Problem(at, f"line {number} is no key", found.removeprefix("needs ")))
    except (OSError, ValueError):
        faults.append(Problem(at, "can't be read", "a text file, a line for each key: NAME SHA256 [YYYY-MM-DD]"))
    return names, faults


def _unknowable(config: Config, access: Access) -> Iterator[Problem]:
    """Problems of ways to say who is calling."""
    tls, named = config.server.tls, access.certificates
    if named is not None and (tls is None or tls.client_ca is None):
        wrong = "no client shows a certificate, since none is asked for"
        yield Problem((*_AT, "certificates"), wrong, "server.tls.client_ca", Severity.WARNING)
    if access.tell_upstream is not None and not _reaches_triton(access.tell_upstream):
        wrong = f"has no effect: the gateway sends Triton no metadata '{access.tell_upstream}'"
        yield Problem((*_AT, "tell_upstream"), wrong, "another key, such as x-caller", Severity.WARNING)
    has_keys = bool(access.api_keys) or access.api_key_file is not None
    if not has_keys and not access.jwt and named is None and not any(grant.anonymous for grant in access.grants):
        wrong = "nobody can call: there is no way to say who is calling"
        yield Problem(_AT, wrong, "'api_keys', 'api_key_file', 'jwt' or 'certificates'", Severity.WARNING)
    if tls is not None and tls.client_certificate == "optional" and named is None:
        path = ("server", "tls", "client_certificate")
        yield Problem(path, "has no effect: no caller is known by one", "access.certificates", Severity.WARNING)
    prefixes = [(f"jwt[{index}]", jwt.prefix) for index, jwt in enumerate(access.jwt)]
    prefixes += [("certificates", named.prefix)] if named is not None else []
    for number, (what, prefix) in enumerate(prefixes):
        others = [
            other for other, theirs in prefixes[:number] if theirs.startswith(prefix) or prefix.startswith(theirs)
        ]
        others += ["api_keys"] if has_keys and not prefix else []
        if others and not (what == "certificates" and named is not None and named.name == "spiffe"):
            wrong = f"{what} and {others[0]} can give the same name to different callers"
            yield Problem(_AT, wrong, f"a 'prefix' of its own for {what}", Severity.WARNING)


def _reaches_triton(key: str) -> bool:
    return is_metadata(key.encode()) and not key.startswith("gateway-") and key not in _OF_ONE_HOP


def _grants(config: Config, access: Access, by_key: set[str]) -> Iterator[Problem]:
    is_closed_set = not access.jwt and access.certificates is None
    if is_closed_set:
        yield from _unmet(access, by_key)
    granted = {name for grant in access.grants for name in grant.callers}
    members = {name: {group for group, names in access.groups.items() if name in names} for name in by_key}
    for_groups = {group for grant in access.grants for group in grant.groups}
    if not any(grant.everybody or grant.anonymous for grant in access.grants):
        for name in sorted(n for n in by_key if n not in granted and members[n].isdisjoint(for_groups))[:_MOST]:
            yield Problem(
                (*_AT, "api_keys"), f"the key of {show(name)} opens nothing", "a grant for it", Severity.WARNING
            )
    for index, grant in enumerate(access.grants):
        at = (*_AT, "grants", index)
        yield from _models(config, at, grant.models)
        yield from _stars(at, "models", grant.models)
        yield from _stars(at, "direct", grant.direct)
        rpcs = named_by(grant.rpcs)
        if config.server.control == "none" and not rpcs.isdisjoint(CONTROL):
            wrong = "has RPCs that change servers, which server.control keeps from everybody"
            yield Problem((*at, "rpcs"), wrong, "server.control: all, or without them", Severity.WARNING)
        if grant.direct and config.direct.models == "none":
            wrong = "has no effect: direct.models is 'none'"
            yield Problem((*at, "direct"), wrong, "direct.models: variants, or leave it out", Severity.WARNING)
        if grant.anonymous and not rpcs.isdisjoint(CONTROL):
            wrong = "lets everybody change servers, also who does not say who he is"
            yield Problem((*at, "rpcs"), wrong, "a grant for callers or groups", Severity.WARNING)


def _models(config: Config, at: Path, patterns: tuple[str, ...]) -> Iterator[Problem]:
    for number, pattern in enumerate(patterns):
        names = Names.of([pattern])
        is_met = pattern == "*" or any(model in names for model in config.models)
        if not is_met and not _has_star_within(pattern):
            right = known(tuple(config.models), pattern)
            yield Problem((*at, "models", number), f"no public model {show(pattern)}", right, Severity.WARNING)


def _stars(at: Path, key: str, patterns: tuple[str, ...]) -> Iterator[Problem]:
    for number, pattern in enumerate(patterns):
        if _has_star_within(pattern):
            wrong = f"{show(pattern)} has a '*' that is not at its end, where it stands for itself"
            yield Problem((*at, key, number), wrong, "the beginning of names, and one '*'", Severity.WARNING)


def _has_star_within(pattern: str) -> bool:
    return "*" in pattern[:-1]


def _unmet(access: Access, callers: set[str]) -> Iterator[Problem]:
    """Problems of grants that no caller can meet, where all callers are known: by keys alone."""
    groups = {group for group, names in access.groups.items() if not callers.isdisjoint(names)}
    for index, grant in enumerate(access.grants):
        at = (*_AT, "grants", index)
        for key, named, possible in (("callers", grant.callers, callers), ("groups", grant.groups, groups)):
            for number, name in enumerate(named):
                if name not in possible:
                    what = (
                        f"no caller can be {show(name)}" if key == "callers" else f"no caller is of group {show(name)}"
                    )
                    yield Problem((*at, key, number), what, known(sorted(possible), name), Severity.WARNING)
