"""steps (pure): a pipeline as a config file declares it. May use spec, pydantic. Only form is checked here.

Whether the steps exist and fit together is found when the pipeline is built (`pipeline`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gateway.steps.fan_out import MIB
from gateway.v2.spec import Datatype, TensorSpec

Size = Annotated[int, Field(ge=-1, le=2**31 - 1)]


def _as_map(names: object) -> object:
    return {name: name for name in names} if isinstance(names, list) else names


Names = Annotated[dict[str, str], BeforeValidator(_as_map, json_schema_input_type=dict[str, str] | list[str])]
"""The step's or model's name of a tensor → the pipeline's name of it, as in the maps of Triton's ensembles. A list
stands for tensors whose names are the same."""


class Declared(BaseModel):
    """Base of what is declared here."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class TensorDeclaration(Declared):
    """An input or output of a pipeline, as in a Triton model's config."""

    name: str = Field(min_length=1, description="The tensor's name, as callers see it.")
    datatype: Datatype = Field(description="Datatype of the V2 protocol. BF16 is not possible here: use FP32.")
    shape: tuple[Size, ...] = Field(
        description="Sizes of the axes of one row, the batch axis left out; -1 for any. [1] is one element a row."
    )

    @model_validator(mode="after")
    def _is_representable(self) -> TensorDeclaration:
        if self.datatype == "BF16":
            raise ValueError("a pipeline's tensor cannot be BF16; use FP32")
        if 0 in self.shape:
            raise ValueError("an axis of size 0 holds nothing; use -1 for any size")
        return self

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.datatype, self.shape)


class PartDeclaration(Declared):
    """One part of a pipeline: a step that runs in the gateway, a call of another public model, or a fan-out."""

    step: str | None = Field(
        default=None,
        description="A shipped step, an entry point in the group inference_gateway.steps, or module:attribute.",
    )
    with_: dict[str, Any] = Field(  # Any: checked against the step's own parameters when the pipeline is built
        default_factory=dict, alias="with", description="The step's parameters."
    )
    call: str | None = Field(default=None, description="Public name of the model to call.")
    inputs: Names | None = Field(
        default=None,
        description="The step's or model's name of a tensor → the pipeline's; a list if they are the same. A step "
        "itself says what it reads, so only other names are given: decode_image reads 'image', and from a pipeline "
        "whose input is 'photo' by {image: photo}. A call sends exactly what is named: [image] sends this one tensor. "
        "If nothing is, it sends what the part right before it made (the pipeline's inputs, if it comes first).",
    )
    outputs: Names | None = Field(
        default=None,
        description="As `inputs`, for what comes out. A call asks for exactly these outputs, or, if left out, for all.",
    )

    fan_out: FanOutDeclaration | None = Field(
        default=None, description="Work on items that a step finds in each row, such as the lines on a page."
    )

    @model_validator(mode="after")
    def _is_one_of_three(self) -> PartDeclaration:
        if sum(each is not None for each in (self.step, self.call, self.fan_out)) != 1:
            raise ValueError("needs either 'step' or 'call' or 'fan_out'")
        if self.call is not None and self.with_:
            raise ValueError("a call takes no parameters ('with')")
        if self.fan_out is not None and (self.with_ or self.inputs or self.outputs):
            raise ValueError("a fan_out takes 'with', 'inputs' and 'outputs' inside")
        return self


class FanOutDeclaration(Declared):
    """Items are made of each row, any number or none; the items of all rows go through `steps` together, and a model
    gets them in batches of one shape; what they made goes back to the rows that they are of.
    """

    step: str = Field(description="The step that makes the items of one row: a split step, named as other steps are.")
    with_: dict[str, Any] = Field(  # Any: as in PartDeclaration
        default_factory=dict, alias="with", description="Its parameters."
    )
    inputs: Names | None = Field(default=None, description="As those of a step.")
    items: Names | None = Field(default=None, description="As `outputs` of a step: what one item has.")
    steps: tuple[PartDeclaration, ...] = Field(
        min_length=1,
        description="What is done with the items, in this order. Parts in here see the items' tensors and no others; "
        "an item is a row for them.",
    )
    outputs: tuple[TensorDeclaration, ...] = Field(
        min_length=1,
        description="What goes back to the rows, as it is of one item. A row gets those of its items in their order: "
        "its tensor has one axis more, in front, whose size is that of the row with the most items: the others are "
        "filled up with zeros or empty texts.",
    )
    count: str = Field(
        min_length=1, description="Name of the tensor, INT32 [1], that says how many items each row has."
    )
    max_batch_size: int = Field(
        default=16,
        ge=1,
        le=4096,
        description="Most items of one model call: at most what the called models take. More items are several calls.",
    )
    most: int = Field(
        default=256,
        ge=1,
        le=100_000,
        description="Most items of one row. For more its caller gets INVALID_ARGUMENT, and is told which row it is.",
    )
    most_together: int = Field(
        default=1024, ge=1, le=1_000_000, description="Most items of all rows of one request; likewise."
    )
    most_bytes: int = Field(
        default=64 * MIB,
        ge=1,
        le=1 << 40,
        description="Most bytes of the items of one request, as the step makes them; likewise. They count as part of "
        "`pipelines.memory`, as what is made of them does.",
    )


class PipelineSpec(Declared):
    """Pre-processing, calls of public models and post-processing, behind one public model."""

    inputs: tuple[TensorDeclaration, ...] = Field(min_length=1, description="What callers send.")
    outputs: tuple[TensorDeclaration, ...] = Field(min_length=1, description="What callers get.")
    max_batch_size: int = Field(
        default=16,
        ge=1,
        le=4096,
        description="Most rows of one request: at most what the called models take. 16 is what the image models take.",
    )
    steps: tuple[PartDeclaration, ...] = Field(min_length=1, description="What is done, in this order.")


def named_steps(parts: tuple[PartDeclaration, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """The names of all steps in these parts, each with the keys that lead to it."""
    for number, part in enumerate(parts):
        if part.step is not None:
            yield (number, "step"), part.step
        if part.fan_out is not None:
            yield (number, "fan_out", "step"), part.fan_out.step
            for where, name in named_steps(part.fan_out.steps):
                yield (number, "fan_out", "steps", *where), name
