"""Admin: the HTTP side, for people, Prometheus and Kubernetes."""

from gateway.admin.aggregate import merged_config, merged_state
from gateway.admin.config_history import ConfigHistory
from gateway.admin.connections import Connections
from gateway.admin.guard import AdminAccess
from gateway.admin.server import ASKED_BY, GUARD, Admin, CannotListen, StateSource

__all__ = [
    "ASKED_BY",
    "GUARD",
    "Admin",
    "AdminAccess",
    "CannotListen",
    "ConfigHistory",
    "Connections",
    "StateSource",
    "merged_config",
    "merged_state",
]
