"""The site in all its versions: `make docs-versions` makes dist/versions of each release and of the pages as they are.

Each version has a folder, made of its own pages by its own conf.py; any server of files can serve them all. A tag is
never moved, so what was made of one is not made again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEVELOPMENT = "development"
FIRST = '<!doctype html><meta http-equiv="refresh" content="0; url={0}/index.html"><a href="{0}/index.html">{0}</a>\n'


def main(sphinx_build: Sequence[str], checkout: Path, out: Path) -> None:
    """Make what is not there yet.

    sphinx_build: the command.
    out:          the folder of all versions.
    """
    out.mkdir(parents=True, exist_ok=True)
    releases = releases_of(checkout)
    for tag in releases:
        if not (out / tag / "index.html").exists():
            with tempfile.TemporaryDirectory() as pages:
                archive = subprocess.run(["git", "archive", tag], cwd=checkout, check=True, stdout=subprocess.PIPE)
                subprocess.run(["tar", "-x", "-C", pages], input=archive.stdout, check=True)
                build(sphinx_build, Path(pages), out / tag)
    build([*sphinx_build, "-W", "--keep-going"], checkout, out / DEVELOPMENT)
    versions = {version: pages_of(out / version) for version in (DEVELOPMENT, *releases)}
    (out / "versions.js").write_text(f"const VERSIONS = {json.dumps(versions)};\n", encoding="utf-8")
    (out / "index.html").write_text(FIRST.format([*releases, DEVELOPMENT][0]), encoding="utf-8")


def releases_of(checkout: Path) -> list[str]:
    """Tags whose pages know of versions, the newest first."""
    listing = ["git", "tag", "--list", "v[0-9]*", "--sort=-version:refname"]
    tags = subprocess.run(listing, cwd=checkout, check=True, capture_output=True, text=True).stdout.split()
    return [tag for tag in tags if has(checkout, tag, "docs/site/versions.py")]


def has(checkout: Path, tag: str, file: str) -> bool:
    looked = subprocess.run(["git", "cat-file", "-e", f"{tag}:{file}"], cwd=checkout, check=False, capture_output=True)
    return looked.returncode == 0


def build(sphinx_build: Sequence[str], pages: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as read:
        command = [*sphinx_build, *("-q", "-b", "html", "-c"), pages / "docs" / "site", "-d", read, pages, out]
        subprocess.run(command, env={**os.environ, "DOCS_VERSION": out.name}, check=True)


def pages_of(folder: Path) -> list[str]:
    return sorted(str(page.relative_to(folder).with_suffix("")) for page in folder.rglob("*.html"))


if __name__ == "__main__":
    main(sys.argv[1:], ROOT, ROOT / "dist" / "versions")
