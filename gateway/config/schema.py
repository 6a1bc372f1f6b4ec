"""Config: the whole file as one frozen, typed value. Each room is given only its own part of it.

Every field says its unit, range, default and reason; the reference page, the JSON Schema and the findings come from
here. Findings that need more than one field are in `check`. No reading of files here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import Field

from gateway.config.access import Access
from gateway.config.experiments import Experiment
from gateway.config.models import Admission, Direct, Model
from gateway.config.section import Section
from gateway.config.serving import Admin, Pipelines, Sequences, Server, Telemetry
from gateway.config.store import Store
from gateway.config.units import Address, ModelName, Name, Whole
from gateway.config.upstreams import Upstream


class Config(Section):
    """A gateway: where it listens, the Triton servers behind it, and the public models that it offers."""

    listen: Annotated[str, Address(any_port=True)] = Field(
        default="127.0.0.1:9001",
        description="Where gRPC is served. Only this host until told otherwise: without `access` everybody may call. "
        "Not 8001, which a Triton on the same host already has.",
    )
    workers: Whole = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that share the port. One uses one core; in Kubernetes more pods do as well.",
    )
    admin: Admin = Field(default=Admin(), description="The HTTP side: health, readiness, metrics, state.")
    server: Server = Field(default=Server(), description="Limits and behaviour of the gRPC server.")
    upstreams: Mapping[Name, Upstream] = Field(
        min_length=1, max_length=1000, description="Pools of Triton servers, by names of your choice."
    )
    direct: Direct = Field(default=Direct(), description="Calling Triton's own model names through the gateway.")
    models: Mapping[ModelName, Model] = Field(
        default_factory=dict, max_length=10_000, description="Public models, by the names that clients call."
    )
    access: Access | None = Field(
        default=None,
        description="Who may call what. Without it everybody who reaches `listen` may call everything.",
    )
    admission: Admission = Field(default=Admission(), description="Whose turn it is when a model is overloaded.")
    pipelines: Pipelines = Field(
        default=Pipelines(), description="Threads and memory for the pipelines' own steps, such as decoding pictures."
    )
    sequences: Sequences = Field(
        default=Sequences(),
        description="What is remembered so that a stateful sequence stays on one variant and endpoint.",
    )
    experiments: Mapping[Name, Experiment] = Field(
        default_factory=dict, max_length=1000, description="Experiments, by names of your choice (docs/experiments.md)."
    )
    store: Store = Field(default=Store(), description="Where exposures and outcomes of experiments are kept.")
    telemetry: Telemetry = Field(default=Telemetry(), description="What the gateway tells about itself.")

    @property
    def checked_access(self) -> Access | None:
        """Who may call what; None if everybody may call everything."""
        return None if self.access is None or self.access.open else self.access


@cache
def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the file, for editors. Callers must not change it."""
    schema = Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Gateway configuration"}
