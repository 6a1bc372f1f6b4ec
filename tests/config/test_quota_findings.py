"""What `check` says of quotas, with what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import ConfigError, load
from gateway.config.check import Names, check
from gateway.config.schema import Config

BASE = {
    "upstreams": {"gpu": {"endpoints": ["triton:8001"]}},
    "models": {"photos": {"variants": {"a": {"upstream": "gpu", "model": "photos_fp16"}}}},
}
CALLER = {"caller": "x-tenant"}


def problems(quotas: object, **more: object) -> list[str]:
    data = {**BASE, "quotas": quotas, **more}
    config = Config.model_validate(data)
    return [f"{'.'.join(map(str, each.path))}: {each.wrong}; {each.right}" for each in check(config, Names.of(data))]


@pytest.mark.parametrize(
    ("quotas", "said"),
    [
        (
            {"callers": {"acme": {"requests": 5}}},
            "quotas.callers: names callers, and nothing says by what they are known; set access, or quotas.caller",
        ),
        (
            {"models": {"photo": {"requests": 5}}},
            "quotas.models.photo: no model 'photo'; known: photos (did you mean 'photos'?)",
        ),
        (
            {"default": {"burst": "5s", "concurrent": 3}},
            "quotas.default.burst: has no effect without a rate; requests, bytes or rows",
        ),
        (
            {**CALLER, "callers": {"acme": {"rows": 5, "models": {"photos": {"rows": 50}}}}},
            "quotas.callers.acme.models.photos.rows: is 50, above the 5 of this caller for all models together; "
            "at most 5",
        ),
        (
            {**CALLER, "callers": {"other": {"rows": 5}}},
            "quotas.callers.other: is what metrics call all callers together who are not named here, whose numbers it "
            "would share; another name",
        ),
        (
            {"shared": {"url": "redis://x:6379"}, "default": {"concurrent": 3}},
            "quotas.shared: has no effect: no quota has a rate; requests, bytes or rows",
        ),
        (
            {"shared": {"url": "redis://:secret@x", "password_file": "/p"}, "default": {"rows": 3}},
            "quotas.shared.password_file: there is a password in 'url' too; one of the two",
        ),
        (
            {"shared": {"url": "redis://x", "timeout": "20ms"}, "default": {"rows": 3}},
            "quotas.shared.timeout: is 20ms, below 'period' (100ms); at least as long",
        ),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "",
)
def test_findings(quotas: object, said: str) -> None:
    assert problems(quotas) == [said]


def test_whoever_may_have_a_grant_may_have_a_quota() -> None:
    name = "Zoë of café"
    access = {
        "api_keys": [{"caller": name, "sha256": "0" * 64}],
        "grants": [{"callers": [name], "models": ["photos"]}],
    }
    assert problems({"callers": {name: {"requests": 5}}}, access=access) == []


def test_what_is_too_small_for_its_workers_is_told() -> None:
    found = problems({"default": {"concurrent": 2, "requests": 1}}, workers=4)
    assert found == [
        "quotas.default.concurrent: is 2, and each of 4 workers lets in at least one; at least 4, or fewer workers",
        "quotas.default.requests: gives less than one request at once to each of 4 workers, which lets in one all the "
        "same; a longer burst, or fewer workers",
    ]


def test_callers_who_are_known_need_not_say_whose_quota_they_use() -> None:
    key = {"caller": "ada", "sha256": "0" * 64}
    access = {"api_keys": [key], "grants": [{"callers": ["ada"], "models": ["photos"]}]}
    assert problems({**CALLER, "default": {"requests": 5}}, access=access) == [
        "quotas.caller: lets each caller choose whose quota he uses, since clients themselves say 'x-tenant'; leave it "
        "out, so that a caller is who access knows him to be; keep it if a proxy sets it"
    ]
    assert problems({"caller": "gateway-caller", "default": {"requests": 5}}, access=access) == []


def test_good_ones_are_not_complained_of() -> None:
    of_models = {"photos": {"rows": 50}, "photos_fp16": {"concurrent": 5}}
    quotas = {**CALLER, "callers": {"acme": {"requests": 5, "models": of_models}}, "models": of_models}
    assert problems({**quotas, "shared": {"url": "valkey://x"}}) == []


def test_a_url_of_no_store_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(
        "upstreams: {gpu: {endpoints: ['t:1']}}\ndirect: {models: all}\nquotas: {shared: {url: 'http://x'}}\n"
    )
    with pytest.raises(ConfigError, match="'url' is no address of a store; one that begins with redis://"):
        load(file, {})
