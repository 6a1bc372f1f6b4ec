"""Build hook: makes gateway/v1/ from protos/ with grpcio-tools, so that nothing generated is committed."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GenerateStubs(BuildHookInterface):
    """Runs for wheels and for editable installs alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate(Path(self.root))


def generate(root: Path) -> None:
    """Write `gateway/v1/*_pb2*.py[i]` for every file in `protos/gateway/v1/`.

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
        *map(str, protos),
    ]
    out.mkdir(parents=True)
    (out / "__init__.py").write_text('"""Generated from protos/gateway/v1 at build time."""\n')
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc refused a file in protos/; see its message above")


if __name__ == "__main__":
    generate(Path(__file__).parent)
