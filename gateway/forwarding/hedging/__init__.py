"""hedging: a second attempt elsewhere for a call that takes longer than most. `latency` is pure; `call` acts."""

from gateway.forwarding.hedging.hedges import HedgedModel, Hedges, HedgeSettings, Hedging
from gateway.forwarding.hedging.latency import Latency

__all__ = ["HedgeSettings", "HedgedModel", "Hedges", "Hedging", "Latency"]
