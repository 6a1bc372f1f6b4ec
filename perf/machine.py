"""What the run ran on."""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from gateway.compiled import is_compiled


def describe() -> dict[str, str]:
    """Cores, CPU, memory, kernel, and the versions that matter."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ("uvloop", "grpcio", "tritonclient")
    return {
        "CPU": f"{len(os.sched_getaffinity(0))} cores, {_cpu_model()}",
        "memory": f"{memory / (1 << 30):.0f} GiB",
        "kernel": platform.release(),
        "Python": python(),
        "packages": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def python() -> str:
    """Which Python runs the gateway, and how it was built: without profiles (PGO) a call takes a quarter more CPU.

    Debian's is built with them, though it keeps no record of that.
    """
    arguments = sysconfig.get_config_var("CONFIG_ARGS") or ""
    flags = (sysconfig.get_config_var("CFLAGS") or "").split()
    level = [flag for flag in flags if flag.startswith("-O")][-1:]
    asked = [flag for flag in ("--enable-optimizations", "--with-lto") if flag in arguments]
    built = " ".join([*level, *asked]) if asked else " ".join([*level, "with no word of PGO or LTO"])
    path = "compiled" if is_compiled() else "interpreted"
    program = os.path.realpath(sys.executable)
    return f"{platform.python_version()} ({program}; {platform.python_compiler()}, {built}); hot path {path}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
