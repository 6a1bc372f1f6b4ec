"""Every page has its place in the site that `make docs` makes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def of_the_site(name: str):
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def conf():
    return of_the_site("conf")


def test_every_page_is_in_the_tree_once(conf) -> None:
    pages = [page for group in conf.tree().values() for page in group]
    files = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("deploy/*/README.md")]
    there = {str(page.relative_to(ROOT).with_suffix("")) for page in files}
    assert len(set(pages)) == len(pages)
    assert there <= set(pages)
    assert all((ROOT / f"{page}.md").is_file() for page in pages)


def test_links_that_a_site_has_no_page_for_are_made_followable(conf) -> None:
    source = [
        "[all](tasks) [code](../gateway) [gone](operations.md#gateways-gone) [one](limits.md#tables) [x](https://x.y)"
    ]
    conf.complete(None, "docs/access", source)
    assert source == ["all code [gone](#gateways-gone) [one](limits.md#tables) [x](https://x.y)"]
    source = ['<a id="gateways-gone"></a>\n## gateways-gone: …']
    conf.complete(None, "docs/operations", source)
    assert source == ["(gateways-gone)=\n## gateways-gone: …"]


SPHINX = """\
import os, pathlib, sys
root, out = map(pathlib.Path, sys.argv[-2:])
out.mkdir(parents=True, exist_ok=True)
for page in [*root.glob("*.md"), root / "index.md"]:
    text = page.read_text() if page.exists() else "first"
    (out / page.name).with_suffix(".html").write_text(f"{os.environ['DOCS_VERSION']}: {text}")
"""
"""Stands in for sphinx-build: pages say of which version they are."""


def test_each_release_keeps_its_pages_and_every_version_knows_of_all_others(tmp_path: Path) -> None:
    checkout, out = tmp_path / "checkout", tmp_path / "versions"
    (checkout / "docs" / "site").mkdir(parents=True)

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "init.defaultBranch=main")
        subprocess.run(["git", *who, *arguments], cwd=checkout, check=True, capture_output=True)

    def release(tag: str, page: str, text: str) -> None:
        (checkout / page).write_text(text)
        git("add", "-A")
        git("commit", "-m", tag)
        git("tag", tag)

    git("init")
    release("v0.0.9", "README.md", "before there was a site")
    (checkout / "docs" / "site" / "versions.py").touch()
    release("v0.9.0", "README.md", "old")
    release("v0.10.0", "guide.md", "new in 0.10")
    (checkout / "README.md").write_text("not released")

    versions = of_the_site("versions")
    versions.main([sys.executable, "-c", SPHINX], checkout, out)
    read = {page: (out / page).read_text() for page in ("v0.9.0/README.html", "v0.10.0/guide.html")}
    assert read == {"v0.9.0/README.html": "v0.9.0: old", "v0.10.0/guide.html": "v0.10.0: new in 0.10"}
    assert (out / "development/README.html").read_text() == "development: not released"
    listed = json.loads((out / "versions.js").read_text().removeprefix("const VERSIONS = ").rstrip(";\n"))
    assert list(listed) == ["development", "v0.10.0", "v0.9.0"]
    assert listed["v0.9.0"] == ["README", "index"]
    assert listed["v0.10.0"] == ["README", "guide", "index"]
    assert "url=v0.10.0/index.html" in (out / "index.html").read_text()

    (out / "v0.9.0/README.html").write_text("kept")
    versions.main([sys.executable, "-c", SPHINX], checkout, out)
    assert (out / "v0.9.0/README.html").read_text() == "kept"
