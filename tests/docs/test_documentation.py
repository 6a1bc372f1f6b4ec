"""What the pages say is so: snippets load, names exist, links lead somewhere, limits are what the code has."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from gateway.cli import _parser
from gateway.config import load
from gateway.config.experiment_file import load_experiments
from gateway.http2.limits import KiB, Limits, MiB

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for of in ("", "docs/", "docs/*/", "deploy/*/", "perf/", "model_repository/")
    for page in ROOT.glob(f"{of}*.md")
)
OPERATIONS = ROOT / "docs" / "operations.md"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of a page, each with the line that it begins at."""
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL):
        yield text_of(page).count("\n", 0, found.start()) + 2, found[1]


JWKS = """{"keys": [{"kty": "EC", "crv": "P-256", "kid": "1",
  "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}]}"""
"""A public key (RFC 7517, appendix A.1)."""

_BLOCKS = {
    f"{name_of(page)}:{line}": text
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for line, text in blocks(page, "yaml")
}
PLANS = {where: text for where, text in _BLOCKS.items() if re.match(r"(#.*\n)?experiments:", text)}
SNIPPETS = {where: text for where, text in _BLOCKS.items() if where not in PLANS}


@pytest.mark.parametrize("snippet", SNIPPETS.values(), ids=SNIPPETS)
def test_every_config_snippet_loads(snippet: str, tmp_path: Path) -> None:
    """One that shows a section only is completed with an upstream."""
    for name in re.findall(r"[\w-]+\.txt", snippet):
        (tmp_path / name).write_text("cat\ndog\n" if name != "keys.txt" else "# none\n")
    for name in re.findall(r"[\w-]+jwks\.json", snippet):
        (tmp_path / name).write_text(JWKS)
    if not re.search(r"^upstreams:", snippet, re.MULTILINE):
        snippet += "\nupstreams: {cpu: {endpoints: [triton:8001]}}\ndirect: {models: all}\n"
    file = tmp_path / "gateway.yaml"
    file.write_text(snippet, encoding="utf-8")
    load(file, {})


def test_the_config_that_the_readme_explains_is_right_as_it_is_pasted(tmp_path: Path) -> None:
    """With no other file beside it, and with nothing to be warned of."""
    snippet = next(text for _, text in blocks(ROOT / "README.md", "yaml") if "upstreams:" in text)
    (tmp_path / "gateway.yaml").write_text(snippet, encoding="utf-8")
    assert load(tmp_path / "gateway.yaml", {}).warnings == ()


@pytest.mark.parametrize("snippet", PLANS.values(), ids=PLANS)
def test_every_plan_of_an_experiment_loads(snippet: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(snippet, encoding="utf-8")
    assert load_experiments(file)


def test_there_are_snippets_to_load() -> None:
    """So that a change of the pages' form does not switch the test above off."""
    assert {"README.md", "docs/metrics.md", "docs/merging.md", "docs/operations.md"} <= {
        name.partition(":")[0] for name in SNIPPETS
    }


METRIC = re.compile(r"\bgateway_[a-z_]+")
SUFFIXES = re.compile(r"_(bucket|sum|count|created)$")


def test_every_metric_that_is_named_anywhere_is_on_the_page_of_metrics() -> None:
    documented = set(re.findall(r"^\| `(gateway_\w+)` \|", text_of(ROOT / "docs" / "metrics.md"), re.MULTILINE))
    shown = {*PAGES, *ROOT.glob("deploy/grafana/*.json"), *ROOT.glob("deploy/**/*.yaml")}
    named = {
        (name, name_of(file))
        for file in shown
        for found in METRIC.findall(text_of(file))
        for name in [SUFFIXES.sub("", found)]
    }
    assert {where for where in named if where[0] not in documented} == set()


def anchors(page: Path) -> set[str]:
    """Explicit ones, and those that GitHub makes of headings."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    made = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    return made | set(re.findall(r'<a id="([^"]+)">', text))


def links(page: Path) -> Iterator[str]:
    """Targets inside the project."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_inside_the_project_leads_somewhere(page: Path) -> None:
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        if not to.exists() or (anchor and anchor not in anchors(to)):
            broken.append(target)
    assert broken == []


INCIDENTS = (
    *(
        "gateways-gone",
        "gpu-pool-gone",
        "one-triton-slow",
        "one-triton-fails",
        "probe-fails",
        "bad-model-version",
        "pipeline-broken",
        "overload",
        "memory-scarce",
        "certificate-expired",
    ),
    *("config-rejected", "sequence-lost", "triton-restart-loop", "disk-full", "clock-skew"),
    *("experiment-invalid", "rollout-rolled-back", "rollout-stuck", "bandit-stuck", "store-away"),
    *("experiment-guardrail", "quota-store-away"),
)


@pytest.mark.parametrize("incident", INCIDENTS)
def test_every_incident_says_symptom_where_to_look_cause_and_what_to_do(incident: str) -> None:
    text = text_of(OPERATIONS)
    section = text.partition(f'<a id="{incident}"></a>')[2].partition("<a id=")[0]
    assert section.startswith(f"\n## {incident}: ")
    places = [section.find(f"**{part}.**") for part in ("Symptom", "Look", "Cause", "Do")]
    assert -1 not in places
    assert places == sorted(places)


def test_every_alert_leads_to_an_incident() -> None:
    urls = re.findall(r"runbook_url: https://\S+/docs/operations\.md#(\S+)", text_of(ALERTS))
    assert len(urls) == text_of(ALERTS).count("- alert: ")
    assert set(urls) <= set(INCIDENTS)


COMMAND = re.compile(r"^(?:\$ )?(?:\S*/)?inference-gateway ([^#|&\n]+)", re.MULTILINE)
COMMANDS = {
    f"{name_of(page)}: {command.strip()}": command
    for page in PAGES
    for _, block in blocks(page, r"(?:sh|console|bash)")
    for command in COMMAND.findall(block.replace("\\\n", " "))
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_that_is_shown_is_one_with_its_options(command: str) -> None:
    assert _parser().parse_args(shlex.split(command.replace("[short]", "short"))).run


def test_there_are_commands_to_look_at() -> None:
    assert len(COMMANDS) > 40


PYTHON = {f"{name_of(page)}:{line}": text for page in PAGES for line, text in blocks(page, "python")}


@pytest.mark.parametrize("code", PYTHON.values(), ids=PYTHON)
def test_all_python_that_is_shown_compiles_and_imports_what_is_there(code: str) -> None:
    """Tutorials' code is run besides (test_tutorials.py)."""
    for statement in ast.walk(ast.parse(code)):
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("gateway."):
            module = importlib.import_module(str(statement.module))
            for name in statement.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{module.__name__}.{name.name}")


def cell(name: str) -> str:
    """A default as the page of limits writes it."""
    default = getattr(Limits(), name)
    if isinstance(default, tuple):
        return f"{default[0]}, then {default[1]}/s"
    if name == "min_rate":
        return f"{default // KiB} KiB/s"
    if isinstance(default, float):
        return f"{default:g} s" if default else "0"
    if default >= KiB and default % KiB == 0:
        return f"{default // MiB} MiB" if default >= MiB else f"{default // KiB} KiB"
    return str(default)


@pytest.mark.parametrize("name", [each.name for each in fields(Limits)])
def test_the_page_of_limits_has_each_with_its_default(name: str) -> None:
    rows = re.findall(r"^\|[^|]*\| ([^|]*) \| `([^`]*)`", text_of(ROOT / "docs" / "limits.md"), re.MULTILINE)
    assert [default for setting, default in rows if f"`{name}`" in setting.split(" = ")[0]] == [cell(name)]


def test_every_table_that_peers_can_grow_names_an_owner_and_a_test_that_are_there() -> None:
    page = text_of(ROOT / "docs" / "limits.md").partition("## Tables that peers can grow")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 13
    for _, owners, _, _, test in rows:
        for owner in re.findall(r"`([^`]+)`", owners):
            assert (ROOT / "gateway" / owner).exists()
        assert (ROOT / test.strip(" `")).exists()
    bounded = {
        str(path.relative_to(ROOT / "gateway"))
        for path in (ROOT / "gateway").rglob("*.py")
        if "make_room(" in path.read_text() and path.name != "bounded.py"
    }
    assert bounded <= set(re.findall(r"`([a-z0-9_/]+\.py)`", page))
