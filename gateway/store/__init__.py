"""I/O: where exposures and outcomes of experiments are kept, and how they get there without holding up a call.

Knows `experiments` (values) and SQLAlchemy Core, and nothing of calls or of the config.
"""

from gateway.store.database import Stop, Store, StoreAway, StoreFailed
from gateway.store.recorder import Recorder, StoreSettings, StoreState
from gateway.store.rows import ExposureRow, OutcomeRow, RequestRow

__all__ = [
    "ExposureRow",
    "OutcomeRow",
    "Recorder",
    "RequestRow",
    "Stop",
    "Store",
    "StoreAway",
    "StoreFailed",
    "StoreSettings",
    "StoreState",
]
