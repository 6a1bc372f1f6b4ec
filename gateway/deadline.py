"""Values: an absolute instant by which a call must end. Passed down whole and asked for what remains."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """`at` is on the clock of `time.monotonic()`, in seconds."""

    at: float

    @classmethod
    def after(cls, seconds: float, now: float) -> Deadline:
        return cls(now + seconds)

    def remaining(self, now: float) -> float:
        """Seconds left; zero or less when it has passed."""
        return self.at - now
