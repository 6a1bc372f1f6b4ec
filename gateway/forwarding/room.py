"""What the requests of pipelines hold in this process: their messages and tensors, from arrival to answer."""

from __future__ import annotations

from gateway.errors import Overloaded

MIB = 1 << 20


class Room:
    """Counts bytes. A request gets in while there is room, or when it is alone; one that is in may grow."""

    def __init__(self, most: int | None = None) -> None:
        """most: bytes; None is no limit."""
        self.most = most
        self.held = 0

    def enter(self, size: int) -> None:
        """Count a request's message, which must `leave`.

        :raises Overloaded: if there is no room for it beside the others.
        """
        if self.most is not None and self.held and self.held + size > self.most:
            raise Overloaded(
                f"the requests of pipelines hold {self.held / MIB:.0f} MiB, and this one takes {size / MIB:.1f} more; "
                f"{self.most / MIB:.0f} are there for them (half of pipelines.memory)"
            )
        self.held += size

    def enter_more(self, size: int, has: int) -> None:
        """Count what a request takes that is in already, with `has`; unlike `grow`, before it is there.

        :raises Overloaded: as `enter`.
        """
        self.held -= has
        try:
            self.enter(has + size)
        except Overloaded:
            self.held += has
            raise

    def grow(self, size: int) -> None:
        """Count what a step or a model has made of it, which must be left as well."""
        self.held += size

    def leave(self, size: int) -> None:
        self.held -= size
