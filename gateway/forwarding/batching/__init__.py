"""merge (pure): several callers' small requests as one, and one answer as theirs. No I/O, no clock, no event loop."""

from gateway.v2.layout import Layout, Layouts, Part
from gateway.forwarding.batching.merger import Batch, Member, MergeLimits, Merger, MergeSettings
from gateway.forwarding.batching.proof import carried, fits, why_not
from gateway.forwarding.batching.concurrency_limit import Window

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
