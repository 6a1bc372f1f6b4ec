"""Config of access: how callers are known, and what they may. Without this section everybody may everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from gateway.access.api_keys import parse_date, parse_hash
from gateway.access.principal import is_name
from gateway.access.rpcs import NAMED, WORDS
from gateway.config.findings import known
from gateway.config.section import Section
from gateway.config.units import (
    GIB,
    HOURS,
    KIB,
    MINUTES,
    SECONDS,
    Duration,
    File,
    MetadataKey,
    Size,
    Switch,
    refused,
)


def _caller_name(text: str) -> str:
    if not is_name(text):
        raise refused("")
    return text


CallerName = Annotated[
    str,
    AfterValidator(_caller_name),
    WithJsonSchema({"type": "string", "x-kind": "caller or group", "x-range": "1 to 200 printable characters"}),
]
"""Who calls, as an authenticator says it; or a group of callers."""


def _sha256(text: str) -> str:
    try:
        return parse_hash(text).hex()
    except ValueError:
        # The text may be the key itself, written here by mistake. It is in no finding.
        raise refused("is no SHA-256", "64 hex digits, as `inference-gateway keys new NAME` prints them") from None


Sha256 = Annotated[
    str, AfterValidator(_sha256), WithJsonSchema({"type": "string", "x-kind": "SHA-256", "x-range": "64 hex digits"})
]


def _date(text: str) -> str:
    try:
        parse_date(text)
    except ValueError as error:
        raise refused("is no date", str(error).removeprefix("needs ")) from None
    return text


Date = Annotated[
    str,
    AfterValidator(_date),
    WithJsonSchema({"type": "string", "x-kind": "date", "x-range": "a day or a time in UTC"}),
]


def _rpc(word: str) -> str:
    if word not in WORDS and word not in NAMED:
        raise refused(f"no RPC '{word[:100]}'", known((*WORDS, *NAMED), word))
    return word


RpcWord = Annotated[
    str,
    AfterValidator(_rpc),
    WithJsonSchema(
        {
            "type": "string",
            "x-kind": "RPC",
            "x-range": "`inference`, `metadata`, `outcomes`, `details`, `control`, or an RPC",
        }
    ),
]


def is_safe_url(text: str) -> bool:
    """Can nobody on the way change what is read from there? So it is by https, or on this host."""
    try:
        parts = urlsplit(text)
        host = parts.hostname
    except ValueError:
        return False
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and host in _THIS_HOST))


_THIS_HOST: Final = ("localhost", "127.0.0.1", "::1")


def _url(text: str) -> str:
    if not is_safe_url(text):
        raise refused("")
    return text


Url = Annotated[
    str,
    AfterValidator(_url),
    WithJsonSchema({"type": "string", "x-kind": "URL", "x-range": "https; http on this host only"}),
]


class Key(Section):
    """A caller's API key, by its hash."""

    caller: CallerName = Field(description="The caller whose key it is. One may have several.", examples=["team-a"])
    sha256: Sha256 = Field(description="The SHA-256 of the key, in hex. `inference-gateway keys new NAME` makes both.")
    expires: Date | None = Field(
        default=None, description="From then on the key is refused, in UTC.", examples=["2030-01-31"]
    )


class Jwt(Section):
    """An issuer of JSON Web Tokens, such as an OpenID Connect provider. Needs the package's extra `access`."""

    issuer: Annotated[str, Field(min_length=1, max_length=1000)] = Field(
        description="What the claim `iss` must be, to the letter.", examples=["https://id.example.com/realms/main"]
    )
    audience: tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...] = Field(
        min_length=1,
        max_length=20,
        description="The claim `aud` must have one of these, or a token for another service would count here.",
        examples=[["inference"]],
    )
    jwks: Url | None = Field(
        default=None,
        description="Where the issuer's public keys are. Without it and without `jwks_file`: where "
        "`ISSUER/.well-known/openid-configuration` says.",
        examples=["https://id.example.com/realms/main/protocol/openid-connect/certs"],
    )
    jwks_file: File | None = Field(
        default=None, description="A file with the public keys, in place of a URL. It is followed as this file is."
    )
    ca: File | None = Field(
        default=None,
        description="PEM file with the authority of the issuer's own server, if it is none that the system trusts.",
    )
    algorithms: tuple[
        Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"], ...
    ] = Field(
        default=("RS256", "ES256"),
        min_length=1,
        description="The signatures that count. All have public keys: a secret that is shared can't be configured.",
    )
    caller: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        default="sub",
        description="The claim with the caller's name; dots lead into objects. Choose one that users can't choose.",
        examples=["azp"],
    )
    groups: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        default=None,
        description="The claim with the caller's groups: a list, or a text with spaces between them.",
        examples=["realm_access.roles"],
    )
    prefix: Annotated[str, Field(max_length=100)] = Field(
        default="",
        description="Put before the names of callers and groups, so that those of this issuer are no one else's.",
        examples=["okta:"],
    )
    leeway: Annotated[float, Duration(0, 5 * MINUTES)] = Field(
        default=30.0, description="How much the issuer's clock may differ from this one."
    )
    refresh: Annotated[float, Duration(10 * SECONDS, 24 * HOURS)] = Field(
        default=10 * MINUTES,
        description="How often keys are fetched. A token with a key that is not known fetches them too, at most "
        "every 30s; until they are there it gets UNAVAILABLE.",
    )


class Certificates(Section):
    """Callers are known by their client certificates. Needs `server.tls.client_ca`."""

    name: Literal["spiffe", "dns", "common_name"] = Field(
        default="spiffe",
        description="What names the caller: the one URI of the SAN, a SPIFFE id; the one DNS name of it; or the "
        "subject's common name.",
    )
    trust_domain: Annotated[str, Field(min_length=1, max_length=255)] | None = Field(
        default=None, description="The trust domain that SPIFFE ids must be of.", examples=["example.org"]
    )
    prefix: Annotated[str, Field(max_length=100)] = Field(default="", description="As of `jwt`.")


Pattern = Annotated[
    str,
    Field(min_length=1, max_length=255),
    WithJsonSchema({"type": "string", "x-kind": "name of a model", "x-range": "a `*` at its end stands for any rest"}),
]


class Grant(Section):
    """What some callers may do. Grants only add; a caller for whom none holds may nothing."""

    callers: tuple[CallerName, ...] = Field(
        default=(),
        max_length=10_000,
        description="For these callers. `callers` and `groups` add up.",
        examples=[["team-a"]],
    )
    groups: tuple[CallerName, ...] = Field(
        default=(), max_length=10_000, description="For callers of these groups.", examples=[["vision"]]
    )
    everybody: Switch = Field(default=False, description="For everybody who has shown who he is.")
    anonymous: Switch = Field(default=False, description="For everybody, also without credentials.")
    models: tuple[Pattern, ...] = Field(
        default=(), max_length=10_000, description="The public models.", examples=[["imagenet", "photo-*"]]
    )
    direct: tuple[Pattern, ...] = Field(
        default=(),
        max_length=10_000,
        description="Triton's own names, as far as `direct.models` lets them be called at all.",
        examples=[["*"]],
    )
    rpcs: tuple[RpcWord, ...] = Field(
        default=("inference", "metadata"),
        max_length=100,
        description="The RPCs: `inference` (ModelInfer, ModelStreamInfer, the typed API), `metadata` (ServerMetadata, "
        "ModelMetadata, ModelReady), `outcomes` (reports for experiments), `details` (RepositoryIndex, ModelConfig, "
        "ModelStatistics), `control` (what "
        "changes a server, or reads its shared memory; `server.control` must let it in as well), `Reflection`, or "
        "single ones by name.",
        examples=[["inference", "ModelStatistics"]],
    )
    allow: tuple[Literal["all", "shared_memory", "sequences", "priority", "timeout", "reserved"], ...] = Field(
        default=(),
        description="What may be in requests beside tensors: shared memory, `sequence_…`, `priority`, `timeout`, and "
        "`reserved`, which is `triton_…` and `headers`. Sequence ids are each caller's own, but with `all`. "
        "Without `all`, a large request is collected before it is "
        "forwarded, since what is not allowed can be anywhere in it.",
        examples=[["sequences"]],
    )
    max_message_bytes: Annotated[int, Size(1 * KIB, 2 * GIB - 1)] | None = Field(
        default=None, description="The largest message of such a call. Without it: `server.max_message_bytes`."
    )

    @model_validator(mode="after")
    def _for_somebody(self) -> Grant:
        if not (self.callers or self.groups or self.everybody or self.anonymous):
            raise refused("is for nobody", "'callers', 'groups', 'everybody' or 'anonymous'")
        return self


class Access(Section):
    """Who may call what. With this section only what is granted is possible; every change of it is taken over live.

    docs/access.md has examples for common providers.
    """

    open: Switch = Field(
        default=False,
        description="Everybody may call everything, and that is meant: a network policy or a mesh decides who gets "
        "here. As without this section, but for the warning.",
    )
    api_keys: tuple[Key, ...] = Field(default=(), max_length=100_000, description="Keys, by their hashes.")
    api_key_file: File | None = Field(
        default=None,
        description="A file with more of them, a line each: NAME SHA256, and maybe a date on which it expires. `#` "
        "begins a comment. It is followed as this file is.",
        examples=["keys.txt"],
    )
    api_key_header: MetadataKey = Field(
        default="x-api-key", description="The metadata key that has a key. `authorization: Bearer KEY` is the same."
    )
    jwt: tuple[Jwt, ...] = Field(default=(), max_length=20, description="Issuers of tokens.")
    certificates: Certificates | None = Field(
        default=None, description="Callers are known by certificates. `certificates: {}` switches it on as it is."
    )
    groups: Mapping[CallerName, tuple[CallerName, ...]] = Field(
        default_factory=dict,
        max_length=10_000,
        description="Groups by name, with the names of their callers; beside those that tokens tell.",
        examples=[{"vision": ["team-a", "team-b"]}],
    )
    grants: tuple[Grant, ...] = Field(
        default=(), max_length=10_000, description="What callers may do. Several grants add up."
    )
    health: Literal["open", "granted"] = Field(
        default="open",
        description="`open`: everybody may ask ServerLive, ServerReady and `grpc.health.v1.Health`, of the server as a "
        "whole; of a model, who may use it. `granted`: nobody without credentials may.",
    )
    tell_upstream: MetadataKey | None = Field(
        default=None,
        description="The metadata key under which Triton gets the caller's name, percent-encoded. What callers send "
        "under it themselves is dropped.",
        examples=["x-caller"],
    )
    forward_credentials: Switch = Field(
        default=False, description="Pass API keys and tokens on to Triton. Without it they go no further than this."
    )

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Access:
        if self.open and len(self.model_fields_set) > 1:
            raise refused("is 'open', so nothing else here has an effect", "'open: true' alone, or without it")
        return self
