"""Config of upstreams: pools of interchangeable Triton endpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gateway.config.section import Section
from gateway.config.units import (
    GIB,
    MIB,
    MILLISECONDS,
    MINUTES,
    SECONDS,
    Address,
    Duration,
    File,
    Size,
    Whole,
    refused,
)

Endpoint = Annotated[str, Address(any_port=False, discovered=True)]


class Tls(Section):
    """TLS towards the endpoints of one upstream. `tls: {}` checks them against the public authorities."""

    ca: File | None = Field(
        default=None,
        description="PEM file with the authorities that the endpoints' certificates must come from.",
        examples=["ca.pem"],
    )
    cert: File | None = Field(
        default=None,
        description="PEM file with the gateway's own certificate chain, for mutual TLS.",
        examples=["tls.crt"],
    )
    key: File | None = Field(
        default=None, description="PEM file with the private key that belongs to `cert`.", examples=["tls.key"]
    )
    server_name: str | None = Field(
        default=None,
        min_length=1,
        max_length=253,
        description="The name to expect in the endpoints' certificates, if it is not the host in the endpoint.",
        examples=["triton.internal"],
    )

    @model_validator(mode="after")
    def _complete(self) -> Tls:
        if (self.cert is None) != (self.key is None):
            given, missing = ("cert", "key") if self.key is None else ("key", "cert")
            raise refused(f"{given} is given without {missing}", "both for mutual TLS, or neither")
        return self


class SharedMemory(Section):
    """Memory that each endpoint of an upstream shares with the gateway, so that large tensors are not sent to it."""

    bytes: Annotated[int, Size(1 * MIB, 64 * GIB)] = Field(
        default=32 * MIB,
        description="How much for each endpoint, over all workers; for all that are behind a `dns:///` name "
        "together. All of it is taken at the registration, and counts as the gateway's in the limit of a container. A "
        "request that finds no room in it is sent as bytes.",
    )
    path: str = Field(
        default="/dev/shm",  # noqa: S108  (where Linux keeps shared memory; shm_overview(7))
        pattern=r"^/",
        max_length=4096,
        description="Where the gateway sees the file system in memory that is the servers' `/dev/shm`.",
    )


class Upstream(Section):
    """A pool of Triton servers that serve the same models; each call goes to the one with the least load:
    the fewest calls in flight, as long as none is much slower than the others."""

    endpoints: tuple[Endpoint, ...] = Field(
        min_length=1,
        max_length=1000,
        description="gRPC addresses of the servers. A name stands for one server. `dns:///NAME:PORT` stands for every "
        "address of the name, looked up again every 5 s: a headless Service in Kubernetes, whose pods come and go. "
        "`${NAME}` and `${NAME:-default}` inside an endpoint are replaced from the environment.",
        examples=[["triton-0:8001", "triton-1:8001"]],
    )
    probe_interval: Annotated[float, Duration(100 * MILLISECONDS, 10 * MINUTES)] = Field(
        default=1 * SECONDS,
        description="Time between two health probes of an endpoint. A dead server is noticed by the calls themselves; "
        "this says how soon it is used again, and how soon a loaded model is found.",
    )
    probe_timeout: Annotated[float, Duration(10 * MILLISECONDS, 1 * MINUTES)] = Field(
        default=1.5 * SECONDS,
        description="How long a probe waits for its answer. A server that hangs is left alone after "
        "`slow_probes_to_fail` such times.",
    )
    slow_probes_to_fail: Whole = Field(
        default=2,
        ge=1,
        le=100,
        description="Consecutive probes without an answer in time until an endpoint counts as down. More than one, so "
        "that a busy server is not taken for a dead one. A refused connection counts at once.",
    )
    subset: Whole | None = Field(
        default=None,
        ge=2,
        le=10_000,
        description="How many of the endpoints each worker keeps in touch with and sends calls to, for a fleet where "
        "everybody with everybody is too much (docs/scaling.md). Which ones follows from the name of the host; those "
        "that end in a number, as the pods of a StatefulSet do, share the endpoints evenly. A sequence's place is "
        "chosen from all endpoints, and connected when it is needed. All, if left out.",
        examples=[50],
    )
    shared_memory: Literal["off", "auto"] | SharedMemory = Field(
        default="off",
        description="Lay large tensors of requests into memory that the gateway shares with a Triton on the same host, "
        "in place of sending them (docs/shared-memory.md). `auto`: with endpoints whose address is of this host; a "
        "mapping: with all endpoints. Where it turns out not to be possible, the log says why and tensors are sent as "
        "bytes. Triton from 26.04 on needs `--allow-client-shm=true`.",
        examples=["auto"],
    )
    tls: Tls | None = Field(
        default=None, description="Use TLS. Without it connections are plain text, as Triton's default is."
    )
