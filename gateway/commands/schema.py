"""I/O: `schema` and `protos`: the config and the services, for editors and for code generators."""

from __future__ import annotations

import argparse
from pathlib import Path

from gateway.commands.arguments import Commands, add_command, say


def add(commands: Commands) -> None:
    schema = add_command(commands, "schema", _schema, "print the JSON Schema of the config file, for editors")
    protos = add_command(
        commands, "protos", _protos, "write a descriptor set of all services, for grpcurl and code generators"
    )
    protos.add_argument("file", metavar="FILE", type=Path, help="such as gateway.binpb")
    schema.add_argument("--markdown", action="store_true", help="print docs/configuration.md instead")


def _schema(arguments: argparse.Namespace) -> int:
    from gateway.config import json_schema_text, reference  # noqa: PLC0415

    say((reference() if arguments.markdown else json_schema_text()).rstrip("\n"))
    return 0


def _protos(arguments: argparse.Namespace) -> int:
    from gateway.api.descriptors import descriptor_set  # noqa: PLC0415

    arguments.file.write_bytes(descriptor_set())
    return 0
