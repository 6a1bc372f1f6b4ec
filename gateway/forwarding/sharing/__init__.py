"""sharing: one answer for identical requests, in flight or remembered. `key` and `answer_cache` are pure."""

from gateway.forwarding.sharing.answer_cache import Answer, AnswerCache
from gateway.forwarding.sharing.key import maybe_key
from gateway.forwarding.sharing.shares import HIT, Flight, SharedModel, Shares, ShareSettings

__all__ = ["HIT", "Answer", "AnswerCache", "Flight", "ShareSettings", "SharedModel", "Shares", "maybe_key"]
