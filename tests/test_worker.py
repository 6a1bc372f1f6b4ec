"""What a worker's process sets for itself."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import os, resource
from gateway.worker import keep_freed_memory
keep_freed_memory(os.environ)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        buffers = [bytearray(b"x") * 600_000 for _ in range(6)]
        del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(**environment: str) -> int:
    """Page faults of 20 rounds of 3.6 MB, 879 pages."""
    told = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return int(told.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_memory_of_one_call_is_there_for_the_next_unless_the_environment_says_how() -> None:
    assert faults() < 100
    assert faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072") > 5000
