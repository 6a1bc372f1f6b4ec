"""Config of shadows: which variant gets copies of a model's requests, and when its answers agree with the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

from pydantic import Field, model_validator

from gateway.config.section import Section
from gateway.config.units import GIB, KIB, MIB, MILLISECONDS, MINUTES, Duration, Number, Size, Whole, refused
from gateway.experiments.compare import Classification, Comparison, Detections, Ranking, Tensors, Texts
from gateway.steps.catalogue import find_attribute, one_line

TensorName = Annotated[str, Field(min_length=1, max_length=200)]
Share = Annotated[Number, Field(ge=0, le=1)]
Tolerance = Annotated[Number, Field(ge=0, le=1e12)]
Top = Annotated[Whole, Field(ge=1, le=10_000)]


class CompareTensors(Section):
    """Every element is close: |a − b| ≤ absolute + relative · |a|. NaN equals NaN only."""

    absolute: Tolerance = Field(default=1e-5, description="An absolute difference that does not matter.")
    relative: Tolerance = Field(default=1e-3, description="A difference, as a share of the value, that does not.")
    cosine: Annotated[Number, Field(ge=-1, le=1)] = Field(
        default=-1.0, description="The least cosine between the two answers, for each output."
    )

    def comparison(self) -> Comparison:
        return Tensors(self.absolute, self.relative, self.cosine)


class CompareClassification(Section):
    """The best class of each row is the same."""

    output: TensorName | None = Field(
        default=None, description="The output of scores, whose last axis is the classes. Without it the only output."
    )
    top: Top = Field(default=5, description="How many of the best classes the measure `topk` looks at.")
    score: Tolerance | None = Field(
        default=None, description="By how much the best class's score may differ. Without it by any."
    )

    def comparison(self) -> Comparison:
        return Classification(self.output or "", self.top, float("inf") if self.score is None else self.score)


class CompareText(Section):
    """Texts are the same, but for a share of their characters (edit distance)."""

    output: TensorName | None = Field(default=None, description="The output of BYTES. Without it the only output.")
    distance: Share = Field(default=0.0, description="The share of the longer text's characters that may differ.")

    def comparison(self) -> Comparison:
        return Texts(self.output or "", self.distance)


class CompareDetections(Section):
    """The same things are found in the same places."""

    boxes: TensorName = Field(description="The output of boxes: x1, y1, x2, y2 each.", examples=["boxes"])
    scores: TensorName = Field(description="The output with a score for each box.", examples=["scores"])
    classes: TensorName | None = Field(default=None, description="The output with a class for each box, if any.")
    iou: Share = Field(default=0.5, description="The overlap (intersection over union) from which two boxes are one.")
    score: Number = Field(default=0.5, description="Boxes with a lower score do not count.")
    matched: Share = Field(default=1.0, description="The share of the boxes of both answers that must have a partner.")

    def comparison(self) -> Comparison:
        return Detections(self.boxes, self.scores, self.classes or "", self.iou, self.score, self.matched)


class CompareRanking(Section):
    """The best candidates are the same, in nearly the same order."""

    output: TensorName | None = Field(
        default=None, description="The output of scores, or of ids in order. Without it the only output."
    )
    top: Top = Field(default=10, description="How many of the best are compared.")
    overlap: Share = Field(default=1.0, description="The share of them that both answers must have.")
    tau: Annotated[Number, Field(ge=-1, le=1)] = Field(default=-1.0, description="The least Kendall's tau.")

    def comparison(self) -> Comparison:
        return Ranking(self.output or "", self.top, self.overlap, self.tau)


class Compare(Section):
    """One way of comparing two answers. NaN and infinity are counted whatever it is."""

    tensors: CompareTensors | None = Field(default=None, description="By the values of all outputs.")
    classification: CompareClassification | None = Field(default=None, description="By the best class.")
    text: CompareText | None = Field(default=None, description="By texts.")
    detections: CompareDetections | None = Field(default=None, description="By boxes.")
    ranking: CompareRanking | None = Field(default=None, description="By the best candidates.")
    own: str | None = Field(
        default=None,
        max_length=200,
        description="By a function of your own, `module:attribute`: it takes two mappings of arrays by output name, "
        "the caller's answer first, and returns a `gateway.experiments.compare.Agreement` (docs/experiments.md).",
        examples=["my_models.agreement:same_plan"],
    )

    @model_validator(mode="after")
    def _one(self) -> Compare:
        ways = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(ways) != 1:
            raise refused("needs one way", f"one of {', '.join(type(self).model_fields)}")
        if self.own is not None:
            _own(self.own)
        return self

    def comparison(self) -> Comparison:
        if self.own is not None:
            return _own(self.own)
        for name in type(self).model_fields:
            way = getattr(self, name)
            if way is not None:
                return way.comparison()  # type: ignore[no-any-return]  # each of them has it
        raise AssertionError  # `_one` has seen to it


def _own(name: str) -> Callable[..., Any]:
    right = "module:attribute of a function of two mappings of arrays"
    if ":" not in name:
        raise refused("is no module:attribute", right)
    try:
        found = find_attribute(name)
    except BaseException as error:  # a user's module may raise anything when it is imported
        raise refused(f"cannot be imported: {one_line(error)}", right) from error
    if not callable(found):
        raise refused("can't be called", right)
    return found  # type: ignore[no-any-return]  # a user's


class Keep(Section):
    """Disagreements kept so that a person can look at them. Files are as confidential as what callers send."""

    directory: str = Field(
        min_length=1,
        max_length=1000,
        description="Where the files go: a folder, or a URL that fsspec knows, as with `telemetry.capture`.",
        examples=["/var/lib/inference-gateway/disagreements"],
    )
    request: bool = Field(
        default=False,
        strict=True,
        description="Keep the request, too, so that it can be sent again (`replay`). Without it its digest is kept.",
    )
    max_bytes: Annotated[int, Size(1 * KIB, 64 * MIB)] = Field(
        default=1 * MIB, description="Requests and answers that are larger are kept as their digests."
    )
    file_bytes: Annotated[int, Size(64 * KIB, 1 * GIB)] = Field(default=16 * MIB, description="The size of one file.")
    files: Whole = Field(default=8, ge=1, le=10_000, description="Files that are kept; the oldest are deleted.")


class Parity(Section):
    """The variant must agree first, before calls fall back to it."""

    copies: Whole = Field(default=200, ge=1, le=100_000, description="So many copies, the last ones, count.")
    agreement: Share = Field(
        default=0.99,
        description="The share of them that must agree. A copy that fails or has NaN in its answer does not.",
    )


class Shadow(Section):
    """Copies of a share of the model's requests for one more variant, whose answers no caller gets."""

    share: Share = Field(default=0.01, description="The share of calls that are copied.", examples=[0.1])
    in_flight: Whole = Field(
        default=4,
        ge=1,
        le=1000,
        description="Most copies under way, in each worker. 64 wait; further ones are dropped and counted.",
    )
    timeout: Annotated[float, Duration(10 * MILLISECONDS, 10 * MINUTES)] = Field(
        default=10.0, description="How long one may take."
    )
    compare: Compare = Field(
        default_factory=lambda: Compare(tensors=CompareTensors()),
        description="When two answers agree. Without it: `tensors: {}`.",
    )
    keep: Keep | None = Field(default=None, description="Keep disagreements.")
    parity: Parity | None = Field(
        default=None,
        description="Let no call fall back to the variant until its answers have agreed: in each worker since its "
        "start, or, where `store.url` is said, in all workers and replicas together. Calls that are meant for it by "
        "rule or split get it all the same.",
        examples=[{"copies": 500, "agreement": 0.99}],
    )


Shadows = Mapping[str, Shadow]
MOST: Final = 8  # shadows of one model
