"""The documentation as a site: `make docs` makes dist/site of the pages as they are in the repository.

A page is Markdown that GitHub shows too, so all that a site needs beyond that is added here while it is read: the tree
of pages, targets for explicit anchors, and links to folders. Every link is checked; a wrong one ends the build.

source: myst-parser.readthedocs.io, "Cross-references"; sphinx-doc.org, "Sphinx core events", source-read.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

project = "Inference gateway"
release = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
version = os.environ.get("DOCS_VERSION", "")  # set by versions.py
html_title = f"{project} {version or release}"
html_theme = "furo"
extensions = ["myst_parser", "sphinx.ext.githubpages"]
html_copy_source = False
templates_path = ["templates"]
html_context = {"version_name": version}
html_sidebars = {
    "**": [
        *("sidebar/brand.html", "sidebar/search.html", "sidebar/scroll-start.html"),
        *("versions.html", "sidebar/navigation.html", "sidebar/scroll-end.html"),
    ]
}
root_doc = "README"
include_patterns = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("docs/*.md", "docs/steps/*.md", "docs/tasks/*.md"),
    *(
        "deploy/*/README.md",
        "perf/README.md",
        "perf/results/*.md",
        "model_repository/README.md",
        "model_repository/*/README.md",
    ),
]
myst_heading_anchors = 4  # as GitHub makes them
suppress_warnings = [
    "misc.highlighting_failure",  # of languages that Pygments does not know, such as PromQL
    "myst.header",  # a page may begin its sections at any level
    "toc.not_included",  # pages of single models are linked, and in no tree
]

TREE = {
    "Begin": ("docs/first-ab", "docs/clients", "docs/steps/README"),
    "Tasks": (
        *("docs/tasks/reading", "docs/tasks/translate", "docs/tasks/recommend", "docs/tasks/voice"),
        *("docs/edge", "model_repository/README"),
    ),
    "Configure": (
        *("docs/configuration", "docs/access", "docs/quotas", "docs/merging", "docs/sharing", "docs/shared-memory"),
        *("docs/shadowing", "docs/experiments", "docs/rollouts"),
    ),
    "Operate": (
        *("docs/operations", "docs/metrics", "docs/errors", "docs/overload", "docs/scaling", "docs/limits"),
        *("docs/security", "deploy/systemd/README", "deploy/docker/README", "deploy/kubernetes/README"),
        "deploy/helm/README",
    ),
    "Understand": (
        *("docs/architecture", "docs/reliability", "docs/reliability-lifecycle", "docs/compiling", "perf/README"),
        *("CONTRIBUTING", "CHANGELOG", "SECURITY"),
    ),
}
"""Pages by the heading that they stand under at the side."""

_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
_ANCHOR = re.compile(r'^<a id="([^"]+)"></a>$', re.MULTILINE)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", complete)
    app.connect("build-finished", name_the_first_page)


def complete(_: Any, page: str, source: list[str]) -> None:
    """Add to a page what the site needs. source: its text, to be replaced."""
    folder = (ROOT / page).parent
    text = _LINK.sub(lambda link: linked(link, folder), _ANCHOR.sub(r"(\1)=", source[0]))
    source[0] = text + (trees() if page == root_doc else "")


def name_the_first_page(app: Any, error: Exception | None) -> None:
    """Servers of files look for a folder's index.html."""
    if error is None and app.builder.name == "html":
        shutil.copyfile(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def linked(link: re.Match[str], folder: Path) -> str:
    """A link as the site can follow it: a folder becomes its page, or its name alone; an explicit anchor a target."""
    text, target = link.groups()
    if re.match(r"[a-z]+:", target):
        return link[0]
    path, _, anchor = target.partition("#")
    file = (folder / path).resolve() if path else None
    if file is not None and file.is_dir():
        inside = os.path.relpath(file / "README.md", folder)
        return f"[{text}]({inside})" if (file / "README.md").is_file() else text
    if anchor and is_explicit(anchor):
        return f"[{text}](#{anchor})"
    return link[0]


def is_explicit(anchor: str) -> bool:
    return f'<a id="{anchor}"></a>' in (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def tree() -> dict[str, tuple[str, ...]]:
    """TREE, and the pages that it does not name."""
    named = {page for pages in TREE.values() for page in pages}
    there = sorted(str(page.relative_to(ROOT).with_suffix("")) for page in (ROOT / "docs").rglob("*.md"))
    others = tuple(page for page in there if page not in named)
    return {**TREE, "Others": others} if others else TREE


def trees() -> str:
    return "".join(
        f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(f"/{page}" for page in pages) + "\n```\n"
        for caption, pages in tree().items()
    )
