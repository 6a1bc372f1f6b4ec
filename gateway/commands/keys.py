"""I/O: `keys`: API keys of callers."""

from __future__ import annotations

import argparse
import json

from gateway.commands.arguments import Commands, add_command, say
from gateway.errors import Misused


def add(commands: Commands) -> None:
    keys = add_command(commands, "keys", None, "API keys of callers (docs/access.md)").add_subparsers(
        metavar="ACTION", required=True
    )
    new = add_command(keys, "new", _new, "make a key: print it once, and the line with its hash for the config")
    new.add_argument("name", metavar="NAME", help="the caller whose key it is")


def _new(arguments: argparse.Namespace) -> int:
    import secrets  # noqa: PLC0415

    from gateway.access.api_keys import RANDOM_BYTES, hash_of, new_key  # noqa: PLC0415
    from gateway.access.principal import is_name  # noqa: PLC0415

    if not is_name(arguments.name):
        raise Misused("a caller's name has 1 to 200 printable characters")
    key = new_key(secrets.token_bytes(RANDOM_BYTES))
    digest = hash_of(key).hex()
    say(f"key, for the caller alone; it is shown this once:\n  {key}")
    say(f"below access.api_keys in the config:\n  - {{caller: {json.dumps(arguments.name)}, sha256: {digest}}}")
    if " " not in arguments.name and "#" not in arguments.name:
        say(f"or a line of the file that access.api_key_file names:\n  {arguments.name} {digest}")
    return 0
