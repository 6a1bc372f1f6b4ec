"""merge (pure): several callers' small requests as one, and one answer as theirs. No I/O, no clock, no event loop."""

from gateway.merge.layout import Layout, Layouts, Part
from gateway.merge.merger import Batch, Member, MergeLimits, Merger, MergeSettings
from gateway.merge.proof import carried, fits, why_not
from gateway.merge.window import Window

__all__ = [
    "Batch",
    "Layout",
    "Layouts",
    "Member",
    "MergeLimits",
    "MergeSettings",
    "Merger",
    "Part",
    "Window",
    "carried",
    "fits",
    "why_not",
]
