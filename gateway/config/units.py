"""Config: the small types of which settings are made. Each parses one text form, knows its range and describes itself.

They stand inside `Annotated[...]`. What they describe ends up in the JSON Schema under `x-` keys, from which both the
findings ("is 90s; a duration from 10ms to 60s") and the reference page are written, so the three cannot disagree.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MILLISECONDS, SECONDS, MINUTES, HOURS = 0.001, 1.0, 60.0, 3600.0
KIB, MIB, GIB = 2**10, 2**20, 2**30

_TIMES = {"ms": MILLISECONDS, "s": SECONDS, "m": MINUTES, "h": HOURS}
_SIZES = {"": 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_QUANTITY = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?([A-Za-z]*)", re.ASCII)
_METADATA_KEY = re.compile(r"[0-9a-z_.-]{1,100}")
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252}[A-Za-z0-9_.])?")

REFUSED = "refused"  # the type of our own pydantic errors; their context has `wrong` and `right`


def refused(wrong: str, right: str = "") -> PydanticCustomError:
    """The error for a validator to raise: what is wrong, and what would be right ("" to let the schema say it)."""
    return PydanticCustomError(REFUSED, "{wrong}; {right}", {"wrong": wrong, "right": right})


def duration_text(seconds: float) -> str:
    """0.25 → "250ms", 600 → "10m": the form in which people write it."""
    for unit, size in (("h", HOURS), ("m", MINUTES), ("s", SECONDS)):
        if seconds >= size and (seconds / size).is_integer():
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:g}s" if seconds >= 1 or seconds == 0 else f"{seconds * 1000:g}ms"


def size_text(octets: int) -> str:
    """268435456 → "256MiB"."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if octets >= size and octets % size == 0:
            return f"{octets // size}{unit}"
    return str(octets)


def _number(value: object, units: dict[str, float] | dict[str, int]) -> float | None:
    """The value in base units; None if it is not a quantity."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    found = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if found is None or found[2] not in units:
        return None
    return float(found[1]) * units[found[2]]


def _plain(function: Callable[[Any], Any]) -> CoreSchema:
    return core_schema.no_info_plain_validator_function(function)


@dataclass(frozen=True)
class Duration:
    """Seconds as float, written as a number of seconds or as "250ms", "5s", "2m", "1h"."""

    low: float
    high: float

    def parse(self, value: object) -> float:
        seconds = _number(value, {**_TIMES, "": SECONDS})
        if seconds is None or not self.low <= seconds <= self.high:
            raise refused("")
        return float(seconds)

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _plain(self.parse)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {
            "anyOf": [
                {"type": "number", "minimum": self.low, "maximum": self.high},
                {"type": "string", "pattern": r"^\d+(\.\d+)? ?(ms|s|m|h)?$"},
            ],
            "x-kind": "duration",
            "x-range": f"{duration_text(self.low)} to {duration_text(self.high)}",
        }


@dataclass(frozen=True)
class Size:
    """Bytes as int, written as a number of bytes or as "64KiB", "256MiB", "1GiB"."""

    low: int
    high: int

    def parse(self, value: object) -> int:
        octets = _number(value, _SIZES)
        if octets is None or not float(octets).is_integer() or not self.low <= octets <= self.high:
            raise refused("")
        return int(octets)

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _plain(self.parse)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {
            "anyOf": [
                {"type": "integer", "minimum": self.low, "maximum": self.high},
                {"type": "string", "pattern": r"^\d+(\.\d+)? ?(B|KiB|MiB|GiB|kB|MB|GB)?$"},
            ],
            "x-kind": "size",
            "x-range": f"{size_text(self.low)} to {size_text(self.high)}",
        }


def split_address(address: str) -> tuple[str, int]:
    """ "host:port" or "[v6]:port" → (host without brackets, port).

    :raises ValueError: if it has no port, the port is not 0 to 65535, or the host cannot be one.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) or int(port) > 65535:
        raise ValueError(address)
    if host.startswith("[") and host.endswith("]"):
        return str(ipaddress.IPv6Address(host[1:-1])), int(port)
    if not _HOST.fullmatch(host):
        raise ValueError(address)
    return host, int(port)


def is_loopback_host(host: str) -> bool:
    """Can an address with this host be reached from this host alone? False for names other than localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


DISCOVERED = "dns:///"
"""The prefix of an endpoint that stands for every address of a name; the same as gRPC's."""


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of an endpoint, discovered or not.

    :raises ValueError: as `split_address`.
    """
    return split_address(endpoint.removeprefix(DISCOVERED))


@dataclass(frozen=True)
class Address:
    """HOST:PORT, the host a name, an IPv4 address or an IPv6 address in brackets."""

    any_port: bool  # is port 0, "pick a free one", allowed?
    discovered: bool = False  # may it be dns:///NAME:PORT, which stands for all addresses of the name?

    def parse(self, value: object) -> str:
        split = split_endpoint if self.discovered else split_address
        try:
            _, port = split(value if isinstance(value, str) else "")
        except ValueError:
            raise refused("") from None
        if port == 0 and not self.any_port:
            raise refused("")
        return str(value)

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _plain(self.parse)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {
            "type": "string",
            "x-kind": "HOST:PORT or dns:///NAME:PORT" if self.discovered else "HOST:PORT",
            "x-range": "port 0 to 65535, 0 picks a free one" if self.any_port else "port 1 to 65535",
        }


Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Switch = Annotated[bool, Strict()]

Name = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
            "x-kind": "name",
            "x-range": "1 to 63 letters, digits, '.', '_' or '-', the first a letter or digit",
        }
    ),
]
"""What this file calls something: a variant, an upstream, a rule."""

ModelName = Annotated[
    str,
    StringConstraints(pattern=r"^[!-.0-~]{1,200}$"),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": "^[!-.0-~]{1,200}$",
            "x-kind": "model name",
            "x-range": "1 to 200 ASCII characters without space and '/'",
        }
    ),
]
"""What the V2 protocol calls a model. Printable ASCII, because it travels in metadata; no '/', as in a repository."""

Version = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    StringConstraints(pattern=r"^([1-9][0-9]{0,17})?$"),
    WithJsonSchema({"type": ["string", "integer"], "x-kind": "version", "x-range": "a positive whole number"}),
]
"""A model version as Triton has it: a positive whole number, kept as text; "" leaves the choice to the server."""


def _metadata_key(key: str) -> str:
    if not _METADATA_KEY.fullmatch(key) or key.startswith("grpc-") or key.endswith("-bin"):
        raise refused("")
    return key


MetadataKey = Annotated[
    str,
    AfterValidator(_metadata_key),
    WithJsonSchema(
        {
            "type": "string",
            "x-kind": "metadata key",
            "x-range": "lower case, digits, '_', '-', '.'; neither 'grpc-…' nor '…-bin'",
        }
    ),
]
"""gRPC metadata keys are lower case on the wire; binary ones cannot be compared as text."""


def _resolve(value: str, info: ValidationInfo) -> str:
    """Ask the loader, if there is one, where a file that the config names really is."""
    resolve: Callable[[str], str] | None = (info.context or {}).get("resolve")
    if resolve is None:
        return value
    try:
        return resolve(value)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise refused(f"cannot use file {value!r}: {reason}", "a path, relative to this file's folder") from None


File = Annotated[
    str,
    StringConstraints(min_length=1, max_length=4096),
    AfterValidator(_resolve),
    WithJsonSchema({"type": "string", "x-kind": "file", "x-range": "relative to the folder of the config file"}),
]
"""A file that must exist; after loading, its absolute path."""
