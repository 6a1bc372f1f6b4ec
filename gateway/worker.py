"""I/O: one worker process from its start to its drained end: event loop, signals, exit code."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping

from gateway.app import Gateway, Place
from gateway.config import Loaded
from gateway.process.stopping import Stop, StopSignals

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PARENT_DIED = signal.SIGUSR1

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_MALLOC_SETTINGS = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
MIB = 1 << 20

# More than the calls in flight have, so that they do not start a collection: reference counts free what a call made.
_YOUNG_OBJECTS = 20_000

_OTHER_DESCRIPTORS = 512  # for upstreams, the admin plane and files, beside callers' connections


async def serve(loaded: Loaded, load: Callable[[], Loaded], environ: Mapping[str, str], place: Place) -> int:
    """Serve until SIGTERM or SIGINT, then drain. A third signal, or one after the grace, ends the process at once."""
    keep_freed_memory(environ)
    raise_descriptor_limit(loaded.config.server.max_connections)
    stop, orphaned = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    server = loaded.config.server
    signals = StopSignals(server.drain_delay + server.drain)

    def stopped() -> None:
        asked = signals.arrived(loop.time())
        if asked is Stop.NOW:
            _log.warning("another signal to stop: ending now, and calls in flight are cut")
            logging.shutdown()  # waits up to 2 s for the last lines
            os._exit(1)
        if asked is Stop.AGAIN:
            _log.info("a second signal to stop: calls in flight may still end; a third signal cuts them")
        stop.set()

    def parent_died() -> None:
        orphaned.set()
        stop.set()

    gateway = Gateway(loaded, load, environ, place)
    loop.add_signal_handler(_PARENT_DIED, parent_died)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped)
    loop.add_signal_handler(signal.SIGHUP, gateway.reload)
    async with gateway:
        gc.freeze()  # these objects stay, so collections need not spend time on them
        gc.set_threshold(_YOUNG_OBJECTS)
        await stop.wait()
        await gateway.drain(orphaned)  # an orphan does not wait: its supervisor, which reports readiness, has died
    if gateway.left_steps_behind:  # the interpreter's end might wait for ever for threads that their libraries made
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
    return 0


def keep_freed_memory(environ: Mapping[str, str]) -> None:
    """Have malloc keep what was freed, up to 16 MiB a thread, for the next call. glibc only; see mallopt(3).

    By default memory goes back to the kernel from 128 KiB on, so that a picture's pixels and tensor, 0.6 to 1 MB each,
    cost a page fault for every 4 KiB in every call: a fifth of its CPU. Messages from 4 MiB on go back at once.
    The environment variables of malloc take precedence.
    """
    if sys.platform != "linux" or _MALLOC_SETTINGS & environ.keys():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library may lack it
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 4 * MIB)
        mallopt(_M_TRIM_THRESHOLD, 16 * MIB)


def raise_descriptor_limit(connections: int) -> None:
    """Raise the limit of file descriptors for so many connections, up to the hard limit; log a shortage."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    except (OSError, ValueError):  # a sandbox, or a kernel with a lower bound of its own
        raised = soft
    if raised < wanted:
        _log.warning(
            "server.max_connections is %d, but this process may open %d files and sockets: callers beyond that are "
            "refused; raise LimitNOFILE or `ulimit -n`, or lower max_connections",
            connections,
            raised,
        )


def end_with(parent: int) -> None:
    """Have the kernel send a signal when the parent dies, so that no worker is left behind. Linux only.

    The signal is not SIGTERM: every dying thread of the parent sends one, and three SIGTERM end a worker at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _PARENT_DIED)
    if os.getppid() != parent:
        os.kill(os.getpid(), _PARENT_DIED)  # the parent died before the line above
