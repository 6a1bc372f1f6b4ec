"""I/O: a process of its own that answers questions about what the store has.

The statistics of many units take seconds of Python, for which no call may wait. The process is started by the worker
that decides, when it first needs it, and ends with it, since the pipe between them does.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Final, Generic, Protocol, TypeVar

_log = logging.getLogger(__name__)

_NICE: Final = 10  # calls come first
_SHARE: Final = 0.25  # of the time that it works, at most
_LEAST_SECONDS: Final = 1.0  # between two questions
_LAST_SECONDS: Final = 2.0  # for the process to end
_MOST_SECONDS: Final = 600.0  # for an answer

# The same modules as here, whatever is in the working directory.
_START: Final = (
    "import sys; number = int(sys.argv[1]); sys.path[:] = sys.argv[2:]; "
    "from gateway.experimentation.analysis_process import serve; serve(number)"
)


Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)


class Question(Protocol[Answer_co]):
    """What the process is asked, a value that can be pickled, as its answer."""

    def answered(self) -> Answer_co:
        """The answer. Called in the process; whatever it raises is trouble."""

    def failed(self, trouble: str) -> Answer_co:
        """The answer that says why there is none."""


def serve(number: int) -> None:
    """Answer questions until the pipe ends. number: its descriptor."""
    os.nice(_NICE)
    with Connection(number) as pipe, suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            question = pipe.recv()
            try:
                answer = question.answered()
            except ImportError as error:
                answer = question.failed(f"needs {error.name}: pip install 'inference-gateway[experiments]'")
            except Exception as error:  # told, in place of a traceback that nobody reads
                answer = question.failed(f"{type(error).__name__}: {error}"[:300])
            pipe.send(answer)


class AnalysisProcess(Generic[Answer]):
    """The other end of that process. Of one thread; nothing here waits for an answer."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._asked = 0.0  # on the monotonic clock; 0: no question is open
        self._rests_until = 0.0

    @property
    def is_free(self) -> bool:
        """May another question be asked now?"""
        return not self._asked and time.monotonic() >= self._rests_until

    @property
    def is_asked(self) -> bool:
        """Is an answer to come? If none comes any more, the process has ended."""
        return bool(self._asked)

    def ask(self, question: Question[Answer]) -> None:
        if self._pipe is None:
            self._pipe = self._start()
        try:
            self._pipe.send(question)
            self._asked = time.monotonic()
        except OSError as error:
            self._lost(error)

    def maybe_answer(self) -> Answer | None:
        if self._pipe is None or not self._asked:
            return None
        try:
            if not self._pipe.poll():
                if time.monotonic() - self._asked > _MOST_SECONDS:
                    raise OSError("no answer")
                return None
            answer: Answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._lost(error)
            return None
        took = time.monotonic() - self._asked
        self._asked = 0.0
        self._rests_until = time.monotonic() + max(_LEAST_SECONDS - took, took * (1.0 / _SHARE - 1.0))
        return answer

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  (our own module)
                [sys.executable, "-c", _START, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the gateway
            )
        return Connection(ours.detach())

    def _lost(self, error: BaseException) -> None:
        _log.warning("the process that analyses experiments has ended: %s", type(error).__name__)
        self.close()
        self._rests_until = time.monotonic() + 10 * _LEAST_SECONDS

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_LAST_SECONDS)
        self._pipe = self._process = None
        self._asked = 0.0
