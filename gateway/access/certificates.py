"""access (pure): who the peer of a TLS connection is, by a certificate that TLS itself has verified.

source: SPIFFE X.509-SVID section 2 (exactly one URI name); the form of a certificate is that of
`ssl.SSLSocket.getpeercert`.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from gateway.access.principal import Principal, is_name
from gateway.errors import Unauthenticated

Certificate: TypeAlias = Mapping[str, Any]
"""As `getpeercert` gives it. Any: its values have several shapes."""

SPIFFE: Final = "spiffe"
DNS: Final = "dns"
COMMON_NAME: Final = "common_name"
SOURCES: Final = (SPIFFE, DNS, COMMON_NAME)


@dataclass(frozen=True, slots=True)
class Certificates:
    """How certificates name callers."""

    source: str = SPIFFE
    trust_domain: str = ""  # of SPIFFE ids; "": any that the authority has signed
    prefix: str = ""  # before the name

    def principal(self, certificate: Certificate) -> Principal:
        """:raises Unauthenticated: if the certificate names nobody in this way, or several."""
        names = self._names(certificate)
        if len(names) != 1 or not is_name(self.prefix + names[0]):
            found = "no name" if not names else f"{len(names)} names"
            raise Unauthenticated(f"the client's certificate has {found} of the kind '{self.source}'", "certificate")
        ends = certificate.get("notAfter")
        until = float(ssl.cert_time_to_seconds(ends)) if isinstance(ends, str) else None
        return Principal(self.prefix + names[0], by="certificate", until=until)

    def _names(self, certificate: Certificate) -> list[str]:
        others: Any = certificate.get("subjectAltName", ())
        if self.source == DNS:
            return [str(value) for kind, value in others if kind == "DNS"]
        if self.source == COMMON_NAME:
            subject: Any = certificate.get("subject", ())
            return [str(value) for part in subject for key, value in part if key == "commonName"]
        uris = [str(value) for kind, value in others if kind == "URI"]
        domain = f"spiffe://{self.trust_domain}/" if self.trust_domain else "spiffe://"
        # An SVID has one URI and no other: with two of them it would depend on the reader who it is.
        return uris if len(uris) == 1 and uris[0].startswith(domain) and len(uris[0]) > len(domain) else []
