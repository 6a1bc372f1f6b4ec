"""A host that cannot run NVIDIA's build is told so, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.triton import UnsuitableHost, host, install


@pytest.mark.parametrize(
    ("system", "machine", "libc", "reason"),
    [
        ("Darwin", "arm64", ("", ""), "this is Darwin on arm64"),
        ("Linux", "aarch64", ("glibc", "2.36"), "this is Linux on aarch64"),
        ("Linux", "x86_64", ("glibc", "2.31"), "needs glibc 2.35, this system has glibc 2.31"),
        ("Linux", "x86_64", ("", ""), "needs glibc 2.35, this system has another C library"),
    ],
)
def test_unsuitable_system(system: str, machine: str, libc: tuple[str, str], reason: str) -> None:
    with pytest.raises(UnsuitableHost, match=reason):
        host._require_system(system, machine, libc)


@pytest.mark.parametrize("libc", [("glibc", "2.35"), ("glibc", "2.41"), ("glibc", "3.0")])
def test_suitable_system(libc: tuple[str, str]) -> None:
    host._require_system("Linux", "x86_64", libc)


@pytest.mark.parametrize(("implementation", "minor"), [("cpython", 14), ("pypy", 11)])
def test_unsuitable_python(implementation: str, minor: int) -> None:
    with pytest.raises(UnsuitableHost, match=r"CPython 3\.10 to 3\.\d+"):
        host._require_python(implementation, minor)


@pytest.mark.integration
def test_everything_is_made_once() -> None:
    first = install()
    made = {path: path.stat().st_mtime_ns for path in (first.backends, first.python, first.tritonserver)}
    assert install() == first
    assert {path: path.stat().st_mtime_ns for path in made} == made


@pytest.mark.integration
def test_a_missing_python_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = host.fetch(host.TRITON) / "pytriton/tritonserver/python_backend_stubs/3.11/triton_python_backend_stub"
    monkeypatch.setattr(host, "_loads", lambda *_: False)
    monkeypatch.setattr(host, "_download_library", lambda *_: False)
    with pytest.raises(UnsuitableHost, match=r"sudo apt-get install libpython3\."):
        host._python_library(stub, tmp_path, tmp_path)
