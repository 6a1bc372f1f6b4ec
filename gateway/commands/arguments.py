"""Values: how commands are declared, and the types of their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

from gateway.errors import Misused

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class WrongLine(Misused):
    """Arguments that do not go together; the text says which."""


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int] | None, text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run, parser=parser)
    return parser


def pair(given: str) -> tuple[str, str]:
    key, equals, value = given.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"'{given}' is not of the form KEY=VALUE")
    return key, value


def draw(given: str) -> float:
    draw = float(given)
    if not 0 <= draw < 1:
        raise argparse.ArgumentTypeError(f"{given} is not in [0, 1)")
    return draw


def at_least_one(given: str) -> int:
    number = int(given)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{given} is not 1 or more")
    return number


def whole(given: str) -> int:
    number = int(given)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{given} is not 0 or more")
    return number


def shape(given: str) -> tuple[str, list[int]]:
    name, _, sizes = given.rpartition(":")
    if not name or not all(size.isdigit() and int(size) for size in sizes.split(",")):
        raise argparse.ArgumentTypeError(f"'{given}' is not of the form INPUT:1,3,224,224")
    return name, [int(size) for size in sizes.split(",")]


def address(given: str) -> str:
    from gateway.config.units import split_address  # noqa: PLC0415

    try:
        split_address(given)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{given}' is not of the form HOST:PORT") from None
    return given


def port(given: str) -> int:
    port = int(given)
    if not 0 < port < 2**16:
        raise argparse.ArgumentTypeError(f"{given} is not a port; it needs a number from 1 to 65535")
    return port


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201
