"""batching: several callers' small requests as one, and one answer as theirs. All but `merge_point` is pure."""

from gateway.forwarding.batching.concurrency_limit import Window
from gateway.forwarding.batching.merger import Batch, Member, MergeLimits, Merger, MergeSettings
from gateway.forwarding.batching.proof import carried, fits, why_not
from gateway.v2.layout import Layout, Layouts, Part

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
