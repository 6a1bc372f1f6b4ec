"""hedging: a second attempt elsewhere for a call that takes longer than most. `latency` is pure; `hedge` acts."""

from gateway.forwarding.hedging.hedges import HedgedModel, Hedges, HedgeSettings
from gateway.forwarding.hedging.latency import Latency

__all__ = ["HedgeSettings", "HedgedModel", "Hedges", "Latency"]
