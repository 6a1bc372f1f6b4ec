"""Quotas (pure): how much each caller may ask for, and each model, and each caller of each model."""

from gateway.quotas.buckets import Bucket, Lease, SharedBuckets
from gateway.quotas.quotas import (
    NO_LIMITS,
    OTHERS,
    CallerQuota,
    Limits,
    Quota,
    QuotaNow,
    Quotas,
    QuotaSettings,
    caller_name,
)

__all__ = [
    "NO_LIMITS",
    "OTHERS",
    "Bucket",
    "CallerQuota",
    "Lease",
    "Limits",
    "Quota",
    "QuotaNow",
    "QuotaSettings",
    "Quotas",
    "SharedBuckets",
    "caller_name",
]
