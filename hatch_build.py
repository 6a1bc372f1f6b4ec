"""Build hook: makes gateway/v1/ from protos/ with grpcio-tools, native modules of the hot path with mypyc, and a
wheel's SBOM with CycloneDX, so that nothing generated is committed.

The hot path is ordinary typed Python. Compiled, a forwarded call takes about two thirds of the CPU; where there is no C
compiler the same files are simply interpreted. A wheel is always compiled where that is possible, a checkout (an
editable install) only with `GATEWAY_COMPILE=1`: whoever edits it wants the edited source to run.
`GATEWAY_NO_EXTENSIONS=1` makes an installed gateway ignore native modules, and it does so by itself where a source is
not the one that they are made of.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import sysconfig
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

DESCRIPTORS = "gateway.binpb"
"""In gateway/v1: what these files declare, with their comments, for `inference-gateway protos`."""

MADE_OF = "gateway/compiled.json"
"""Beside the native modules: what they were compiled from."""

_EPOCH = 1_580_601_600
"""The instant that hatchling gives to a wheel's files if SOURCE_DATE_EPOCH is not set; Unix time."""

_MOST_COMPILERS = 8
"""That run at once; each takes up to 160 MB."""


class BuildHook(BuildHookInterface):
    """Runs for wheels and for editable installs alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        generate(root)
        modules = modules_of(root, self.config["compiled"], self.config["interpreted"])
        if version == "editable" and not os.environ.get("GATEWAY_COMPILE"):
            if not is_current(root, modules):
                remove_native(root)
            return
        compiled = compile_modules(root, modules)
        for made in compiled:
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            if version == "standard":
                build_data["force_include"][str(made)] = str(made.relative_to(root))
        if self.target_name == "wheel" and version == "standard":
            core = self.metadata.core
            file = root / "build" / f"{core.name}.cdx.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(sbom(root, self.metadata, is_compiled=bool(compiled)))
            build_data["sbom_files"].append(str(file.relative_to(root)))


def generate(root: Path) -> None:
    """Write `gateway/v1/*_pb2*.py[i]` for every file in `protos/gateway/v1/`, and one set of their descriptors.

    raises: RuntimeError if protoc refuses a file; protoc has printed where and why.
    """
    from grpc_tools import protoc  # noqa: PLC0415  (a build requirement, absent when the hook is only inspected)

    out = root / "gateway" / "v1"
    shutil.rmtree(out, ignore_errors=True)
    well_known = resources.files("grpc_tools") / "_proto"
    protos = sorted((root / "protos").rglob("*.proto"))
    arguments = [
        "protoc",
        f"-I{root / 'protos'}",
        f"-I{well_known}",
        f"--python_out={root}",
        f"--pyi_out={root}",
        f"--grpc_python_out={root}",
        f"--descriptor_set_out={out / DESCRIPTORS}",
        "--include_imports",
        "--include_source_info",
        *map(str, protos),
    ]
    out.mkdir(parents=True)
    (out / "__init__.py").write_text('"""Generated from protos/gateway/v1 at build time."""\n')
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc refused a file in protos/; see its message above")


def modules_of(root: Path, compiled: Sequence[str], interpreted: Sequence[str]) -> list[str]:
    """The files to compile, by their paths within `root`.

    compiled: files, and folders with all that is in them but `__init__.py`. interpreted: those that are left out.
    """
    found: list[Path] = []
    for name in compiled:
        place = root / name
        found += [place] if place.is_file() else [f for f in place.rglob("*.py") if f.name != "__init__.py"]
    return sorted({file.relative_to(root).as_posix() for file in found} - set(interpreted))


def compile_modules(root: Path, modules: Sequence[str]) -> Sequence[Path]:
    """Make a native module beside each of these files, and one in `root` that holds the code of all; answers them, and
    the file that says what they are made of.

    None are made, and none are left, where there is no C compiler or no Python headers.

    raises: SystemExit if mypyc refuses a file; it has printed where and why.
    """
    if is_current(root, modules):
        return [*_native(root), root / MADE_OF]  # pip calls twice
    remove_native(root)
    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which(compiler) is None or not headers.exists():
        sys.stderr.write(f"no {compiler} or no {headers}: the hot path is not compiled, and slower\n")
        return ()
    from mypyc.build import mypycify  # noqa: PLC0415  (as above)
    from setuptools import Distribution  # noqa: PLC0415

    before = Path.cwd()
    os.chdir(root)  # where mypyc writes C to build/, and takes module names from
    try:
        # Here the packages that are imported need not be installed. `make check` has judged the types with them.
        options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent", "--python-version=3.10"]
        # One C file for each module: a file of all takes three times the CPU, and only one core can work on it.
        made = mypycify([*options, *modules], opt_level="2", debug_level="0", multi_file=True, group_name="gateway")
        command = _build_ext()(Distribution({"name": "gateway", "ext_modules": made}))
        command.inplace, command.force, command.parallel = True, True, min(os.cpu_count() or 1, _MOST_COMPILERS)
        command.ensure_finalized()
        command.run()
    finally:
        os.chdir(before)
    (root / MADE_OF).write_text(json.dumps(digests(root, modules), indent=1) + "\n")
    return [*_native(root), root / MADE_OF]


def _build_ext() -> Any:
    """setuptools' command that builds extensions, which by itself compiles the files of one after another.

    Any: setuptools is a build requirement, as above.
    """
    from setuptools.command.build_ext import build_ext  # noqa: PLC0415

    class BuildOnAllCores(build_ext):  # type: ignore[misc]
        def build_extension(self, ext: Any) -> None:
            # Functions that nothing outside the library sees call each other without the dynamic linker's table.
            hidden = ["-fvisibility=hidden"] if self.compiler.compiler_type == "unix" else []

            def compiled(source: str) -> str:
                (made,) = self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*ext.extra_compile_args, *hidden],
                    depends=ext.depends,
                )
                return str(made)

            with ThreadPoolExecutor(self.parallel) as pool:  # the largest first: no core waits for another at the end
                made = pool.map(compiled, sorted(ext.sources, key=os.path.getsize, reverse=True))
                ext.extra_objects, ext.sources = sorted(made), []
            super().build_extension(ext)

    return BuildOnAllCores


def digests(root: Path, modules: Sequence[str]) -> dict[str, str]:
    """Of the sources, by their paths within the package; `gateway.compiled` compares them when it is imported."""
    return {name.removeprefix("gateway/"): hashlib.sha256((root / name).read_bytes()).hexdigest() for name in modules}


def is_current(root: Path, modules: Sequence[str]) -> bool:
    """Are there native modules for this Python, made of these sources?"""
    made_of = root / MADE_OF
    if not made_of.is_file() or len(_native(root)) != len(modules) + 1:
        return False
    return bool(json.loads(made_of.read_text()) == digests(root, modules))


def remove_native(root: Path) -> None:
    for old in (*root.glob("*__mypyc*.so"), *(root / "gateway").rglob("*.so")):  # those of other Pythons too
        old.unlink()
    (root / MADE_OF).unlink(missing_ok=True)


def _native(root: Path) -> Sequence[Path]:
    """What this Python would import."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return [*root.glob(f"*__mypyc{suffix}"), *(root / "gateway").rglob(f"*{suffix}")]


def sbom(root: Path, project: Any, is_compiled: bool) -> str:
    """A wheel's software bill of materials, for its `.dist-info/sboms` (PEP 770).

    It has the wheel, what it needs to run in the versions that the tests pass with, and what of mypyc is compiled into
    it. All that is installed beside a wheel is told by `make sbom`. Equal sources give equal bytes.

    project: hatchling's ProjectMetadata (Any: it has no public type).
    """
    from cyclonedx.model.bom import Bom  # noqa: PLC0415  (a build requirement, as above)
    from cyclonedx.model.component import Component, ComponentScope, ComponentType  # noqa: PLC0415
    from cyclonedx.model.license import LicenseExpression  # noqa: PLC0415
    from cyclonedx.output.json import JsonV1Dot6  # noqa: PLC0415
    from packageurl import PackageURL  # noqa: PLC0415

    def component(name: str, version: str, **more: Any) -> Component:
        purl = PackageURL("pypi", None, name, version)
        kind = more.pop("type", ComponentType.LIBRARY)
        return Component(name=name, version=version, purl=purl, bom_ref=str(purl), type=kind, **more)

    tested = pinned(root / "constraints.txt")
    names = sorted(re.split(r"[\[<>=!~; ]", each)[0] for each in project.core.dependencies)
    parts = [component(name, tested[name.lower().replace("_", "-")], scope=ComponentScope.REQUIRED) for name in names]
    if is_compiled:
        about = "its runtime library, in C, is part of the native modules"
        parts.append(component("mypy", tested["mypy"], scope=ComponentScope.REQUIRED, description=about))
    licences = [LicenseExpression(project.core.license_expression)]
    whole = component(project.core.name, project.version, type=ComponentType.APPLICATION, licenses=licences)
    text = "\n".join([str(whole.purl), *(str(part.purl) for part in parts)])
    bom = Bom(components=parts, serial_number=uuid.uuid5(uuid.NAMESPACE_URL, text))
    bom.metadata.component = whole
    bom.metadata.timestamp = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", _EPOCH)), timezone.utc)
    bom.register_dependency(whole, parts)
    return str(JsonV1Dot6(bom).output_as_string(indent=1)) + "\n"


def pinned(constraints: Path) -> dict[str, str]:
    """The versions for this Python, by the packages' normalised names."""
    from packaging.requirements import Requirement  # noqa: PLC0415  (hatchling's own requirement)

    found = {}
    for line in constraints.read_text().splitlines():
        if line and not line.startswith("#"):
            each = Requirement(line)
            if each.marker is None or each.marker.evaluate():
                found[each.name.lower().replace("_", "-")] = str(each.specifier).removeprefix("==")
    return found


if __name__ == "__main__":
    generate(Path(__file__).parent)
