"""Every page has its place in the site that `make docs` makes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def conf():
    spec = importlib.util.spec_from_file_location("site_conf", ROOT / "docs" / "site" / "conf.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_tree_once(conf) -> None:
    pages = [page for group in conf.tree().values() for page in group]
    there = {str(page.relative_to(ROOT).with_suffix("")) for page in (ROOT / "docs").rglob("*.md")}
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
