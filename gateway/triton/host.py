"""The local Triton's files, ready to run on this host.

Knows the pinned wheel and what it needs of the host; nothing of processes or ports. Everything it makes lies in the
artifacts' cache and is made once.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gateway.artifacts import Artifact, cache_folder, fetch
from gateway.errors import CommandFailed

TRITON = Artifact(
    project="nvidia-pytriton",
    version="0.7.0",
    filename="nvidia_pytriton-0.7.0-py3-none-manylinux_2_35_x86_64.whl",
    sha256="21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df",
    size=55_369_373,
    members=("pytriton/tritonserver/*", "nvidia_pytriton.libs/*"),
)
"""tritonserver 2.51 with its Python backend, without the Python package around it."""

_NUMPY_WHEELS = {  # by CPython's minor version: sha256, size
    10: ("ffa75af20b44f8dba823498024771d5ac50620e6915abac414251bd971b4529f", 18_240_889),
    11: ("666dbfb6ec68962c033a450943ded891bed2d54e6755e35e5835d63f4f6931d5", 18_252_005),
    12: ("675d61ffbfa78604709862923189bad94014bef562cc35cf61d3a07bba02a7ed", 17_950_613),
}


def _numpy(minor: int) -> Artifact:
    """The NumPy for models in the local Triton.

    NVIDIA's stubs are compiled for NumPy 1 and take NumPy 2's dtypes apart wrongly: tensors arrive with strides of zero
    and leave empty, without an error. So the stubs get a NumPy of their own; the gateway's stays as it is.
    """
    sha256, size = _NUMPY_WHEELS[minor]
    tag = f"cp3{minor}-cp3{minor}-manylinux_2_17_x86_64.manylinux2014_x86_64"
    return Artifact("numpy", "1.26.4", f"numpy-1.26.4-{tag}.whl", sha256, size, ("numpy/*", "numpy.libs/*"))


_OLDEST_GLIBC = (2, 35)  # of the wheel's platform tag
_BACKENDS = Path(__file__).with_name("backends")


class LocalTritonError(CommandFailed):
    """The local Triton cannot run or has not started; the text says why and what to do."""


class UnsuitableHost(LocalTritonError):
    """NVIDIA's build does not run on this system or with this Python."""


@dataclass(frozen=True, slots=True)
class Installation:
    """The paths of the parts that a server is started from."""

    tritonserver: Path
    backends: Path
    caches: Path
    libraries: tuple[Path, ...]  # for LD_LIBRARY_PATH
    python: Path  # the folder of the `python3` that its stubs become

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that a server needs."""
        libraries = [*map(str, self.libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        path = [str(self.python), os.environ.get("PATH", os.defpath)]
        return {"PATH": os.pathsep.join(path), "LD_LIBRARY_PATH": os.pathsep.join(libraries)}


def install() -> Installation:
    """Fetch and prepare the parts that are missing. Blocks.

    :raises UnsuitableHost: if this system or this Python cannot run it.
    :raises FetchFailed: if the wheel cannot be fetched or stored.
    """
    _require_system(platform.system(), platform.machine(), platform.libc_ver())
    _require_python(sys.implementation.name, sys.version_info.minor)
    home = cache_folder()
    root = fetch(TRITON)
    numpy = fetch(_numpy(sys.version_info.minor))
    server = root / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / f"3.{sys.version_info.minor}" / "triton_python_backend_stub"
    libraries = (root / "nvidia_pytriton.libs", *_python_library(stub, root / "nvidia_pytriton.libs", home))
    return Installation(
        tritonserver=server / "bin" / "tritonserver",
        backends=_backends(server / "backends" / "python", stub, home),
        caches=server / "caches",
        libraries=libraries,
        python=_python(numpy, home),
    )


def has_gpu() -> bool:
    """Does NVIDIA's driver offer a device on this host?"""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _require_system(system: str, machine: str, libc: tuple[str, str]) -> None:
    name, version = libc
    found = f"glibc {version}" if name == "glibc" else "another C library"
    advice = "Run it on Linux x86-64 with glibc 2.35 or newer (Debian 12, Ubuntu 22.04), or use another Triton."
    if (system, machine) != ("Linux", "x86_64"):
        raise UnsuitableHost(f"NVIDIA's Triton wheel is for Linux on x86-64, this is {system} on {machine}. {advice}")
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_GLIBC:
        raise UnsuitableHost(f"NVIDIA's Triton wheel needs glibc 2.35, this system has {found}. {advice}")


def _require_python(implementation: str, minor: int) -> None:
    if implementation != "cpython" or minor not in _NUMPY_WHEELS:
        raise UnsuitableHost(
            f"The local Triton runs models with CPython 3.{min(_NUMPY_WHEELS)} to 3.{max(_NUMPY_WHEELS)}, this is "
            f"{platform.python_implementation()} {platform.python_version()}. Make the virtual environment with one "
            "of those, or use another Triton."
        )


def _backends(python: Path, stub: Path, home: Path) -> Path:
    """The backend directory: NVIDIA's Python backend with the stub for this Python, and our own backends on top.

    Copies, because Triton refuses a backend whose library is a link that leads out of its directory. Its name tells
    its contents, so another version of this package or of Python gets another folder.
    """
    models = sorted(_BACKENDS.glob("*/model.py"))
    key = hashlib.sha256(TRITON.sha256.encode() + stub.parent.name.encode())
    for model in models:
        key.update(model.parent.name.encode() + model.read_bytes())
    target = home / f"backends-{key.hexdigest()[:8]}"
    if not target.is_dir():
        with _appearing(target) as made:
            shutil.copytree(python, made / "python")
            shutil.copy2(stub, made / "python")
            for model in models:
                (made / model.parent.name).mkdir()
                shutil.copy2(model, made / model.parent.name)
    return target


def _python(numpy: Path, home: Path) -> Path:
    """The folder of the `python3` that stubs become: this environment, with their own NumPy in front.

    A virtual environment made by hand, because a stub heeds no PYTHONPATH, but does look for `pyvenv.cfg` beside the
    first `python3` on PATH. source: PEP 405; the `site` module on path configuration files.
    """
    interpreter = Path(sys.executable).resolve()
    paths = [str(numpy), *(f"import site; site.addsitedir({folder!r})" for folder in site.getsitepackages())]
    config = f"home = {interpreter.parent}\ninclude-system-site-packages = false\n"
    key = hashlib.sha256("\n".join([str(interpreter), config, *paths]).encode()).hexdigest()
    target = home / f"python-{key[:8]}"
    if not target.is_dir():
        with _appearing(target) as made:
            (made / "bin").mkdir(parents=True)
            (made / "bin" / "python3").symlink_to(interpreter)
            (made / "pyvenv.cfg").write_text(config)
            packages = made / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
            packages.mkdir(parents=True)
            (packages / "local-triton.pth").write_text("\n".join(paths))
    return target / "bin"


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` in one step. Another process may do the same at the same time."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        made = Path(work, "made")
        made.mkdir()
        yield made
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process has made the folder, with the same contents
                raise


# Python's shared library, which the stub is linked against


def _python_library(stub: Path, libraries: Path, home: Path) -> tuple[Path, ...]:
    """The folder to add for the stub to find `libpython3.x.so.1.0`, or () if the system knows it.

    Debian's and Ubuntu's python3 does not contain it; their package of that name does.
    """
    soname = f"libpython3.{sys.version_info.minor}.so.1.0"
    own = [Path(sysconfig.get_config_var("LIBDIR") or ""), Path(sys.base_prefix) / "lib"]
    fetched = home / f"libpython-3.{sys.version_info.minor}"
    candidates = [folder for folder in (*own, fetched) if (folder / soname).is_file()][:1]
    if _loads(stub, [libraries, *candidates]):
        return tuple(candidates)
    if sys.base_prefix == "/usr" and _download_library(soname, fetched) and _loads(stub, [libraries, fetched]):
        return (fetched,)
    package = f"libpython3.{sys.version_info.minor}"
    raise UnsuitableHost(
        f"Triton's Python backend needs {soname}, which this Python does not bring. Install it with "
        f"`sudo apt-get install {package}` or your system's like, or use a Python built with --enable-shared."
    )


def _loads(stub: Path, folders: list[Path]) -> bool:
    """Whether the dynamic linker finds everything that the stub names. source: ld.so(8), LD_TRACE_LOADED_OBJECTS."""
    env = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_LIBRARY_PATH": os.pathsep.join(map(str, folders))}
    told = subprocess.run([stub], env=env, capture_output=True, text=True, check=False)  # noqa: S603  # pinned by hash
    return told.returncode == 0 and "not found" not in told.stdout


def _download_library(soname: str, target: Path) -> bool:
    """Take the library from the distribution's own package, which needs no root; apt checks its signature."""
    apt, dpkg = shutil.which("apt-get"), shutil.which("dpkg-deb")
    if not apt or not dpkg:
        return False
    name = soname.partition(".so")[0]
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        for package in (name, f"{name}t64"):  # the second one since Ubuntu 24.04
            command = [apt, "download", "-qq", package]
            got = subprocess.run(command, cwd=work, capture_output=True, check=False)  # noqa: S603
            for file in Path(work).glob("*.deb") if got.returncode == 0 else ():
                subprocess.run([dpkg, "-x", file, f"{work}/root"], capture_output=True, check=False)  # noqa: S603
                for library in Path(work, "root").rglob(soname):
                    target.mkdir(exist_ok=True)
                    shutil.copy2(library, target / f".{soname}")
                    (target / f".{soname}").rename(target / soname)
                    return True
    return False
