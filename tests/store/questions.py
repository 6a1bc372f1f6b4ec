"""Questions for the process that analyses, whose answers are known."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Sleeps:
    """Takes so many seconds, and answers them."""

    seconds: float

    def answered(self) -> float:
        time.sleep(self.seconds)
        return self.seconds

    def failed(self, trouble: str) -> float:
        raise AssertionError(trouble)
