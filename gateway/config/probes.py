"""Config: what `probe` of variants sends. Reads the files that it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path as FilePath

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from gateway.config.findings import Problem, Severity
from gateway.config.models import Probe
from gateway.config.schema import Config


def request_of(probe: Probe) -> bytes:
    """The ModelInferRequest that a probe sends; empty if it is to be made from the model's metadata.

    :raises OSError, ValueError: if its file can't be read, or holds none.
    """
    if probe.request is None:
        return b""
    content = FilePath(probe.request).read_bytes()
    try:
        if probe.request.endswith(".json"):
            request = json_format.Parse(content, pb.ModelInferRequest())
        else:
            request = pb.ModelInferRequest.FromString(content)
    except (DecodeError, json_format.ParseError) as error:
        raise ValueError(str(error)) from error
    if not request.inputs:
        raise ValueError("it has no inputs")
    return bytes(request.SerializeToString())


def problems(config: Config) -> Iterator[Problem]:
    """Files that hold no request, and probes of one model that differ: a server is asked for all who use it."""
    first: dict[tuple[str, str, str], tuple[str, Probe]] = {}
    for name, model in config.models.items():
        for key, variant in (model.variants or {}).items():
            probe, path = variant.probe, ("models", name, "variants", key, "probe")
            if probe is None:
                continue
            try:
                request_of(probe)
            except (OSError, ValueError) as error:
                right = "a serialized ModelInferRequest, or its JSON in a file named *.json"
                yield Problem((*path, "request"), f"no ModelInferRequest can be read from it: {error}", right)
            if probe.timeout > probe.interval:
                yield Problem((*path, "timeout"), "is longer than `interval`", "less", Severity.WARNING)
            where = (variant.upstream, variant.model, variant.version)
            other, same = first.setdefault(where, (f"models.{name}.variants.{key}", probe))
            if same != probe:
                yield Problem(path, f"differs from that of {other}, the same model of the same servers", "the same")
