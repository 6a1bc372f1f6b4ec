"""Findings about access: what can't work, what nobody can meet, and what is open without being meant to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.access.api_keys import hash_of
from gateway.cli import main
from gateway.config import ConfigError, load
from gateway.forwarding.metadata import _DROPPED, is_passed_on

HASH = hash_of("igk_secret").hex()
BASE = "upstreams: {cpu: {endpoints: [triton:8001]}}\nmodels: {m: {variants: {a: {upstream: cpu, model: x}}}}\n"
KEYS = f"  api_keys: [{{caller: ada, sha256: {HASH}}}]\n"


def said(folder: Path, text: str, **files: str) -> list[str]:
    """All findings, without where they are."""
    for name, content in files.items():
        (folder / name).write_text(content)
    file = folder / "gateway.yaml"
    file.write_text(BASE + text)
    try:
        findings = load(file, {}).warnings
    except ConfigError as error:
        findings = error.findings
    assert HASH not in str(findings)
    return [f"{finding.key}: {finding.wrong}" for finding in findings]


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        ("access:\n" + KEYS + "  grants: [{callers: [ada], models: [m]}]\n", []),
        ("access: {open: true}\nlisten: 0.0.0.0:1\n", []),
        ("listen: 127.0.0.1:1\n", []),
        ("listen: 0.0.0.0:1\n", ["listen: everybody who reaches it may call every model, since there is no 'access'"]),
        (
            "access:\n" + KEYS + "  grants: [{callers: [eve], models: [m]}]\n",
            ["access.api_keys: the key of 'ada' opens nothing", "access.grants[0].callers[0]: no caller can be 'eve'"],
        ),
        (
            "access:\n" + KEYS + "  groups: {g: [ada], h: [eve]}\n  grants: [{groups: [g, h, i], models: ['m*', n]}]\n",
            [
                "access.grants[0].groups[1]: no caller is of group 'h'",
                "access.grants[0].groups[2]: no caller is of group 'i'",
                "access.grants[0].models[1]: no public model 'n'",
            ],
        ),
        (
            "access: {grants: [{everybody: true, models: [m]}]}\n",
            ["access: nobody can call: there is no way to say who is calling"],
        ),
        ("access: {grants: [{anonymous: true, models: [m]}]}\n", []),
        (
            "access: {grants: [{anonymous: true, models: [m], rpcs: [control]}]}\nserver: {control: all}\n",
            ["access.grants[0].rpcs: lets everybody change servers, also who does not say who he is"],
        ),
        (
            "access:\n" + KEYS + "  grants: [{everybody: true, rpcs: [LogSettings]}]\nserver: {control: none}\n",
            ["access.grants[0].rpcs: has RPCs that change servers, which server.control keeps from everybody"],
        ),
        (
            "access:\n" + KEYS + "  certificates: {name: dns}\n  grants: [{everybody: true, models: [m]}]\n",
            [
                "access: certificates and api_keys can give the same name to different callers",
                "access.certificates: no client shows a certificate, since none is asked for",
            ],
        ),
        (
            "access:\n" + KEYS + "  grants: [{callers: [ada], models: [m, '*m'], direct: ['x*', 'a*b']}]\n",
            [
                "access.grants[0].direct[1]: 'a*b' has a '*' that is not at its end, where it stands for itself",
                "access.grants[0].models[1]: '*m' has a '*' that is not at its end, where it stands for itself",
            ],
        ),
        ("access:\n" + KEYS + "  grants: [{models: [m]}]\n", ["access.grants[0]: is for nobody"]),
        ("access:\n" + KEYS + "  open: true\n", ["access: is 'open', so nothing else here has an effect"]),
        ("access: {api_keys: [{caller: ada, sha256: igk_secret}]}\n", ["access.api_keys[0].sha256: is no SHA-256"]),
        (
            "access: {grants: [{everybody: true, rpcs: [Modelinfer]}]}\n",
            ["access.grants[0].rpcs[0]: no RPC 'Modelinfer'"],
        ),
        (
            "access: {jwt: [{issuer: 'http://a.example', audience: [a]}], grants: [{everybody: true}]}\n",
            ["access.jwt[0].issuer: is no https URL, so it can't be asked where its keys are"],
        ),
        (
            "access: {jwt: [{issuer: 'https://a', audience: [a]}, {issuer: 'https://b', audience: [a]}]}\n",
            ["access: jwt[1] and jwt[0] can give the same name to different callers"],
        ),
        (
            "access: {jwt: [{issuer: x, audience: [a], jwks: 'http://a/k', algorithms: [HS256]}]}\n",
            ["access.jwt[0].algorithms[0]: is 'HS256'", "access.jwt[0].jwks: is 'http://a/k'"],
        ),
        (
            "access: {jwt: [{issuer: x, audience: [a], jwks: 'http://a.example?x=@localhost/k'}]}\n",
            ["access.jwt[0].jwks: is 'http://…@localhost/k'"],
        ),
        (
            "access: {jwt: [{issuer: 'http://localhost.a.example', audience: [a]}], grants: [{everybody: true}]}\n",
            ["access.jwt[0].issuer: is no https URL, so it can't be asked where its keys are"],
        ),
    ],
)  # fmt: skip
def test_access_is_checked_as_a_whole(tmp_path: Path, text: str, findings: list[str]) -> None:
    assert said(tmp_path, text) == findings


@pytest.mark.parametrize("key", [*sorted(_DROPPED), "gateway-caller", "x-caller"])
def test_a_name_is_told_triton_only_under_a_key_that_gets_there(tmp_path: Path, key: str) -> None:
    text = "access:\n" + KEYS + f"  tell_upstream: {key}\n  grants: [{{callers: [ada], models: [m]}}]\n"
    wrong = f"access.tell_upstream: has no effect: the gateway sends Triton no metadata '{key}'"
    assert said(tmp_path, text) == ([] if is_passed_on(key) else [wrong])


def test_files_are_checked_and_no_finding_shows_what_is_in_them(tmp_path: Path) -> None:
    keys = f"# callers\nada {HASH} 2030-01-31\n\neve igk_secret\nbob {HASH} soon\nx\n"
    text = "access: {api_key_file: keys.txt, grants: [{callers: [ada], models: [m]}]}\n"
    found = said(tmp_path, text, **{"keys.txt": keys})
    assert found == [f"access.api_key_file: line {number} is no key" for number in (4, 5, 6)]
    jwt = "access: {jwt: [{issuer: x, audience: [a], jwks_file: k.json}], grants: [{everybody: true}]}\n"
    for content in ("", "[]", '{"keys": []}', '{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}', "[" * 100_000):
        [finding] = said(tmp_path, jwt, **{"k.json": content})
        assert finding.startswith("access.jwt[0].jwks_file: ")
        assert "c2VjcmV0" not in finding


def test_a_new_key_is_shown_once_with_what_the_config_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = []
    for _ in range(2):
        assert main(["keys", "new", "ada"]) == 0
        lines = capsys.readouterr().out.splitlines()
        key, line, in_file = lines[1].strip(), lines[3].strip(), lines[5].strip()
        assert hash_of(key).hex() in line
        assert in_file == f"ada {hash_of(key).hex()}"
        text = f"access:\n  api_keys:\n    {line}\n  grants: [{{callers: [ada], models: [m]}}]\n"
        assert said(tmp_path, text) == []
        keys.append(key)
    assert keys[0] != keys[1]
    assert main(["keys", "new", "a\nb"]) == 2


def test_explain_says_what_a_caller_may_and_which_grant_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gateway.yaml"
    grants = "  groups: {g: [ada]}\n  grants: [{groups: [g], models: [m], allow: [priority]}, {callers: [bob]}]\n"
    file.write_text(BASE + "access:\n" + KEYS + grants)
    assert main(["explain", str(file), "--model", "m", "--as", "ada"]) == 0
    told = capsys.readouterr().out
    assert "caller ada, of g" in told
    assert "access.grants[0]: lets him use it by ModelInfer" in told
    assert "requests may have: priority" in told
    assert "access.grants[1]: is for others" in told
    for caller, model in (("ada", "x"), ("eve", "m"), ("", "m")):
        assert main(["explain", str(file), "--model", model, "--as", caller]) == 0
        assert f"so {model} does not exist for him" in capsys.readouterr().out
