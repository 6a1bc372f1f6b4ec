"""routing (pure): a table of routes in, a request's facts in, a plan out. No I/O, no clock, no chance of its own."""

from gateway.routing.arms import Arms
from gateway.routing.match import AnyOf, Condition, Exact, Key, Prefix, Present, Regex, Rule, as_text
from gateway.routing.planning import Explanation, choose, drawn, explain, plan
from gateway.routing.rendezvous import endpoint_order
from gateway.routing.rolling import Rolling
from gateway.routing.split import Split, Sticky
from gateway.routing.table import FORBID, Direct, Route, Routes

__all__ = [
    "FORBID",
    "AnyOf",
    "Arms",
    "Condition",
    "Direct",
    "Exact",
    "Explanation",
    "Key",
    "Prefix",
    "Present",
    "Regex",
    "Rolling",
    "Route",
    "Routes",
    "Rule",
    "Split",
    "Sticky",
    "as_text",
    "choose",
    "drawn",
    "endpoint_order",
    "explain",
    "plan",
]
