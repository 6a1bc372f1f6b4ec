"""Config: quotas, which say how much each caller may ask for, and each model; and what is kept of who used what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import Field, WithJsonSchema, model_validator

from gateway.config import access
from gateway.config.section import Section
from gateway.config.units import (
    GIB,
    HOURS,
    KIB,
    MIB,
    MILLISECONDS,
    MINUTES,
    SECONDS,
    Duration,
    MetadataKey,
    ModelName,
    Number,
    Size,
    Whole,
    refused,
)

MOST_CALLERS: Final = 10_000
STORES: Final = ("redis://", "rediss://", "valkey://", "valkeys://", "unix://")

CallerName = Annotated[
    access.CallerName,
    WithJsonSchema({"type": "string", "x-kind": "caller", "x-range": "1 to 200 printable characters"}),
]
"""Any name that a grant may have, but none of a group."""

Rate = Annotated[Number, Field(gt=0, le=1e9)]


class QuotaLimits(Section):
    """How much may be asked for. What is left out is not limited."""

    requests: Rate | None = Field(
        default=None,
        description="Requests per second: calls, and each message of a stream. What the quota refuses does not count.",
        examples=[100],
    )
    bytes: Annotated[int, Size(1, 1024 * GIB)] | None = Field(
        default=None,
        description="Bytes per second of requests and answers. The size of an answer is known only when it is there: "
        "if it is more than was left, later calls are refused for longer.",
        examples=["10MiB"],
    )
    rows: Rate | None = Field(
        default=None,
        description="Rows per second: the first dimension of a request's first input, which is the batch of a model "
        "that batches.",
        examples=[1000],
    )
    concurrent: Whole | None = Field(
        default=None, ge=1, le=1_000_000, description="Requests without an answer, at any time.", examples=[16]
    )
    burst: Annotated[float, Duration(1 * MILLISECONDS, 1 * HOURS)] = Field(
        default=1.0,
        description="How many seconds' worth may come at once after a pause. There is room for one request at least; "
        "one that is larger than all of it is let in when nothing is used.",
    )


class CallerLimits(QuotaLimits):
    """How much one caller may ask for, of all models together and of some."""

    models: Mapping[ModelName, QuotaLimits] = Field(
        default_factory=dict,
        max_length=1000,
        description="Of these models, by the names that clients call, beside what holds for all together.",
        examples=[{"photos": {"requests": 10}}],
    )
    priority: Literal["batch", "interactive"] | None = Field(
        default=None,
        description="The class of this caller's calls at a model that is overloaded (see `admission`), whatever the "
        "call says. Without it `admission.priority` counts.",
    )


class SharedQuotas(Section):
    """A Valkey or a Redis by which gateways share rates. `concurrent` stays each worker's own share."""

    url: str = Field(
        min_length=1,
        max_length=1000,
        description="Where it is: redis://, rediss:// (TLS), valkey://, valkeys:// or unix://. A password is better "
        "left to `password_file`.",
        examples=["redis://quotas:6379/0"],
    )
    password_file: str | None = Field(
        default=None,
        min_length=1,
        description="A file with the password, read at each connection.",
        examples=["/run/secrets/quotas"],
    )
    gateways: Whole = Field(
        default=1,
        ge=1,
        le=1000,
        description="How many gateways share it, as long as nobody has asked the store: then each has its share. Later "
        "the store says how many there are.",
    )
    period: Annotated[float, Duration(10 * MILLISECONDS, 5 * SECONDS)] = Field(
        default=0.1, description="How often a worker reports what was used, if anything was."
    )
    timeout: Annotated[float, Duration(10 * MILLISECONDS, 10 * SECONDS)] = Field(
        default=0.5, description="For how long an answer of the store is waited for. No call waits for it."
    )
    prefix: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[!-z]+$")] = Field(
        default="inference-gateway", description="Begins all keys in the store. Gateways with the same one share."
    )

    @model_validator(mode="after")
    def _known_scheme(self) -> SharedQuotas:
        if not self.url.startswith(STORES):
            raise refused("'url' is no address of a store", f"one that begins with {', '.join(STORES)}")
        return self


class Usage(Section):
    """A log of who used what: a line for each caller and model, each interval, in JSON."""

    directory: str = Field(
        min_length=1,
        max_length=1000,
        description="A folder, or a URL that fsspec knows. Each worker writes files of its own.",
        examples=["/var/lib/gateway/usage"],
    )
    interval: Annotated[float, Duration(1 * SECONDS, 1 * HOURS)] = Field(
        default=60.0, description="What a line sums up. A worker that is killed loses the interval that has not ended."
    )
    file_bytes: Annotated[int, Size(64 * KIB, 10 * GIB)] = Field(
        default=64 * MIB, description="At this size a file ends, and another begins."
    )
    file_age: Annotated[float, Duration(1 * MINUTES, 24 * HOURS)] = Field(
        default=3600.0, description="A file that is so old ends."
    )
    files: Whole = Field(
        default=10_000,
        ge=2,
        le=1_000_000,
        description="Most files in the folder; then the oldest is deleted, so collect them before.",
    )


class QuotasSection(Section):
    """How much callers may ask for, and models be asked for; and the log of who used what. docs/quotas.md tells more.

    A call must be within its caller's quota, its model's, and its caller's for this model.
    """

    caller: MetadataKey | None = Field(
        default=None,
        description="The metadata key that has a caller's name. Without it, or without a value, callers are one "
        "caller without a name, for whom `default` holds.",
        examples=["x-tenant"],
    )
    default: CallerLimits = Field(
        default=CallerLimits(), description="For each caller that `callers` does not name, by itself."
    )
    callers: Mapping[CallerName, CallerLimits] = Field(
        default_factory=dict,
        max_length=MOST_CALLERS,
        description="By name, in place of `default`.",
        examples=[{"acme": {"requests": 500, "models": {"photos": {"requests": 50}}}}],
    )
    models: Mapping[ModelName, QuotaLimits] = Field(
        default_factory=dict,
        max_length=10_000,
        description="For all callers together, by the names that clients call.",
        examples=[{"photos": {"rows": 2000}}],
    )
    shared: SharedQuotas | None = Field(
        default=None,
        description="Rates hold for all gateways together. Without it each has them, shared out to its workers.",
    )
    usage: Usage | None = Field(default=None, description="Keep a log of who used what.")
