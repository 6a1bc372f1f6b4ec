"""The interchangeable endpoints of one upstream: which one a call goes to. Decides only; `forwarding` acts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Container, Sequence
from typing import Final

from mypy_extensions import mypyc_attr

from gateway.upstream.endpoint import Endpoint, FailedCall, ModelKey, State
from gateway.upstream.failures import NOBODY_KNOWN, Scopes
from gateway.upstream.outlier import NOWHERE, Counts, Elsewhere, Standing

_READY: Final = State.READY  # see `status.OK`
_DOWN: Final = State.DOWN

MOST_COMPARED: Final = 4  # endpoints; of more, two are drawn
MOST_REACHED: Final = 3  # places of a sequence that are tried, in an upstream with a subset
_DRAWS: Final = 8  # until half of a pool may be gone and two are found still (but for one time in 28)


@mypyc_attr(allow_interpreted_subclasses=True)
class Pool:
    """Least-loaded choice among the endpoints that can serve a model, without those that fail more than their peers."""

    def __init__(
        self, name: str, endpoints: Sequence[Endpoint], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.endpoints = tuple(endpoints)
        self._clock = clock

    def __repr__(self) -> str:
        return f"<Pool {self.name} {self.endpoints!r}>"

    @property
    def addresses(self) -> Sequence[str]:
        """Of the upstream, and so the same for every gateway."""
        return [endpoint.address for endpoint in self.endpoints]

    def in_order(self, addresses: Sequence[str]) -> Pool:
        """For one call that is to go to the first of them that can take it. Each is one of `addresses`."""
        known = {endpoint.address: endpoint for endpoint in self.endpoints}
        return Ranked(self.name, [known[address] for address in addresses])

    def is_available(self, model: str, version: str) -> bool:
        for endpoint in self.endpoints:  # a loop and not any(): no generator on the hot path  # noqa: SIM110
            if endpoint.can_serve(model, version):
                return True
        return False

    def is_open(self, model: str, version: str, now: float, scopes: Scopes = NOBODY_KNOWN) -> bool:
        """Could an endpoint take a call of these, be it for a trial?"""
        for endpoint in self.endpoints:
            if endpoint.can_serve(model, version) and not endpoint.is_out(model, version, now, scopes):
                return True
        return False

    def maybe_pick(
        self,
        model: str,
        version: str,
        tried: Container[Endpoint] = (),
        scopes: Scopes = NOBODY_KNOWN,
        *,
        desperate: bool = False,
    ) -> Endpoint | None:
        """The endpoint with the least load of those in the best state, or None.

        Of a large pool two are drawn and compared, which comes close to the least loaded one of all (M. Mitzenmacher,
        The Power of Two Choices in Randomized Load Balancing, 2001); few are all compared. See `Endpoint.is_better`.

        scopes: of the call, as far as ejections depend on that. desperate: also one that is ejected, since there is
        nothing else.
        """
        endpoints = self.endpoints
        count = len(endpoints)
        if not count:  # its name was not found yet
            return None
        if count == 1:
            only = endpoints[0]
            if only in tried or not only.can_serve(model, version):
                return None
            if not only.has_ejections or desperate:
                return only
            return None if only.standing(model, version, self._clock(), scopes) is Standing.OUT else only
        key = (model, version)
        if count > MOST_COMPARED:
            found = self._best(self._two(key, tried), key, tried, scopes, desperate)
            if found is not None:
                return found
        turn = int(random.random() * count)  # noqa: S311  (spread, not secrecy)
        return self._best((*endpoints[turn:], *endpoints[:turn]), key, tried, scopes, desperate)

    def _two(self, key: ModelKey, tried: Container[Endpoint]) -> Sequence[Endpoint]:
        """Two ready endpoints by chance; none if not even several draws find them, as when most are gone."""
        endpoints, first = self.endpoints, None
        count = len(endpoints)
        for _ in range(_DRAWS):
            drawn = endpoints[int(random.random() * count)]  # noqa: S311
            if drawn.state is not _READY or drawn is first or drawn in tried or not drawn.models.get(key, True):
                continue
            if first is not None:
                return (first, drawn)
            first = drawn
        return ()

    def _best(
        self,
        order: Sequence[Endpoint],
        key: ModelKey,
        tried: Container[Endpoint],
        scopes: Scopes,
        desperate: bool,
    ) -> Endpoint | None:
        """The best one; of equals the first, so that their order, which is drawn, decides.

        One that is warming up is passed over, the more often the less it is warm, if there is one that is.
        """
        best: Endpoint | None = None
        cold: Endpoint | None = None
        for endpoint in order:
            if endpoint.state is _DOWN or endpoint in tried or not endpoint.models.get(key, True):
                continue
            if endpoint.is_limited:
                now = self._clock()
                standing = Standing.IN if desperate else endpoint.standing(key[0], key[1], now, scopes)
                if standing is Standing.TRIAL:
                    return endpoint
                if standing is Standing.OUT:
                    continue
                endpoint.settle(now)
                if endpoint.warmth < 1.0 and random.random() >= endpoint.warmth:  # noqa: S311
                    if cold is None or endpoint.is_better(cold, key):
                        cold = endpoint
                    continue
            if best is None or endpoint.is_better(best, key):
                best = endpoint
        if cold is None:
            return best
        if best is None or best.warmth < 1.0 or best.state is not cold.state:
            return cold if best is None or cold.is_better(best, key) else best
        return best

    def failed(self, endpoint: Endpoint, failed: FailedCall, others: Elsewhere = NOWHERE) -> float:
        """Count a call that went wrong. Answers for how many seconds that ejects the endpoint, if it does.

        others: how calls went where they may go without this pool; then all of it may be ejected.
        """
        if not endpoint.counts_against(failed):
            return 0.0
        model, version, now, scopes = failed.model, failed.version, failed.at, failed.scopes
        record = endpoint.record(model, version)
        peers: Sequence[Counts] = ()
        if self._may_eject(endpoint, model, version, scopes):
            peers = [
                each.record(model, version).counts(now)
                for each in self.endpoints
                if each is not endpoint and each.can_serve(model, version) and not each.is_ejected(model, version)
            ]
        beside = Elsewhere(peers, self.ever(model, version, endpoint))
        whose = record.condemned_by(scopes, record.standards(beside, others), now)
        return 0.0 if whose is None else endpoint.eject(model, version, now, whose, scopes)

    def ever(self, model: str, version: str, but: Endpoint | None = None) -> Counts:
        """All calls of its endpoints, but for one of these, and those of them that failed."""
        calls = failed = 0
        for each in self.endpoints:
            record = each.records.get((model, version))
            if record is not None and each is not but:
                calls += record.ever
                failed += record.ever_failed
        return calls, failed

    def _may_eject(self, endpoint: Endpoint, model: str, version: str, scopes: Scopes) -> bool:
        """Would at most half of the pool be out for any of these?"""
        out = sum(each.is_ejected(model, version, scopes) for each in self.endpoints)
        return endpoint.is_ejected(model, version, scopes) or 2 * (out + 1) <= len(self.endpoints)

    def counts(self, model: str, version: str, now: float) -> list[Counts]:
        """How calls went lately on those endpoints that had any and can serve."""
        found = []
        for each in self.endpoints:
            record = each.records.get((model, version))
            if record is not None and not record.is_ejected() and each.can_serve(model, version):
                counts = record.counts(now)
                if counts[0]:
                    found.append(counts)
        return found

    def fastest(self, model: str, version: str) -> float:
        """Seconds that the model takes at the endpoint that is fastest at it; 0.0 if no answer has told."""
        records = [endpoint.records.get((model, version)) for endpoint in self.endpoints]
        known = [record.latency.seconds for record in records if record is not None and record.latency.seconds > 0.0]
        return min(known, default=0.0)

    def maybe_find(self, address: str) -> Endpoint | None:
        return next((e for e in self.endpoints if e.address == address), None)


class Ranked(Pool):
    """The first endpoint in the given order, of those in the best state: for who must find the same one again."""

    def maybe_pick(
        self,
        model: str,
        version: str,
        tried: Container[Endpoint] = (),
        scopes: Scopes = NOBODY_KNOWN,
        *,
        desperate: bool = False,
    ) -> Endpoint | None:
        able = [e for e in self.endpoints if e not in tried and e.can_serve(model, version)]
        able = [e for e in able if e.state is not State.SUSPECT] or able
        able = [e for e in able if not e.is_ejected(model, version)] or able
        return able[0] if able else None


class SubsetPool(Pool):
    """The endpoints that this gateway keeps in touch with, of an upstream that has more; see `subset`."""

    def __init__(
        self,
        name: str,
        endpoints: Sequence[Endpoint],
        addresses: Sequence[str],
        maybe_reach: Callable[[str], Endpoint | None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """addresses: all of the upstream. maybe_reach: the endpoint of one of them; None if there can't be one."""
        super().__init__(name, endpoints, clock=clock)
        self._addresses = tuple(addresses)
        self._maybe_reach = maybe_reach

    @property
    def addresses(self) -> Sequence[str]:
        return self._addresses

    def in_order(self, addresses: Sequence[str]) -> Pool:
        return Reached(self.name, addresses[:MOST_REACHED], self._maybe_reach)


class Reached(Pool):
    """The first endpoint in the given order that is not known to be unable, connected when it is its turn.

    Gateways know the health of different endpoints, and have to find the same one. So no endpoint is passed over that
    might have the call: doubts about it, which others need not share, do not count.
    """

    def __init__(self, name: str, order: Sequence[str], maybe_reach: Callable[[str], Endpoint | None]) -> None:
        super().__init__(name, ())
        self._order = order
        self._maybe_reach = maybe_reach

    def maybe_pick(
        self,
        model: str,
        version: str,
        tried: Container[Endpoint] = (),
        scopes: Scopes = NOBODY_KNOWN,
        *,
        desperate: bool = False,
    ) -> Endpoint | None:
        for address in self._order:
            endpoint = self._maybe_reach(address)
            if endpoint is not None and endpoint not in tried and endpoint.can_serve(model, version):
                return endpoint
        return None
