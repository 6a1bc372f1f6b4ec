"""I/O: where exposures and outcomes of experiments are kept, and how they get there without holding up a call.

Knows `experiments` (values) and SQLAlchemy Core, and nothing of calls or of the config. `Store` is imported from
`database` by those who need one, since most gateways have no experiments, and SQLAlchemy takes memory.
"""

from gateway.store.recorder import Recorder, StoreSettings, StoreState
from gateway.store.rows import (
    ExposureRow,
    MeasuredRow,
    OutcomeRow,
    RequestRow,
    Stop,
    StoreAway,
    StoreFailed,
    StoreReadOnly,
)

__all__ = [
    "ExposureRow",
    "MeasuredRow",
    "OutcomeRow",
    "Recorder",
    "RequestRow",
    "Stop",
    "StoreAway",
    "StoreFailed",
    "StoreReadOnly",
    "StoreSettings",
    "StoreState",
]
