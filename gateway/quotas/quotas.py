"""quotas (pure): which quotas a call comes under, whether it is within them, and what is left.

A call comes under up to three: its caller's, its model's, and its caller's at this model. It is let in if it is within
all of them, and only then it uses any. What is kept is bounded: callers that the config names, and some thousands
of others, of which the oldest are forgotten.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from gateway.bounded import make_room
from gateway.errors import QuotaExceeded, shown
from gateway.quotas.buckets import Bucket, Lease, SharedBuckets

OTHERS: Final = "other"
"""The name in metrics of all callers that the config does not name."""

_MOST_OTHERS: Final = 10_000  # callers that the config does not name
_MOST_ACCOUNTS: Final = 40_000  # of all of them, as far as those still are _LEAST_OTHERS; each takes about 800 bytes
_LEAST_OTHERS: Final = 1000
_MOST_NAME: Final = 200  # characters of a caller's name; longer ones that begin alike are one
_MOST_TEXTS: Final = 1024  # of refusals, which are remembered
_BUSY_SECONDS: Final = 0.1  # after which to try again when all places are taken: nobody knows when one is free
REASONS: Final = ("requests", "bytes", "rows", "concurrent")
_UNITS: Final = ("requests per second", "bytes per second", "rows per second", "calls at a time")


@dataclass(frozen=True, slots=True)
class Limits:
    """0: not limited."""

    requests: float = 0.0  # per second
    bytes: float = 0.0  # per second
    rows: float = 0.0  # per second
    concurrent: int = 0
    burst: float = 1.0  # seconds' worth that may come at once

    @property
    def limits_something(self) -> bool:
        return bool(self.requests or self.bytes or self.rows or self.concurrent)

    def shared_by(self, workers: int) -> Limits:
        """What one of so many workers may let in."""
        concurrent = max(1, self.concurrent // workers) if self.concurrent else 0
        return Limits(self.requests / workers, self.bytes / workers, self.rows / workers, concurrent, self.burst)


NO_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class CallerQuota:
    """Of one caller."""

    limits: Limits = NO_LIMITS
    models: Mapping[str, Limits] = field(default_factory=dict)  # at these, beside `limits`
    is_batch: bool | None = None  # are its calls of the batch class? None: they say it themselves


_NO_QUOTA: Final = CallerQuota()


@dataclass(frozen=True, slots=True)
class QuotaSettings:
    """What the config says of it."""

    caller: str = ""  # the metadata key that has a caller's name; "": all callers are one, without a name
    callers: Mapping[str, CallerQuota] = field(default_factory=dict)
    default: CallerQuota = _NO_QUOTA  # of each caller that `callers` does not name
    models: Mapping[str, Limits] = field(default_factory=dict)  # of all callers together
    workers: int = 1  # that share what is not shared in a store

    @property
    def is_on(self) -> bool:
        quotas = (self.default, *self.callers.values())
        return any(
            limits.limits_something
            for limits in (
                *self.models.values(),
                *(q.limits for q in quotas),
                *(m for q in quotas for m in q.models.values()),
            )
        )


@dataclass(frozen=True, slots=True)
class QuotaNow:
    """One quota, as it stands."""

    caller: str  # "": of all callers together
    model: str  # "": for all models together
    limits: Limits
    left: Mapping[str, float]  # by reason, of this process; below 0 if more was used
    in_flight: int


def caller_name(metadata: Mapping[str, str], key: str) -> str:
    """The name of the caller of a call with this metadata: the one place that knows where it is."""
    name = metadata.get(key, "") if key else ""
    return name if len(name) <= _MOST_NAME else name[:_MOST_NAME]


_STEPS: Final = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
_UNITS_OF_TIME: Final = tuple(10.0**power for power in range(-9, 10))
_TIMES: Final = [float(f"{step * unit:.2g}") for unit in _UNITS_OF_TIME for step in _STEPS]


def _rounded_up(seconds: float) -> float:
    """To one of ten times between 1 and 10, so that most refusals are like one before, whose answer is known."""
    at = bisect_left(_TIMES, seconds * (1 - 1e-6))
    return _TIMES[at] if at < len(_TIMES) else seconds


@lru_cache(_MOST_TEXTS)
def _refusal(whose: str, limit: float, short: int, seconds: float) -> tuple[str, str]:
    """The text of a refusal, and the limit in words.

    All accounts have one memory for them, since callers may invent names, and each name has an account.
    """
    told = f"{limit:.15g} {_UNITS[short]}"
    return f"The quota of {whose} is used up: {told}; try again in {seconds:.2g} s", told


class Account:
    """One quota."""

    def __init__(self, caller: str, model: str, refused: dict[str, int]) -> None:
        """refused: counts of calls by reason, which accounts may share."""
        self.caller = caller
        self.model = model
        self.limits = NO_LIMITS
        self.refused = refused
        self.in_flight = 0
        self._most = 0
        self._requests: Bucket | None = None
        self._bytes: Bucket | None = None
        self._rows: Bucket | None = None
        parts = (f"caller '{shown(caller)}'" if caller else "", f"model '{model}'" if model else "")
        self._whose = " of ".join(part for part in parts if part) or "callers without a name"
        subject = (f"caller:{shown(caller)}" if caller else "", f"model:{model}" if model else "")
        self._subject = ",".join(part for part in subject if part)
        self._short = 0  # of which reason there was too little, when there last was

    def limit(self, limits: Limits, workers: int, shared: SharedBuckets | None) -> None:
        """Put limits in force. Buckets whose limit has changed begin full."""
        mine, before = limits.shared_by(workers), self.limits
        self._most = mine.concurrent
        if before == limits:
            return
        self.limits = limits
        rates = mine if shared is None else limits
        self._requests = self._bucket("requests", rates.requests, limits.burst, shared)
        self._bytes = self._bucket("bytes", rates.bytes, limits.burst, shared)
        self._rows = self._bucket("rows", rates.rows, limits.burst, shared)

    def _bucket(self, what: str, rate: float, burst: float, shared: SharedBuckets | None) -> Bucket | None:
        if not rate:
            return None
        if shared is None:
            return Bucket(rate, burst)
        return Lease(f"{what}:{len(self.caller)}:{self.caller}:{self.model}", rate, burst, shared)

    def wait(self, size: int, rows: int, now: float) -> float:
        """Seconds until such a call would be within the quota; 0.0: it is."""
        wait, short = 0.0, 0
        if self._most and self.in_flight >= self._most:
            wait, short = _BUSY_SECONDS, 3
        if self._requests is not None:
            longer = self._requests.wait(1.0, now)
            if longer > wait:
                wait, short = longer, 0
        if self._bytes is not None:
            longer = self._bytes.wait(size, now)
            if longer > wait:
                wait, short = longer, 1
        if self._rows is not None:
            longer = self._rows.wait(rows, now)
            if longer > wait:
                wait, short = longer, 2
        if wait:
            self._short = short
        return wait

    def enter(self, size: int, rows: int, now: float) -> None:
        self.in_flight += 1
        if self._requests is not None:
            self._requests.take(1.0, now)
        if self._bytes is not None:
            self._bytes.take(size, now)
        if self._rows is not None:
            self._rows.take(rows, now)

    def leave(self, size: int, now: float) -> None:
        self.in_flight -= 1
        if self._bytes is not None and size:
            self._bytes.take(size, now)

    def exceeded(self, wait: float) -> QuotaExceeded:
        """The error for a call that would have to wait so many seconds. It is counted."""
        reason = REASONS[self._short]
        self.refused[reason] = self.refused.get(reason, 0) + 1
        seconds, limits = _rounded_up(wait), self.limits
        limit = (limits.requests, limits.bytes, limits.rows, float(limits.concurrent))[self._short]
        text, told = _refusal(self._whose, limit, self._short, seconds)
        return QuotaExceeded(text, seconds, self._subject, reason, told)

    def now(self, now: float) -> QuotaNow:
        buckets = {"requests": self._requests, "bytes": self._bytes, "rows": self._rows}
        left = {name: bucket.left(now) for name, bucket in buckets.items() if bucket is not None}
        if self._most:
            left["concurrent"] = float(self._most - self.in_flight)
        return QuotaNow(self.caller, self.model, self.limits, left, self.in_flight)


class Quota:
    """All that calls of one caller to one model come under."""

    def __init__(self, accounts: tuple[Account, ...]) -> None:
        self.accounts = accounts

    def enter(self, size: int, rows: int, now: float) -> None:
        """Let a call in, which must `leave` once. size: bytes of its request.

        :raises QuotaExceeded: if it is not within all quotas; then it has used none.
        """
        longest, at = 0.0, None
        for account in self.accounts:
            wait = account.wait(size, rows, now)
            if wait > longest:
                longest, at = wait, account
        if at is not None:
            raise at.exceeded(longest)
        for account in self.accounts:
            account.enter(size, rows, now)

    def leave(self, size: int, now: float) -> None:
        """size: bytes of the answers."""
        for account in self.accounts:
            account.leave(size, now)


class _Caller:
    """One caller: its quotas by model."""

    def __init__(self, name: str, quota: CallerQuota) -> None:
        self.name = name
        self.quota = quota
        self.accounts: dict[str, Account] = {}  # by model; "" for all models together
        self.found: dict[str, Quota] = {}  # by model; "" for those without a quota of their own

    def limits_at(self, model: str) -> Limits:
        """model: "" for all models together."""
        return self.quota.models.get(model, NO_LIMITS) if model else self.quota.limits


class Quotas:
    """The quotas in force. `is_on` is false, and nothing else is asked, when there are none."""

    def __init__(self) -> None:
        self.is_on = False
        self.counts_rows = False
        self.shared: SharedBuckets | None = None
        self._settings = QuotaSettings()
        self._models: dict[str, Account] = {}
        self._named: dict[str, _Caller] = {}
        self._others: dict[str, _Caller] = {}
        self._most_others = _MOST_OTHERS
        self._refused: dict[tuple[str, str], dict[str, int]] = {}  # by caller, or OTHERS, and model

    def apply(self, settings: QuotaSettings, shared: SharedBuckets | None) -> None:
        """Put a config in force. Quotas that stay the same go on as they stand, and calls in flight are still counted.

        shared: None if each process has its own share.
        """
        is_same_store = shared is self.shared
        self._settings, self.shared = settings, shared
        self.is_on = settings.is_on
        self._most_others = max(_LEAST_OTHERS, min(_MOST_OTHERS, _MOST_ACCOUNTS // (1 + len(settings.default.models))))
        quotas = (settings.default, *settings.callers.values())
        limits = (
            *settings.models.values(),
            *(q.limits for q in quotas),
            *(m for q in quotas for m in q.models.values()),
        )
        self.counts_rows = any(each.rows for each in limits)
        models, self._models = self._models, {}
        for name, of_model in settings.models.items():
            account = models.get(name) or Account("", name, self._counts("", name))
            self._limit(account, of_model, is_same_store)
            self._models[name] = account
        named, others = self._named, self._others
        self._named, self._others = {}, {}
        for name, quota in settings.callers.items():
            self._named[name] = self._made(name, named.get(name) or others.get(name), is_same_store)
            for model in ("", *quota.models):  # so that they are shown before they are used
                self._maybe_account(self._named[name], model)
        if settings.default.limits.limits_something or settings.default.models or settings.models:
            for name, caller in (*others.items(), *named.items()):
                if name not in self._named:
                    self._others[name] = self._made(name, caller, is_same_store)

    def _made(self, name: str, before: _Caller | None, is_same_store: bool) -> _Caller:
        """A caller, with the accounts that it had before and that still limit something."""
        caller = _Caller(name, self._settings.callers.get(name, self._settings.default))
        for model, account in before.accounts.items() if before is not None else ():
            limits = caller.limits_at(model)
            if limits.limits_something:
                self._limit(account, limits, is_same_store)
                caller.accounts[model] = account
        return caller

    def _maybe_account(self, caller: _Caller, model: str) -> Account | None:
        """One of a caller's, made when it is first needed: who invents names must not get a hundred for each of them.

        returns:  None if nothing is limited there.
        """
        account = caller.accounts.get(model)
        if account is None:
            limits = caller.limits_at(model)
            if not limits.limits_something:
                return None
            account = caller.accounts[model] = Account(caller.name, model, self._counts(caller.name, model))
            account.limit(limits, self._settings.workers, self.shared)
        return account

    def _limit(self, account: Account, limits: Limits, is_same_store: bool) -> None:
        if not is_same_store:
            account.limits = NO_LIMITS  # so that its buckets are made anew
        account.limit(limits, self._settings.workers, self.shared)

    def _counts(self, caller: str, model: str) -> dict[str, int]:
        label = caller if not caller or caller in self._settings.callers else OTHERS
        return self._refused.setdefault((label, model), {})

    def of(self, metadata: Mapping[str, str], model: str) -> Quota:
        """What a call with this metadata to this model comes under."""
        name = caller_name(metadata, self._settings.caller)
        caller = self._named.get(name) or self._others.get(name)
        if caller is None:
            make_room(self._others, self._most_others)
            caller = self._others[name] = _Caller(name, self._settings.default)
        if model not in self._models and model not in caller.quota.models:
            model = ""
        quota = caller.found.get(model)
        if quota is None:
            own = self._maybe_account(caller, model) if model else None
            accounts = (self._maybe_account(caller, ""), own, self._models.get(model))
            quota = caller.found[model] = Quota(tuple(each for each in accounts if each is not None))
        return quota

    def name_of(self, metadata: Mapping[str, str]) -> str:
        return caller_name(metadata, self._settings.caller)

    def is_named(self, caller: str) -> bool:
        """Is it in the config? Only then its name may become the value of a metric label."""
        return caller in self._settings.callers

    def class_of(self, metadata: Mapping[str, str]) -> bool | None:
        """Are this caller's calls of the batch class? None: they say it themselves."""
        name = caller_name(metadata, self._settings.caller)
        return self._settings.callers.get(name, self._settings.default).is_batch

    def now(self, now: float) -> list[QuotaNow]:
        """May be asked from any thread. Of the callers that the config does not name, those that have used most."""
        callers = [*self._named.values(), *_most_used(list(self._others.values()), now)]
        accounts = [*self._models.values()]
        for caller in callers:
            accounts += list(caller.accounts.values())  # at once: the loop may add one meanwhile
        return [account.now(now) for account in accounts]

    @property
    def is_store_away(self) -> bool | None:
        """None: there is no store."""
        return None if self.shared is None else self.shared.is_away

    def refused(self) -> dict[tuple[str, str], Mapping[str, int]]:
        """Calls since the start, by caller (`OTHERS` for those that the config does not name) and model, by reason."""
        return {key: dict(counts) for key, counts in list(self._refused.items())}


_MOST_SHOWN: Final = 20


def _most_used(callers: Iterable[_Caller], now: float) -> list[_Caller]:
    def share_left(caller: _Caller) -> float:
        account = caller.accounts.get("")
        if account is None:
            return 1.0
        full = {"requests": account.limits.requests, "bytes": account.limits.bytes, "rows": account.limits.rows}
        shares = [
            left / (full[name] * account.limits.burst) for name, left in account.now(now).left.items() if full.get(name)
        ]
        return min(shares, default=1.0)

    return sorted(callers, key=share_left)[:_MOST_SHOWN]
