"""Config of public models: variants, split, stickiness, rules, fallback, pipelines; and of direct calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema

from gateway.config.rollouts import Rollout
from gateway.config.section import Section
from gateway.config.shadowing import MOST, Shadow
from gateway.config.units import (
    GIB,
    HOURS,
    KIB,
    MIB,
    MILLISECONDS,
    MINUTES,
    SECONDS,
    Duration,
    File,
    MetadataKey,
    ModelName,
    Name,
    Number,
    Size,
    Version,
    Whole,
    refused,
)
from gateway.routing import Regex
from gateway.steps import PipelineSpec

Scalar = bool | int | float | str
_SCALAR_SCHEMA = {"type": ["string", "number", "boolean"], "x-kind": "value"}
ParameterKey = Annotated[str, Field(min_length=1, max_length=200)]
Weight = Annotated[Number, Field(ge=0, le=1_000_000)]


def _limit(value: object) -> int | str:
    if value in ("auto", "none") or (type(value) is int and 1 <= value <= _MOST_LIMIT):
        return value
    raise refused("")


_MOST_LIMIT = 10_000
Limit = Annotated[
    int | Literal["auto", "none"],
    PlainValidator(_limit),
    WithJsonSchema(
        {
            "anyOf": [{"enum": ["auto", "none"]}, {"type": "integer", "minimum": 1, "maximum": _MOST_LIMIT}],
            "x-kind": "whole number, 'auto' or 'none'",
            "x-range": "1 to 10000",
        }
    ),
]


class Probe(Section):
    """Inferences by which the gateway finds whether a server really infers a model, beside Triton's own health.

    A server with a broken CUDA context says that it is live and its models are ready, until it is restarted. With this
    a model counts as ready on a server only while such inferences go well, from the first one on. Each worker of each
    gateway makes them at each endpoint. `probe: {}` sends zeros.
    """

    request: File | None = Field(
        default=None,
        description="A file with a serialized ModelInferRequest, or with its JSON if it is named `*.json`. Name and "
        "version in it do not matter. Without it the gateway sends zeros and empty texts of the shapes that the "
        "model's metadata tells, with 1 where a size is free. For a model with sequences say a file, whose request "
        "begins and ends one.",
        examples=["warm-up.json"],
    )
    interval: Annotated[float, Duration(100 * MILLISECONDS, 1 * HOURS)] = Field(
        default=10 * SECONDS,
        description="Time between two such inferences, ± 20 %. What callers meet in between is left to ejection.",
    )
    timeout: Annotated[float, Duration(1 * MILLISECONDS, 10 * MINUTES)] = Field(
        default=5 * SECONDS,
        description="How long one may take; two in a row that take longer have failed. An error counts at once, but "
        "not that the request is refused as wrong, nor that the server's queue is full.",
    )


class Variant(Section):
    """One Triton model on one upstream."""

    upstream: Name = Field(description="The upstream that serves it.", examples=["gpu"])
    model: ModelName = Field(description="The model's name at Triton.", examples=["efficientnet_lite0_tensorrt"])
    version: Version = Field(
        default="", description="Pin a model version. Without it the server's version policy decides.", examples=["1"]
    )
    attempt_timeout: Annotated[float, Duration(1 * MILLISECONDS, 1 * HOURS)] | None = Field(
        default=None,
        description="How long one attempt may take; then the call is tried elsewhere, if `retry.on` has `late`. So a "
        "server that hangs costs one attempt and not the call. Say several times the model's slowest answers, and less "
        "than callers' deadlines. Without it an attempt may take as long as its call. For unary calls that are whole "
        "when they are sent, and not merged.",
        examples=["500ms"],
    )
    probe: Probe | None = Field(
        default=None, description="Also try the model out by inferences, and use a server only while they go well."
    )
    limit: Limit = Field(
        default="auto",
        description="Most calls in flight to this model of this upstream, of all public models together, shared out to "
        "the workers; streams do not count. `auto` takes the number from Triton's config if that bounds the queue "
        "(`max_queue_size`); else it limits nothing until a server says that it is full, then finds it. More calls "
        "wait in turn for a moment or are refused at once with RESOURCE_EXHAUSTED (docs/overload.md).",
        examples=[32],
    )


class Retry(Section):
    """What is sent again although the model may have run it. What surely did not run always goes elsewhere."""

    on: tuple[Literal["lost", "late", "server", "unclear"], ...] = Field(
        default=("lost", "late"),
        max_length=4,
        description="`lost`: the connection broke while the server had the request. `late`: it took longer than "
        "`attempt_timeout`. `server`: INTERNAL and the like, which may be the model's own error. `unclear`: "
        "UNAVAILABLE in words that are not Triton's. Say `[]` for a model that must not run twice for one request.",
        examples=[["lost", "late", "server"]],
    )
    most: Whole = Field(
        default=1,
        ge=1,
        le=4,
        description="How often one request is sent again after these; `attempts` bounds all. A request that crashes "
        "its server costs so many servers, and one more.",
    )


class Admission(Section):
    """Who waits before whom when a model has more calls than its servers can answer, and is limited (`limit`)."""

    caller: MetadataKey | None = Field(
        default=None,
        description="Callers with the same value of this metadata key take turns as one. Calls without it, and all "
        "calls without this setting, count as their connection's; with `access` the default is the caller's name.",
        examples=["x-tenant"],
    )
    priority: MetadataKey | None = Field(
        default=None,
        description="Calls whose value of this metadata key is `batch` take only places that no other call waits for, "
        "and are the first to be refused. Without this setting there are none.",
        examples=["x-priority"],
    )


class Sticky(Section):
    """What a caller is recognised by, so that it stays on its variant: `metadata`, `parameter`, or the first
    of the two that it sends.

    The variant is a keyed hash of the value, so every worker and every replica gives the same one, and when weights
    change only the necessary share of callers moves. A caller without a value is drawn at random.
    """

    metadata: MetadataKey | None = Field(
        default=None, description="Take the value of this metadata key.", examples=["x-user-id"]
    )
    parameter: ParameterKey | None = Field(
        default=None, description="Take the value of this parameter of the V2 request.", examples=["user"]
    )
    salt: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="Keys the hash. Models with the same salt split callers alike; a new salt deals them anew. Without "
        "it the public model's name is the salt.",
        examples=["spring-experiment"],
    )

    @model_validator(mode="after")
    def _some_source(self) -> Sticky:
        if self.metadata is None and self.parameter is None:
            raise refused("needs something to recognise a caller by", "'metadata', 'parameter' or both")
        return self


def _scalar(value: object) -> Scalar:
    if isinstance(value, Scalar):
        return value
    raise refused("")


def _compiles(value: object) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise refused("")
    try:
        Regex(value)
    except ValueError as error:
        raise refused(f"is not a regular expression: {error}") from None
    return value


Value = Annotated[Scalar, PlainValidator(_scalar), WithJsonSchema(_SCALAR_SCHEMA)]
Pattern = Annotated[str, PlainValidator(_compiles), WithJsonSchema({"type": "string", "x-kind": "regular expression"})]


class Condition(Section):
    """What one metadata or parameter value must be: a value, a list of values, or exactly one of these keys."""

    any_of: tuple[Value, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="The value is one of these. A value or a list in place of the mapping says the same. Values are "
        'compared as text: `1` and `"1"` are alike, true is `true`.',
        examples=[["a", "b"]],
    )
    prefix: str | None = Field(
        default=None, min_length=1, max_length=1000, description="The value starts so.", examples=["team-"]
    )
    regex: Pattern | None = Field(
        default=None,
        description="The whole value matches this regular expression of at most 1000 characters, as Rust's `regex` "
        "reads it: no look-around, no back-references, and no value that it takes long for. A value of more than 1024 "
        "characters never matches.",
        examples=["eu-.*"],
    )
    present: bool | None = Field(
        default=None, strict=True, description="There is such a key (true), or there is none (false)."
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: object) -> object:
        if isinstance(value, dict | Condition):
            return value
        return {"any_of": value if isinstance(value, list | tuple) else [value]}

    @model_validator(mode="after")
    def _one_test(self) -> Condition:
        if sum(test is not None for test in (self.any_of, self.prefix, self.regex, self.present)) != 1:
            raise refused("needs one test", "a value, a list of values, or one of 'prefix', 'regex', 'present'")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        reference = handler(schema)
        full = handler.resolve_ref_schema(reference)
        # The mapping is one of three forms, so that editors take the other two as well.
        section = {**full}
        del full["type"], full["properties"], full["additionalProperties"]
        full["anyOf"] = [_SCALAR_SCHEMA, {"type": "array", "items": _SCALAR_SCHEMA, "minItems": 1}, section]
        return reference


class Match(Section):
    """The conditions of a rule. All of them must hold."""

    metadata: Mapping[MetadataKey, Condition] = Field(
        default_factory=dict,
        description="Conditions on metadata keys. Of a key that a caller sent twice the first value counts.",
        examples=[{"x-tester": "1"}],
    )
    parameters: Mapping[ParameterKey, Condition] = Field(
        default_factory=dict,
        description="Conditions on parameters of the V2 request.",
        examples=[{"cohort": ["a", "b"]}],
    )

    @model_validator(mode="after")
    def _not_empty(self) -> Match:
        if not self.metadata and not self.parameters:
            raise refused("has no condition, so it would match every call", "a key below 'metadata' or 'parameters'")
        return self


class Rule(Section):
    """Sends the calls that match to one variant, before stickiness and split are asked."""

    name: Name = Field(description="Names the rule in logs, metrics and `explain`.", examples=["testers"])
    match: Match = Field(description="The conditions; all of them must hold.")
    variant: Name = Field(description="The variant for the calls that match.", examples=["int8"])


class Merge(Section):
    """Send small requests of several callers to Triton as one, and give each caller its own rows back."""

    rows: Whole | None = Field(
        default=None,
        ge=2,
        le=100_000,
        description="Most rows of one merged request. The variant's own max_batch_size is the default and the bound.",
    )
    bytes: Annotated[int, Size(1 * KIB, 64 * MIB)] = Field(
        default=1 * MIB,
        description="Most bytes of one merged request: copying a large one costs more than a request of its own. Where "
        "tensors are put together in memory that Triton shares, 8MiB (docs/shared-memory.md).",
    )
    in_flight: Whole = Field(
        default=4,
        ge=1,
        le=64,
        description="Most merged requests at a time on one endpoint. The number that is used adapts below it to where "
        "throughput is best.",
    )
    delay: Annotated[float, Duration(0, 1 * SECONDS)] = Field(
        default=0.0,
        description="How long a request may wait for company although it could go. 0 never waits: what arrives while "
        "requests are in flight leaves together.",
    )
    metadata: tuple[MetadataKey, ...] | None = Field(
        default=None,
        description="Metadata keys that requests must have with equal values to be merged, and that go along. Others "
        "do not reach Triton then. By default every key that would reach Triton, apart from ids and trace context of "
        "single calls (docs/merging.md).",
        examples=[["x-tenant"]],
    )
    ignore_ids: bool = Field(
        default=False,
        description="Merge requests that have an `id`, too. Triton and its models do not see it then; the caller gets "
        "it back all the same.",
    )
    recheck: Annotated[float, Duration(0, 1 * SECONDS)] = Field(
        default=0.0,
        description="For how long it holds that the model is still the one that was found to batch. 0s asks with every "
        "merged request. 10ms is up to half as fast again for a model that takes no time; but if a model is loaded "
        "anew at Triton itself, under load, with a config that no longer batches, merged answers of that time may be "
        "wrong.",
    )


class Hedge(Section):
    """Send a call that takes longer than most to another endpoint of its variant as well; the first answer counts.

    For models that may run twice for one request.
    """

    quantile: Annotated[Number, Field(ge=0.5, le=0.999)] = Field(
        default=0.95,
        description="A call is sent a second time once it has taken longer than this share of the model's answers of "
        "the last minute.",
    )
    after: Annotated[float, Duration(1 * MILLISECONDS, 1 * HOURS)] | None = Field(
        default=None, description="Or once it has taken so long, whatever others take.", examples=["50ms"]
    )


What = Literal["ignore", "count", "fallback"]


class Answers(Section):
    """Look at each answer before its caller gets it.

    `count`: it is counted by variant, and its caller gets it. `fallback`: its caller gets another variant's answer, or
    INTERNAL if there is none that does. Not for messages of a stream that have several answers, which are counted.
    """

    finite: What = Field(
        default="count", description="What becomes of an answer that has NaN or infinity among its numbers."
    )
    contract: What = Field(
        default="count",
        description="What becomes of an answer with an output whose datatype or shape is not what the model's metadata "
        "says, or whose bytes are not as many as these take.",
    )
    max_bytes: Annotated[int, Size(1 * KIB, 16 * MIB)] = Field(
        default=1 * MIB,
        description="Larger answers are not looked at: they are passed on as they arrive, and counted. A smaller one "
        "is collected first. To look at 1 MiB takes 30 µs.",
    )


class Share(Section):
    """Give identical requests one answer. For models that answer the same request the same way, whoever asks."""

    coalesce: bool = Field(
        default=True,
        strict=True,
        description="A request that is identical to one in flight waits for that one's answer.",
    )
    cache: Annotated[int, Size(64 * KIB, 64 * GIB)] | None = Field(
        default=None,
        description="Bytes of answers that are remembered, shared out to the workers. Without it none are. Errors "
        "never are.",
        examples=["64MiB"],
    )
    ttl: Annotated[float, Duration(10 * MILLISECONDS, 24 * HOURS)] = Field(
        default=60.0,
        description="For how long an answer is remembered. It is forgotten sooner when the model is seen to have "
        "changed (docs/sharing.md).",
    )
    metadata: tuple[MetadataKey, ...] | None = Field(
        default=None,
        description="Metadata keys that requests must have with equal values to be identical, and that go along. "
        "Others do not reach Triton then. By default every key that would reach Triton, apart from ids and trace "
        "context of single calls.",
        examples=[["x-tenant"]],
    )

    @model_validator(mode="after")
    def _something(self) -> Share:
        if not self.coalesce and self.cache is None:
            raise refused("shares nothing", "a size for 'cache', or 'coalesce: true'")
        return self


def _forbid(value: object) -> object:
    return [] if value == "forbid" else value


def _positive(split: Mapping[str, float]) -> Mapping[str, float]:
    if not any(split.values()):
        raise refused("no weight is above 0", "at least one variant with a weight above 0")
    return split


class Model(Section):
    """A name that clients call: either variants of one contract, or a pipeline."""

    variants: Mapping[Name, Variant] | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="The Triton models that can answer, by names of your choice. The order counts: the first is the "
        "default, and the fallback goes through them in this order.",
    )
    split: Annotated[Mapping[Name, Weight], Field(min_length=1), AfterValidator(_positive)] | None = Field(
        default=None,
        description="Weights, 0 to 1000000; only their proportions count. A variant that is not named gets no share. "
        "Without a split the first variant gets everything.",
        examples=[{"gpu": 90, "int8": 10}],
    )
    sticky: Sticky | None = Field(
        default=None, description="Keep each caller on its variant. Without it each call is drawn anew."
    )
    rules: tuple[Rule, ...] = Field(
        default=(), max_length=1000, description="Asked in this order before the split; the first that matches decides."
    )
    fallback: Annotated[
        tuple[Name, ...] | None,
        BeforeValidator(_forbid),
        WithJsonSchema(
            {
                "anyOf": [{"const": "forbid"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                "x-kind": "list of variants, or 'forbid'",
            }
        ),
    ] = Field(
        default=None,
        max_length=100,
        description="The variants to try, in this order, when the chosen one is unavailable or fails in a way that "
        "another may not. `forbid`: the chosen one or an error. Without it: every other variant, in the order written. "
        "It holds for calls of the public name; for calls of the variants' own Triton names see `direct.models`.",
        examples=[["cpu", "int8"]],
    )
    attempts: Whole = Field(
        default=3,
        ge=1,
        le=5,
        description="The most times that one call is sent upstream, over all variants and endpoints. gRPC's own retry "
        "specification ends at 5 as well.",
    )
    retry: Retry = Field(
        default=Retry(), description="What may be sent again although the model may have run it, and how often."
    )
    merge: Merge | None = Field(
        default=None,
        description="Merge small requests on the way. `merge: {}` switches it on as it is.",
    )
    hedge: Hedge | None = Field(
        default=None,
        description="Send slow calls a second time, at most one in ten. `hedge: {}` switches it on as it is. Not for "
        "sequences, streams, merged calls and requests that are passed on as they arrive.",
    )
    share: Share | None = Field(
        default=None,
        description="Give identical requests one answer. `share: {}` lets a request wait for an identical one in "
        "flight; with `cache` answers are remembered. Never for sequences, streams and shared memory.",
    )
    answers: Answers | None = Field(
        default=None,
        description="Look for answers that are wrong in kind: NaN, infinity, another shape than promised. "
        "`answers: {}` counts them.",
        examples=[{"finite": "fallback"}],
    )
    shadow: Mapping[Name, Shadow] = Field(
        default_factory=dict,
        max_length=MOST,
        description="Variants that get copies of calls, whose answers are compared with the callers' "
        "(docs/experiments.md). Not of sequences and not where tensors are in shared memory.",
        examples=[{"int8": {"share": 0.1}}],
    )
    rollout: Rollout | None = Field(
        default=None,
        description="Move units from one variant to another in steps, and all of them back if it is worse "
        "(docs/rollouts.md).",
    )
    pipeline: PipelineSpec | None = Field(
        default=None, description="Pre-processing, calls of other public models and post-processing behind this name."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Model:
        if (self.variants is None) == (self.pipeline is None):
            raise refused("needs one thing to answer with", "either 'variants' or 'pipeline'")
        others = sorted(self.model_fields_set - {"pipeline"})
        if self.pipeline is not None and others:
            raise refused(f"a pipeline has no '{others[0]}'", "route the models that it calls instead")
        return self


class Direct(Section):
    """Calling Triton's own model names through the gateway."""

    models: Literal["variants", "all", "none"] = Field(
        default="variants",
        description="Which of Triton's own names can be called besides the public ones: those of the variants below "
        "`models`, every model of the upstreams, or none. A public name always wins over the same name at Triton. "
        "Such a call is for the Triton model, not for the public one: no rule, split, `merge` or `fallback` of the "
        "latter holds for it. If variants of several upstreams use the model, it is tried on each of them, in the "
        "order in which they are written, also if a public model over it says `fallback: forbid`. Say `none` where a "
        "model must be reached by its public name only.",
    )
    upstream: Name | None = Field(
        default=None,
        description="With `all`: where names go that no variant uses. Needed only if there are several upstreams.",
        examples=["cpu"],
    )
