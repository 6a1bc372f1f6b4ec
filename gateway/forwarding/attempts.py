"""Pure: which endpoint gets the next attempt of one call. It decides; whoever has the sockets acts.

Both the awaiting and the callback way of forwarding drive this one object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gateway.status import Meaning, Verdict
from gateway.types import Plan, Variant
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.failures import NOBODY_KNOWN
from gateway.upstream.pool import Pool

UNAVAILABLE: Final = "unavailable"  # why a fallback is asked: no endpoint that could serve the variant was known
RETRY: Final = "retry"  # why an attempt is made: another one of the same variant failed
LIMITED: Final = "limited"  # there is no room for more calls at its servers
SAMPLE: Final = "sample"  # its servers are in doubt, so some calls go to the fallback to compare
_ENDPOINT_IS_BAD: Final = (Meaning.UNREACHABLE, Meaning.LOST, Meaning.DRAINING)


@dataclass(init=False, slots=True)  # not frozen: one is made for every call, and that would triple its price
class Attempt:
    """One try of one call. Only `began` may be changed."""

    variant: Variant
    endpoint: Endpoint
    number: int
    why: str  # the plan's reason, then "retry" or "hedge" (same variant) or "fallback" (another one)
    instead_of: str  # the variant before it, or the one that was chosen, if `why` is "fallback"
    began: float  # seconds on the monotonic clock; 0 if how long it takes says nothing of its endpoint

    def __init__(self, variant: Variant, endpoint: Endpoint, number: int, why: str, instead_of: str) -> None:
        self.variant = variant
        self.endpoint = endpoint
        self.number = number
        self.why = why
        self.instead_of = instead_of
        self.began = 0.0


class Attempts:
    """Goes through the plan's variants in order, and through each one's endpoints, up to `most` attempts.

    A variant that nothing can serve now is asked for once more after the others: it may be back by then, and endpoints
    that are ejected count then. The last attempt is kept for a variant not tried yet if there is one that can be: a
    pool whose endpoints all fail must not use up what a fallback needs.
    """

    __slots__ = (
        "_avoid",
        "_index",
        "_last",
        "_most",
        "_pools",
        "_put_off",
        "_returns",
        "_targets",
        "_tried_here",
        "chosen",
        "is_sample",
        "is_witness",
        "last",
        "made",
        "reason",
        "scopes",
    )

    def __init__(self, plan: Plan, pools: dict[str, Pool], most: int) -> None:
        self._targets = plan.targets
        self.reason = plan.reason  # why that variant is the first
        self.last: Attempt | None = None
        self._last = plan.instead_of or plan.targets[0].name  # the variant tried last, or meant to be the first
        self.chosen = self._last  # the name of the variant that is meant to answer
        self.is_sample = False
        self.scopes = NOBODY_KNOWN  # of the call, as far as endpoints are ejected for some calls only
        self.is_witness = False
        self._pools = pools
        self._most = most
        self._index = 0
        self._put_off: Sequence[Variant] = ()
        self._tried_here: Sequence[Endpoint] = ()  # for the current variant
        self._avoid: Sequence[Endpoint] = ()  # for every variant
        self._returns = False  # is the next attempt one more at the variant of the last, which did not begin with it?
        self.made = 0

    def maybe_next(self, *, may_retry: bool = True) -> Attempt | None:
        """The next attempt, or None if there is nothing left to try.

        may_retry: on another endpoint of the same variant. A fallback to another one always may be.
        """
        if self.made >= self._most:
            return None
        if not may_retry and self._tried_here:
            self._next_variant()
        if self._tried_here and self.made == self._most - 1 and self.has_other:
            self._next_variant()
        while self._index < len(self._targets):
            variant = self._targets[self._index]
            endpoint = self._pick(variant)
            if endpoint is not None:
                why = self._why()
                self.made += 1
                self._returns = False
                self._tried_here = (*self._tried_here, endpoint) if self._tried_here else (endpoint,)
                instead_of = self._last if why == "fallback" else ""
                self._last = variant.name
                self.last = Attempt(variant, endpoint, self.made, why, instead_of)
                return self.last
            if not self._tried_here and variant not in self._put_off:
                self._put_off = (*self._put_off, variant)
                self._targets = (*self._targets, variant)
            self._next_variant()
        return None

    @property
    def targets(self) -> Sequence[Variant]:
        return self._targets

    def put_off_first(self) -> None:
        """Begin with the second variant. The first one comes once more after all others, as if it could not serve."""
        first = self._targets[0]
        self.is_sample = True
        self._put_off = (first,)
        self._targets = (*self._targets, first)
        self._next_variant()

    def ask_though_left_alone(self) -> None:
        """Begin with the first variant also where all its endpoints are ejected."""
        self.is_witness = True
        self._put_off = (self._targets[0],)

    def maybe_hedge(self, first: Attempt) -> Attempt | None:
        """A second attempt of the same variant while the first is under way, if another endpoint can have it."""
        if self.made >= self._most or self.last is not first:
            return None
        endpoint = self._pick(first.variant)
        if endpoint is None:
            return None
        self.made += 1
        self._tried_here = (*self._tried_here, endpoint)
        return Attempt(first.variant, endpoint, self.made, "hedge", "")

    @property
    def has_other(self) -> bool:
        """Is there another variant, not tried yet, that could be?"""
        return any(map(self._can_serve, self._others()))

    def _others(self) -> Sequence[Variant]:
        """Those that the current variant is not."""
        return self._targets[self._index + 1 :]

    def failed(self, attempt: Attempt, verdict: Verdict) -> None:
        """Learn from an attempt that may be repeated elsewhere."""
        if verdict.meaning in _ENDPOINT_IS_BAD:
            self._avoid = (*self._avoid, attempt.endpoint)

    def not_made(self, before: Attempt | None) -> None:
        """The last attempt was not sent, since there is no room at its variant: the others are next.

        before: the one made before it.
        """
        self.made -= 1
        self.last = before
        self._next_variant()

    def again(self, attempt: Attempt) -> None:
        """The last attempt's server has not begun with it, since its queue was full: its variant is next once more."""
        self._most += 1
        self._tried_here = ()
        self._returns = True
        self._index = self._targets.index(attempt.variant)

    def maybe_anew(self, attempt: Attempt) -> Attempt | None:
        """An attempt that had to wait, at the endpoint that is best by now; None if its variant has none any more."""
        self._tried_here = tuple(endpoint for endpoint in self._tried_here if endpoint is not attempt.endpoint)
        endpoint = self._pick(attempt.variant)
        if endpoint is None:
            return None
        self._tried_here = (*self._tried_here, endpoint)
        attempt.endpoint = endpoint
        return attempt

    def _pick(self, variant: Variant) -> Endpoint | None:
        pool = self._pools.get(variant.upstream)
        if pool is None:
            return None
        tried = (*self._tried_here, *self._avoid) if self._avoid else self._tried_here
        if variant in self._put_off:  # all the others have been asked: even an endpoint that fails most calls may do
            return pool.maybe_pick(variant.model, variant.version, tried, self.scopes, desperate=True)
        return pool.maybe_pick(variant.model, variant.version, tried, self.scopes)

    def _can_serve(self, variant: Variant) -> bool:
        """Could a variant that is not tried yet be? Asks without taking the pool's turn, as picking would."""
        pool = self._pools.get(variant.upstream)
        endpoints = pool.endpoints if pool is not None else ()
        return any(e not in self._avoid and e.can_serve(variant.model, variant.version) for e in endpoints)

    def _next_variant(self) -> None:
        self._index += 1
        self._tried_here = ()
        self._returns = False

    def _why(self) -> str:
        if self.made == 0:
            return self.reason if self._index == 0 else "fallback"
        return RETRY if self._tried_here or self._returns else "fallback"
