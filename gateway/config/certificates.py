"""Config: checks of the PEM files of TLS sections: their contents, whether key and certificate fit, and their validity.

Reads files and a given clock. TLS itself is `transport`'s; this says beforehand what it would refuse.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path as FilePath

from gateway.config.findings import Path, Problem, Severity, dotted
from gateway.config.schema import Config

_SOON = timedelta(days=14)  # Let's Encrypt and cert-manager renew thirty days before: at fourteen, that has failed
_SOON_SHARE = 0.2  # of its lifetime, for certificates that live for hours

_SEQUENCE, _UTC_TIME, _VERSION = 0x30, 0x17, 0xA0  # DER tags


def problems(config: Config, now: datetime) -> Iterator[Problem]:
    """What is wrong with the files of every TLS section. now: aware of its time zone."""
    for path, cert, key in _pairs(config):
        found = _pair_problem(path, cert, key)
        if found is None:
            found = _time_problem((*path, "cert"), cert, now)
        if found is not None:
            yield found
    for path, file in _authorities(config):
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
        except (OSError, ValueError):
            yield Problem(path, "holds no certificate", "a PEM file with one or more")


def expiries(config: Config) -> dict[str, float]:
    """Until when the gateway's own certificates are valid, in Unix time, by the key that names each."""
    return {dotted((*path, "cert")): validity(cert)[1].timestamp() for path, cert, _ in _pairs(config)}


def _pairs(config: Config) -> Iterator[tuple[Path, str, str]]:
    """Certificate and key that the gateway shows: to clients, and to upstreams that want one."""
    server = config.server.tls
    if server is not None:
        yield ("server", "tls"), server.cert, server.key
    for name, upstream in config.upstreams.items():
        if upstream.tls is not None and upstream.tls.cert is not None and upstream.tls.key is not None:
            yield ("upstreams", name, "tls"), upstream.tls.cert, upstream.tls.key


def _authorities(config: Config) -> Iterator[tuple[Path, str]]:
    server = config.server.tls
    if server is not None and server.client_ca is not None:
        yield ("server", "tls", "client_ca"), server.client_ca
    for name, upstream in config.upstreams.items():
        if upstream.tls is not None and upstream.tls.ca is not None:
            yield ("upstreams", name, "tls", "ca"), upstream.tls.ca


def _pair_problem(path: Path, cert: str, key: str) -> Problem | None:
    try:
        validity(cert)
    except (OSError, ValueError):
        return Problem((*path, "cert"), "holds no certificate", "a PEM file, the gateway's own certificate first")
    try:
        # Without a password to try, OpenSSL would ask for it at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return Problem(
                (*path, "key"), "does not belong to the certificate in `cert`", "the key that it was made for"
            )
        return Problem((*path, "key"), "holds no key that can be used", "a PEM file with a private key, not encrypted")
    except OSError as error:
        return Problem((*path, "key"), f"cannot be read: {error.strerror}", "a readable PEM file")
    return None


def _time_problem(path: Path, cert: str, now: datetime) -> Problem | None:
    """An expired certificate is no error: a gateway that is restarted must not stay away for it."""
    begins, ends = validity(cert)
    if now >= ends:
        wrong = f"the certificate expired on {_shown(ends)}; peers refuse it"
    elif now < begins:
        wrong = f"the certificate is not valid before {_shown(begins)}; peers refuse it, or this host's clock is slow"
    elif ends - now < min(_SOON, (ends - begins) * _SOON_SHARE):
        wrong = f"the certificate expires on {_shown(ends)}"
    else:
        return None
    return Problem(path, wrong, "replace it with a renewed one", Severity.WARNING)


def _shown(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"


# X.509: `validity` is the fifth field of what is signed, after version, serial number, algorithm and issuer.


def validity(file: str) -> tuple[datetime, datetime]:
    """From when until when the first certificate of a PEM file is valid.

    :raises OSError, ValueError: if there is none.
    source: RFC 5280 sections 4.1 and 4.1.2.5.
    """
    text = FilePath(file).read_text("ascii")
    begin = text.index("-----BEGIN CERTIFICATE-----")
    end = text.index("-----END CERTIFICATE-----", begin)
    der = ssl.PEM_cert_to_DER_cert(text[begin:end] + "-----END CERTIFICATE-----")
    try:
        (_, certificate), _ = _element(der)
        (_, signed), _ = _element(certificate)
        (tag, _), rest = _element(signed)
        for _ in range(3 + (tag == _VERSION)):
            (tag, content), rest = _element(rest)
        if tag != _SEQUENCE:
            raise ValueError("no validity")
        begins, rest = _element(content)
        ends, _ = _element(rest)
        return _instant(*begins), _instant(*ends)
    except IndexError as error:
        raise ValueError("cut short") from error


def _element(der: bytes) -> tuple[tuple[int, bytes], bytes]:
    """The first element's tag and content, and what comes after it."""
    length, at = der[1], 2
    if length & 0x80:
        at += length & 0x7F
        length = int.from_bytes(der[2:at], "big")
    return (der[0], der[at : at + length]), der[at + length :]


def _instant(tag: int, content: bytes) -> datetime:
    text = content.decode("ascii")
    if tag == _UTC_TIME:  # two digits of the year: RFC 5280 says that 50 and above are of the last century
        text = ("19" if text[:2] >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=timezone.utc)
