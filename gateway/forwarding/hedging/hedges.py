"""The public models whose slow calls are sent a second time, to another endpoint, and what that may cost.

Source of the idea and its bound: Dean and Barroso, The Tail at Scale (CACM 56/2, 2013): defer the second request until
the first has been outstanding for longer than the 95th percentile, which limits the additional load to 5 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gateway.forwarding.hedging.latency import Latency
from gateway.forwarding.retry_budget import RetryBudget
from gateway.hooks import HedgesNow
from gateway.upstream.failures import Scopes

SHARE: Final = 0.1  # of a model's calls …
PER_SECOND: Final = 1.0  # … and so many each second, whatever there are


@dataclass(frozen=True, slots=True)
class HedgeSettings:
    """What the config says of one public model: one of the two."""

    share: float = 0.95  # of answers that are faster: a call that takes longer is hedged
    seconds: float = 0.0  # a call that takes so long is; 0: by `share`


class HedgedModel:
    """One public model in one worker."""

    def __init__(self, name: str, settings: HedgeSettings) -> None:
        self.name = name
        self.settings = settings
        self.latency = Latency(settings.share)
        self.budget = RetryBudget(SHARE, PER_SECOND)
        self.sent = 0
        self.won = 0
        self.refused = 0

    def after(self, now: float) -> float | None:
        """How long a call that begins now may take before it is hedged; None: no telling yet."""
        self.budget.began(now)
        return self.settings.seconds or self.latency.quantile(now)

    def may(self, now: float, scopes: Scopes) -> bool:
        """Is there budget for a second attempt? scopes: whose call it is."""
        if self.budget.has_some(now, scopes):
            return True
        self.refused += 1
        return False

    def began(self, now: float, scopes: Scopes) -> None:
        self.budget.take(now, scopes)
        self.sent += 1

    def now(self) -> HedgesNow:
        """May be asked from any thread."""
        after = self.settings.seconds or self.latency.known or 0.0
        return HedgesNow(self.name, self.sent, self.won, self.refused, after)


class Hedges:
    """By public model. `table` is empty, and false, when nothing is hedged."""

    def __init__(self) -> None:
        self.table: dict[str, HedgedModel] = {}

    def apply(self, settings: Mapping[str, HedgeSettings]) -> None:
        """Put a config in force. What is known of a model stays if its settings do."""
        before = self.table
        self.table = {
            name: before[name] if name in before and before[name].settings == each else HedgedModel(name, each)
            for name, each in settings.items()
        }

    def now(self) -> list[HedgesNow]:
        """May be asked from any thread."""
        return [each.now() for each in self.table.values()]
