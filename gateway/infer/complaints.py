"""What a pipeline's author must hear of, once in a while: a caller's haste must not fill a disk with it."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from typing import Final

_log = logging.getLogger(__name__)

_EVERY_SECONDS: Final = 10.0  # how often the same part of a pipeline is told of
_MOST_CHARACTERS: Final = 3000  # of a stack: the end of it, which says where it was thrown
_MOST_OF_TEXT: Final = 1000  # characters of what was thrown
_MOST_FRAMES: Final = 20
_MOST_OF_ID: Final = 200


class Complaints:
    """Logs failures of the parts of one pipeline, each part's at most every ten seconds."""

    def __init__(self, pipeline: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._pipeline = pipeline
        self._clock = clock
        self._told: dict[str, tuple[float, int]] = {}  # by part: when last, and how many were left out since

    def log(self, part: str, request_id: str, text: str, cause: BaseException | None = None) -> None:
        """part: as the config has it. text: what happened. cause: whose stack is worth showing."""
        now = self._clock()
        last, left_out = self._told.get(part, (float("-inf"), 0))
        if now - last < _EVERY_SECONDS:
            self._told[part] = last, left_out + 1
            return
        self._told[part] = now, 0
        more = f" ({left_out} more since this was logged last)" if left_out else ""
        stack = "\n" + stack_of(cause) if cause is not None else ""
        id = request_id[:_MOST_OF_ID]
        _log.error("pipeline '%s', request %r: %s%s%s", self._pipeline, id, text[:_MOST_OF_TEXT], more, stack)


def stack_of(thrown: BaseException) -> str:
    """The end of an exception's stack and its text; also if its class can't make one."""
    frames = "".join(traceback.format_tb(thrown.__traceback__, limit=-_MOST_FRAMES))
    try:
        text = "".join(traceback.format_exception_only(type(thrown), thrown))
    except BaseException:  # the text is made by a user's code
        text = type(thrown).__name__
    return frames[-_MOST_CHARACTERS:] + text[:_MOST_OF_TEXT].rstrip()
