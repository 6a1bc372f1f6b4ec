"""batching: several callers' small requests as one request, and its answer as theirs. Pure, except `merge_point`."""

from gateway.forwarding.batching.concurrency_limit import ConcurrencyLimit
from gateway.forwarding.batching.merger import Batch, Member, MergeLimits, Merger, MergeSettings
from gateway.forwarding.batching.proof import carried, fits, why_not
from gateway.v2.layout import Layout, Layouts, Part

__all__ = [
    "Batch",
    "ConcurrencyLimit",
    "Layout",
    "Layouts",
    "Member",
    "MergeLimits",
    "MergeSettings",
    "Merger",
    "Part",
    "carried",
    "fits",
    "why_not",
]
