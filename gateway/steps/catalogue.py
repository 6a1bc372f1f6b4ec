"""steps (pure): steps by name. May use the steps; imports a user's step only when it is asked for.

A name is one of ours, or that of an entry point in the group `inference_gateway.steps`, or `module:attribute`. All
three lead to a subclass of `Step` or of `SplitStep`.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any, cast

from pydantic import BaseModel

from gateway.steps.filetype import FileBlocks, FileType
from gateway.steps.image import DecodeImage
from gateway.steps.language import TextFeatures
from gateway.steps.reading.lines import LinePixels, TextRegions, TurnedLine
from gateway.steps.reading.page import PagePixels
from gateway.steps.reading.text import CtcText, ReadingOrder
from gateway.steps.recommendation import RankRequest, TopCandidates
from gateway.steps.scores import Softmax, TopK
from gateway.steps.step import AnyStep, SplitStep, Step
from gateway.steps.translation import TextTokens, TokenText

GROUP = "inference_gateway.steps"

StepType = type[AnyStep[Any]]  # Any: each step has parameters of its own type, which `params_type` names

SHIPPED: dict[str, StepType] = {
    "ctc_text": CtcText,
    "decode_image": DecodeImage,
    "file_blocks": FileBlocks,
    "file_type": FileType,
    "line_pixels": LinePixels,
    "page_pixels": PagePixels,
    "rank_request": RankRequest,
    "reading_order": ReadingOrder,
    "softmax": Softmax,
    "text_features": TextFeatures,
    "text_regions": TextRegions,
    "text_tokens": TextTokens,
    "token_text": TokenText,
    "top_candidates": TopCandidates,
    "top_k": TopK,
    "turned_line": TurnedLine,
}


class UnknownStep(Exception):
    """There is no step of this name. `wrong` says why, `right` what could be meant."""

    def __init__(self, wrong: str, right: str) -> None:
        super().__init__(f"{wrong}; {right}")
        self.wrong = wrong
        self.right = right


def find_step(name: str) -> StepType:
    """The step of this name; shipped steps win over entry points.

    :raises UnknownStep: if there is none, or importing it fails, or it is no subclass of `Step` or `SplitStep`.
    """
    if name in SHIPPED:
        return SHIPPED[name]
    where = name if ":" in name else _entry_points().get(name)
    if where is None:
        known = [*SHIPPED, *_entry_points()]
        raise UnknownStep(f"unknown step '{name}'", f"known: {', '.join(sorted(known))}{did_you_mean(name, known)}")
    return _load(name, where)


def module_of(name: str) -> str:
    """The module that a user's step of this name is in; "" if it is a shipped one, or there is none."""
    where = "" if name in SHIPPED else name if ":" in name else _entry_points().get(name, "")
    return where.partition(":")[0].strip()


def did_you_mean(name: str, known: list[str]) -> str:
    """` (did you mean 'x'?)` if a known name is close; else ""."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _entry_points() -> dict[str, str]:
    from importlib.metadata import entry_points  # noqa: PLC0415  # scans all installed packages; rarely needed

    return {point.name: point.value for point in entry_points(group=GROUP)}


def _load(name: str, where: str) -> StepType:
    right = "a subclass of gateway.steps.Step or SplitStep, as module:attribute, with params_type set"
    try:
        found = find_attribute(where)
    except BaseException as exc:  # a user's module may raise anything when it is imported, `SystemExit` too
        raise UnknownStep(f"step '{name}' cannot be imported: {one_line(exc)}", right) from exc
    is_step = isinstance(found, type) and issubclass(found, Step | SplitStep)
    if not (is_step and _is_params(getattr(found, "params_type", None))):
        raise UnknownStep(f"step '{name}' is not a step", right)
    return cast("StepType", found)


def find_attribute(where: str) -> Any:
    """What `module:attribute` names. Raises whatever the import does."""
    module, _, attribute = where.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _is_params(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, BaseModel)


def one_line(thrown: BaseException) -> str:
    """The text of an exception from a user's code, on one line; its type's name if it has no readable text."""
    try:
        text = " ".join(str(thrown).split())[:500]
    except BaseException:  # the text is made by the user's code, which may raise anything
        text = ""
    return f"{type(thrown).__name__}: {text}" if text else type(thrown).__name__
