"""docs/architecture.md names every room, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
GATEWAY = ROOT / "gateway"
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def rows() -> list[tuple[list[str], str]]:
    """The rooms of each line of the table, and what is said of them."""
    lines = [line.split("|") for line in section("Rooms").splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", line[1]), line[2]) for line in lines]


def test_every_room_is_in_the_table_and_every_room_in_the_table_is_there() -> None:
    named = {room.rstrip("/") for rooms, _ in rows() for room in rooms}
    folders = {path.parent.name for path in GATEWAY.glob("*/__init__.py")} - {"v1"}  # v1 is generated
    modules = {path.stem for path in GATEWAY.glob("*.py")} - {"__init__", "__main__"}
    assert (
        named
        - {
            "experiments/analysis",
            "forwarding/admission",
            "forwarding/batching",
            "forwarding/hedging",
            "forwarding/shadowing",
            "forwarding/sharing",
        }
        == folders | modules
    )


def test_a_room_has_the_modules_that_its_line_tells_of() -> None:
    told = 0
    for rooms, text in rows():
        if len(rooms) == 1 and rooms[0].endswith("/"):
            folder = GATEWAY / rooms[0]
            for name in re.findall(r"`([a-z_0-9]+)`", text):
                is_other_room = (GATEWAY / name).is_dir() or (GATEWAY / f"{name}.py").exists()
                assert is_other_room or (folder / f"{name}.py").exists(), f"{rooms[0]}{name}"
                told += 1
    assert told > 20


def test_one_request_passes_functions_that_are_there() -> None:
    sources = {path.relative_to(GATEWAY).with_suffix(""): path.read_text() for path in GATEWAY.rglob("*.py")}
    everything = "\n".join(sources.values())
    text = section("One request")
    for owner, name in re.findall(r"`([A-Z]\w+)\.(\w+)`", text):
        found = re.search(rf"^class {owner}\b.*?^    (async )?def {name}\(", everything, re.M | re.S)
        assert found, f"{owner}.{name}"
    for room, name in re.findall(r"`([a-z_0-9]+)\.(\w+)`", text):
        module = sources.get(Path(room)) or ""
        assert Path(room, name) in sources or re.search(rf"^def {name}\(", module, re.M), f"{room}.{name}"
    for owner in re.findall(r"`([A-Z]\w+)`", text):
        assert owner == "ModelInferRequest" or re.search(rf"^class {owner}\b", everything, re.M), owner
