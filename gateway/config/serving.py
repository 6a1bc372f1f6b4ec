"""Config of the listening side: the gRPC server, the admin plane, sequences, pipelines' threads, telemetry."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gateway.config.access import Sha256
from gateway.config.section import Section
from gateway.config.units import (
    GIB,
    HOURS,
    KIB,
    MIB,
    MILLISECONDS,
    MINUTES,
    SECONDS,
    Address,
    Duration,
    File,
    MetadataKey,
    ModelName,
    Number,
    Size,
    Switch,
    Whole,
)


class ServerTls(Section):
    """TLS on the listening side: version 1.2 or later."""

    cert: File = Field(description="PEM file with the gateway's certificate chain.", examples=["tls.crt"])
    key: File = Field(description="PEM file with the private key that belongs to `cert`.", examples=["tls.key"])
    client_ca: File | None = Field(
        default=None,
        description="PEM file with an authority. Then clients must show a certificate of it (mutual TLS).",
        examples=["clients.pem"],
    )
    client_certificate: Literal["required", "optional"] = Field(
        default="required",
        description="With `client_ca`: must clients show a certificate? `optional` is for callers that `access` knows "
        "by other means. One that is shown must be valid in any case.",
    )


class Server(Section):
    """Limits and behaviour of the gRPC server."""

    max_message_bytes: Annotated[int, Size(64 * KIB, 2 * GIB - 1)] = Field(
        default=256 * MIB,
        description="The largest message accepted from a caller or an upstream; a larger one gets RESOURCE_EXHAUSTED. "
        "Protobuf itself ends at 2 GiB. Memory is used only for messages that are really this large.",
    )
    max_collected_bytes: Annotated[int, Size(16 * MIB, 1024 * GIB)] | None = Field(
        default=None,
        description="Memory per worker for messages that must be here whole before they can be worked on: those of "
        "pipelines and streams, compressed ones, and those whose tensors come before the model's name. One connection "
        "may have half of it. Beyond that they get RESOURCE_EXHAUSTED; messages up to 64KiB have an eighth more. By "
        "default a quarter of the container's memory limit, or of the host's memory, shared by the workers, at most "
        "512MiB.",
    )
    tls: ServerTls | None = Field(
        default=None,
        description="Serve TLS instead of plain text. Renewed files are taken over while it runs, by connections "
        "that begin then. (An authority that is taken out of `client_ca` counts until a restart.)",
    )
    max_connections: Whole = Field(
        default=10_000,
        ge=1,
        le=1_000_000,
        description="Connections per worker; more are closed as they come. An idle one takes some 20 KiB.",
    )
    max_streams: Whole = Field(
        default=1000,
        ge=1,
        le=10_000,
        description="Calls at once on one connection; a client waits with the next one, and "
        "`gateway_connections_full_total` counts it. It bounds the work that one peer can start. Clients of one "
        "process often share a connection, and each may have a stream open, so it must not be small.",
    )
    max_connection_age: Annotated[float, Duration(1 * SECONDS, 24 * HOURS)] | None = Field(
        default=None,
        description="Ask clients to reconnect after this time, ± 10 %, so that they find new replicas. Calls in flight "
        "finish first.",
    )
    default_deadline: Annotated[float, Duration(1 * MILLISECONDS, 24 * HOURS)] | None = Field(
        default=None,
        description="The time that a unary call gets whose caller set none. Without it such a call waits as long as "
        "its upstream does, as it would at Triton itself.",
    )
    max_deadline: Annotated[float, Duration(1 * MILLISECONDS, 24 * HOURS)] | None = Field(
        default=None,
        description="The most time that any unary call gets, whatever its caller asked for. It bounds how long a "
        "forgotten call can hold a slot upstream.",
    )
    control: Literal["loopback", "all", "none"] = Field(
        default="loopback",
        description="Who may call the RPCs that change a server (load, unload, shared memory, trace, log): callers on "
        "this host, everybody, or nobody. Where `listen` is no loopback address the default is `none`: a proxy or "
        "sidecar on this host makes every caller one of this host. Where one forwards to a loopback address, say "
        "`none` here. Some of these RPCs let a caller read or write a server's files and memory.",
    )
    reflection: Switch = Field(
        default=False,
        description="Serve gRPC reflection, which tools such as grpcurl need to list and call methods. It tells "
        "strangers what there is, so it is off unless this says so.",
    )
    drain: Annotated[float, Duration(0, 1 * HOURS)] = Field(
        default=30 * SECONDS,
        description="How long calls in flight may take to end after SIGTERM; then they are cancelled. With drain_delay "
        "it must stay below Kubernetes' terminationGracePeriodSeconds.",
    )
    drain_delay: Annotated[float, Duration(0, 10 * MINUTES)] = Field(
        default=0.0,
        description="How long to go on accepting calls after SIGTERM while already not ready. Kubernetes removes an "
        "endpoint and sends SIGTERM at the same time: some 5s there let every client hear of it first.",
    )


class AdminTls(Section):
    """TLS on the admin plane."""

    cert: File = Field(description="As of `server.tls`; read at the start.", examples=["tls.crt"])
    key: File = Field(description="As of `server.tls`.", examples=["tls.key"])
    client_ca: File | None = Field(
        default=None,
        description="Who shows a certificate of this authority may read all; others need a token.",
        examples=["operators.pem"],
    )


class Admin(Section):
    """The HTTP side: health, readiness, metrics, state."""

    listen: Annotated[str, Address(any_port=True)] = Field(
        default="127.0.0.1:9002",
        description="Where the admin plane listens. It tells about models and endpoints, so it is not public unless "
        "this says so; 0.0.0.0 lets Kubernetes' probes and Prometheus in.",
    )
    tokens: tuple[Sha256, ...] = Field(
        default=(),
        max_length=100,
        description="With tokens, or with `tls.client_ca`, whoever is not on this host needs a token or a certificate. "
        "Here are the SHA-256 of tokens, as `inference-gateway keys new NAME` prints them. Prometheus sends one as "
        "`authorization: {credentials_file: …}`, browsers as the password of a login with any name.",
    )
    open: tuple[Literal["healthz", "readyz", "metrics"], ...] = Field(
        default=("healthz", "readyz"), description="What needs none, because who asks for it has none."
    )
    tls: AdminTls | None = Field(default=None, description="Serve HTTPS in place of HTTP.")


class Sequences(Section):
    """What is remembered so that a stateful sequence stays on one variant and endpoint."""

    idle: Annotated[float, Duration(1 * SECONDS, 24 * HOURS)] = Field(
        default=10 * MINUTES,
        description="A sequence that was not heard of for this long is forgotten; its next request counts as lost. Set "
        "it above the models' max_sequence_idle_microseconds.",
    )
    most: Whole = Field(
        default=100_000,
        ge=1,
        le=10_000_000,
        description="Sequences remembered at once per worker, some 500 bytes each. One more makes it forget the one "
        "that was not heard of for the longest time.",
    )


class Pipelines(Section):
    """Threads and memory for the pipelines' own steps, such as decoding pictures."""

    threads: Whole = Field(
        default=2,
        ge=1,
        le=64,
        description="Threads per worker that run steps. More than the cores of the host gain nothing. A pipeline that "
        "has none while others hold them all gets one of its own, so that no pipeline's steps hold up another's.",
    )
    queue: Whole = Field(
        default=64,
        ge=0,
        le=100_000,
        description="Requests of one pipeline that may wait for a thread; one more gets RESOURCE_EXHAUSTED at once, "
        "which is better for everybody than an answer after the caller's deadline. Callers take turns, as "
        "`admission.caller` says who they are, and whoever has the most that wait gives up the last one for another "
        "caller's.",
    )
    memory: Annotated[int, Size(16 * MIB, 1024 * GIB)] | None = Field(
        default=None,
        description="Memory that pictures may take while they are decoded, in all workers together; each has its "
        "share. What comes while it is taken waits up to 2s, then gets RESOURCE_EXHAUSTED; a picture that takes more "
        "than 7/8 of it gets INVALID_ARGUMENT, and the last eighth is for small ones. The messages and tensors of "
        "pipelines' requests may take half as much again; what comes then gets RESOURCE_EXHAUSTED. Without it: a "
        "third of the container's limit (cgroup), or of the machine's memory.",
    )


class AccessLog(Section):
    """One line of JSON per call, without payloads."""

    destination: Literal["stdout", "stderr", "none"] = Field(
        default="stdout", description="Where the lines go. Container platforms collect both streams."
    )
    sample: Number = Field(
        default=0.01,
        ge=0,
        le=1,
        description="The share of ordinary calls that get a line. Calls that failed, fell back or were slow always do.",
    )
    slow: Annotated[float, Duration(1 * MILLISECONDS, 1 * HOURS)] = Field(
        default=1 * SECONDS, description="A call that took at least this long is logged whatever the sample says."
    )
    most_per_second: Whole = Field(
        default=500,
        ge=1,
        le=1_000_000,
        description="Most lines that one worker writes in a second. In an outage every call fails or falls back, and "
        "its lines must not fill a disk; a line says how many were left out.",
    )


class Capture(Section):
    """Requests of one model kept for replay, with their payloads. Files are as confidential as what callers send."""

    model: ModelName = Field(description="The name that callers use.", examples=["photos"])
    directory: str = Field(
        min_length=1,
        max_length=1000,
        description="Where the files go: a folder, or a URL that fsspec knows, such as `s3://bucket/folder` (then its "
        "package, here s3fs, must be installed). In a folder only the gateway's user can read them.",
        examples=["/var/lib/inference-gateway/captured"],
    )
    share: Number = Field(default=0.01, ge=0, le=1, description="The share of the model's requests that are kept.")
    max_bytes: Annotated[int, Size(1 * KIB, 64 * MIB)] = Field(
        default=1 * MIB, description="Larger requests are left out; so are those that are passed on as they arrive."
    )
    file_bytes: Annotated[int, Size(64 * KIB, 1 * GIB)] = Field(
        default=16 * MIB, description="A file ends when the next request would make it larger; base64 adds a third."
    )
    file_age: Annotated[float, Duration(1 * SECONDS, 24 * HOURS)] = Field(
        default=5 * MINUTES, description="A file ends after this time. In an object store it can be seen only then."
    )
    files: Whole = Field(
        default=8,
        ge=1,
        le=10_000,
        description="Files of this model in the directory, whoever wrote them; the oldest ones are deleted. With "
        "`file_bytes` it bounds the space.",
    )
    redact: tuple[str, ...] = Field(
        default=(),
        max_length=100,
        description="Inputs whose values become zeros, or empty texts, and request parameters that are taken out.",
        examples=[["image"]],
    )
    metadata: tuple[MetadataKey, ...] = Field(
        default=(),
        max_length=100,
        description="Keys of the callers' metadata to keep, because routing looks at them for example. No others are.",
        examples=[["x-user"]],
    )


class Telemetry(Section):
    """What the gateway tells about itself. Traces are set up by the standard OTEL_* variables, not here."""

    access_log: AccessLog = Field(default=AccessLog(), description="One line of JSON per call.")
    capture: tuple[Capture, ...] = Field(
        default=(), max_length=100, description="Models whose requests are kept for replay, one entry each."
    )
