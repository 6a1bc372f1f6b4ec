"""A file becomes a typed config, or every finding with its line. Invariant: nothing but ConfigError is ever raised."""

# ruff: noqa: E501  (a finding is one line here as it is for people)

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from certificates import any_authority
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import Config, ConfigError, Loaded, Severity, load, transparent
from gateway.config.text import MAX_BYTES
from gateway.steps.catalogue import SHIPPED

UPSTREAM = "upstreams: {cpu: {endpoints: [triton:8001]}}\n"
MODEL = (
    UPSTREAM + "models:\n  m:\n    variants:\n      a: {upstream: cpu, model: x}\n      b: {upstream: cpu, model: y}\n"
)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that findings call `gateway.yaml`."""
    monkeypatch.chdir(tmp_path)
    return Path("gateway.yaml")


def loaded(file: Path, text: str, environ: Mapping[str, str] = {}, flags: Mapping[str, str] = {}) -> Loaded:
    file.write_text(text, encoding="utf-8")
    return load(file, environ, flags)


def findings(file: Path, text: str, environ: Mapping[str, str] = {}, flags: Mapping[str, str] = {}) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(file, text, environ, flags)
    return [str(finding) for finding in caught.value.findings]


NAME = "needs: name (1 to 63 letters, digits, '.', '_' or '-', the first a letter or digit)"
AN_ENDPOINT = "HOST:PORT or dns:///NAME:PORT (port 1 to 65535)"

WRONG: dict[str, tuple[str, list[str]]] = {
    "empty file": ("", ["gateway.yaml: is empty; a mapping with at least 'upstreams'"]),
    "only a comment": ("# hello\n", ["gateway.yaml: is empty; a mapping with at least 'upstreams'"]),
    "a list": ("- 1\n", ["gateway.yaml:1: is a list; a mapping with at least 'upstreams'"]),
    "no upstreams": (
        "workers: 1\nmodels: {}\n",
        ["gateway.yaml:1: upstreams: is missing; needs: mapping of name to section (1 to 1000 entries)"],
    ),
    "misspelt key": (
        UPSTREAM + "wokers: 2\ndirect: {models: all}\n",
        [
            "gateway.yaml:2: wokers: unknown key 'wokers'; known: listen, workers, admin, server, upstreams, "
            "direct, models, access, admission, quotas, pipelines, sequences, experiments, store, telemetry (did you mean 'workers'?)"
        ],
    ),
    "misspelt key deep down": (
        MODEL + "      c: {upstream: cpu, modell: z}\n",
        [
            "gateway.yaml:7: models.m.variants.c.model: is missing; needs: model name (1 to 200 ASCII characters without "
            "space and '/')",
            "gateway.yaml:7: models.m.variants.c.modell: unknown key 'modell'; known: upstream, model, version, "
            "attempt_timeout, probe, limit (did you mean 'model'?)",
        ],
    ),
    "wrong types": (
        MODEL
        + "    attempts: two\nworkers: 1.5\nserver: {reflection: yes, drain: {}}\nsequences: {idle: [1]}\nadmin:\n",
        [
            "gateway.yaml:7: models.m.attempts: is 'two'; needs: whole number (1 to 5)",
            "gateway.yaml:8: workers: is 1.5; needs: whole number (1 to 64)",
            "gateway.yaml:9: server.drain: is a mapping; needs: duration (0s to 1h)",
            "gateway.yaml:9: server.reflection: is 'yes'; needs: true or false",
            "gateway.yaml:10: sequences.idle: is a list; needs: duration (1s to 24h)",
            "gateway.yaml:11: admin: is empty; needs: section",
        ],
    ),
    "out of range": (
        MODEL
        + "workers: 65\nserver:\n  drain: 2h\n  max_message_bytes: 1KiB\ntelemetry: {access_log: {sample: 1.5}}\n",
        [
            "gateway.yaml:7: workers: is 65; needs: whole number (1 to 64)",
            "gateway.yaml:9: server.drain: is '2h'; needs: duration (0s to 1h)",
            "gateway.yaml:10: server.max_message_bytes: is '1KiB'; needs: size (64KiB to 2147483647)",
            "gateway.yaml:11: telemetry.access_log.sample: is 1.5; needs: number (0 to 1)",
        ],
    ),
    "addresses": (
        "listen: 8001\nadmin: {listen: 'host:99999'}\nupstreams:\n  cpu:\n    endpoints:\n    - triton\n    - triton:0\n"
        "    - 'http://triton:8001'\n    - '[::1:8001'\n    - ' triton:8001'\n    - 'dns:///triton'\n"
        "    - 'dns:///triton:8001'\n",
        [
            "gateway.yaml:1: listen: is 8001; needs: HOST:PORT (port 0 to 65535, 0 picks a free one)",
            "gateway.yaml:2: admin.listen: is 'host:99999'; needs: HOST:PORT (port 0 to 65535, 0 picks a free one)",
            f"gateway.yaml:6: upstreams.cpu.endpoints[0]: is 'triton'; needs: {AN_ENDPOINT}",
            f"gateway.yaml:7: upstreams.cpu.endpoints[1]: is 'triton:0'; needs: {AN_ENDPOINT}",
            f"gateway.yaml:8: upstreams.cpu.endpoints[2]: is 'http://triton:8001'; needs: {AN_ENDPOINT}",
            f"gateway.yaml:9: upstreams.cpu.endpoints[3]: is '[::1:8001'; needs: {AN_ENDPOINT}",
            f"gateway.yaml:10: upstreams.cpu.endpoints[4]: is ' triton:8001'; needs: {AN_ENDPOINT}",
            f"gateway.yaml:11: upstreams.cpu.endpoints[5]: is 'dns:///triton'; needs: {AN_ENDPOINT}",
        ],
    ),
    "empty lists": (
        "upstreams: {cpu: {endpoints: []}}\n",
        [
            "gateway.yaml:1: upstreams.cpu.endpoints: has 0 entries; "
            "needs: list of HOST:PORT or dns:///NAME:PORT (1 to 1000 entries)"
        ],
    ),
    "bad names": (
        "upstreams: {'c p u': {endpoints: [triton:8001]}}\nmodels:\n  'a/b': {variants: {-x: {upstream: u, model: m}}}\n",
        [
            f"gateway.yaml:1: upstreams.c p u: cannot be a name here; {NAME}",
            "gateway.yaml:3: models.a/b: cannot be a name here; needs: model name (1 to 200 ASCII characters without "
            "space and '/')",
            f"gateway.yaml:3: models.a/b.variants.-x: cannot be a name here; {NAME}",
        ],
    ),
    "sharing nothing": (
        MODEL + "    share: {coalesce: false}\n",
        ["gateway.yaml:7: models.m.share: shares nothing; a size for 'cache', or 'coalesce: true'"],
    ),
    "twice, and never twice": (
        MODEL.replace("triton:8001", "triton:8001, other:8001") + "    hedge: {}\n    retry: {on: []}\n",
        ["gateway.yaml:7: models.m.hedge: runs slow requests twice, which 'retry: {on: []}' forbids; one of the two"],
    ),
    "another variant for a model that may not run twice": (
        MODEL + "    answers: {finite: fallback}\n    fallback: forbid\n    retry: {on: []}\n",
        [
            "gateway.yaml:7: models.m.answers.finite: runs a request twice, which 'retry: {on: []}' forbids; 'count', or no "
            "such 'retry'",
            "gateway.yaml:7: warning: models.m.answers.finite: there is no variant to fall back to, so the call fails "
            "where a pool has no other endpoint; another variant, or 'count'",
        ],
    ),
    "looking for nothing": (
        MODEL + "    answers: {finite: ignore, contract: ignore}\n",
        ["gateway.yaml:7: models.m.answers: looks for nothing; 'count' or 'fallback', or no 'answers'"],
    ),
    "duplicate key": (
        MODEL + "    split: {a: 1}\n    split: {b: 1}\n",
        ["gateway.yaml:8: models.m.split: is written twice, first on line 7; each key once"],
    ),
    "unknown upstream": (
        "upstreams: {gpu: {endpoints: [t:1]}}\nmodels:\n  m:\n    variants:\n      a: {upstream: gpuu, model: x}\n",
        [
            "gateway.yaml:1: warning: upstreams.gpu: no variant uses it",
            "gateway.yaml:5: models.m.variants.a.upstream: no upstream 'gpuu'; known: gpu (did you mean 'gpu'?)",
        ],
    ),
    "a broken upstream is not an unknown one": (
        "upstreams:\n  cpu: {endpoint: [t:1]}\nmodels: {m: {variants: {a: {upstream: cpu, model: x}}}}\n",
        [
            "gateway.yaml:2: upstreams.cpu.endpoint: unknown key 'endpoint'; known: endpoints, probe_interval, "
            "probe_timeout, slow_probes_to_fail, subset, shared_memory, tls (did you mean 'endpoints'?)",
            "gateway.yaml:2: upstreams.cpu.endpoints: is missing; "
            "needs: list of HOST:PORT or dns:///NAME:PORT (1 to 1000 entries)",
        ],
    ),
    "a broken variant is not an unknown one": (
        MODEL + "      c: {upstream: cpu}\n    split: {c: 1, d: 1}\n",
        [
            "gateway.yaml:7: models.m.variants.c.model: is missing; needs: model name (1 to 200 ASCII characters without "
            "space and '/')",
            "gateway.yaml:8: models.m.split.d: no variant 'd'; known: a, b, c",
        ],
    ),
    "unknown variants": (
        MODEL + "    split:\n      a: 1\n      beta: 1\n    fallback: [b, bb]\n"
        "    rules:\n    - {name: r, match: {metadata: {k: v}}, variant: A}\n",
        [
            "gateway.yaml:9: models.m.split.beta: no variant 'beta'; known: a, b",
            "gateway.yaml:10: models.m.fallback[1]: no variant 'bb'; known: a, b (did you mean 'b'?)",
            "gateway.yaml:12: models.m.rules[0].variant: no variant 'A'; known: a, b",
        ],
    ),
    "an upstream that only a broken variant uses is used": (
        UPSTREAM + "models: {m: {variants: {a: {upstream: cpu}}}}\n",
        [
            "gateway.yaml:2: models.m.variants.a.model: is missing; needs: model name (1 to 200 ASCII characters without "
            "space and '/')",
        ],
    ),
    "weights": (
        MODEL + "    split: {a: 0, b: 0}\n  n:\n    variants: {a: {upstream: cpu, model: z}}\n    split: {a: -1}\n",
        [
            "gateway.yaml:7: models.m.split: no weight is above 0; at least one variant with a weight above 0",
            "gateway.yaml:10: models.n.split.a: is -1; needs: number (0 to 1000000)",
        ],
    ),
    "infinite weight": (
        MODEL + "    split: {a: 1e999}\n",
        ["gateway.yaml:7: models.m.split.a: is inf; needs: number (0 to 1000000)"],
    ),
    "sticky": (
        MODEL
        + "    sticky: {metadata: X-User-Id}\n  n:\n    variants: {a: {upstream: cpu, model: z}}\n    sticky: {}\n",
        [
            "gateway.yaml:7: models.m.sticky.metadata: is 'X-User-Id'; needs: metadata key (lower case, digits, '_', '-', "
            "'.'; neither 'grpc-…' nor '…-bin')",
            "gateway.yaml:10: models.n.sticky: needs something to recognise a caller by; 'metadata', 'parameter' or both",
        ],
    ),
    "rules of one name": (
        MODEL + "    rules:\n    - {name: r, match: {metadata: {k: 1}}, variant: a}\n"
        "    - {name: r, match: {metadata: {k: 2}}, variant: b}\n",
        ["gateway.yaml:9: models.m.rules[1].name: 'r' is listed twice; write each name once"],
    ),
    "conditions": (
        MODEL + "    rules:\n"
        "    - {name: r1, match: {}, variant: a}\n"
        "    - {name: r2, match: {metadata: {k: {regex: '('}}}, variant: a}\n"
        "    - {name: r3, match: {metadata: {k: {prefix: a, present: true}}}, variant: a}\n"
        "    - {name: r4, match: {parameters: {k: [a, [b]]}}, variant: a}\n"
        "    - {name: r5, match: {parameters: {k:}}, variant: a}\n"
        "    - {name: r6, match: {metadata: {a-bin: x}}, variant: a}\n",
        [
            "gateway.yaml:8: models.m.rules[0].match: has no condition, so it would match every call; a key below "
            "'metadata' or 'parameters'",
            "gateway.yaml:9: models.m.rules[1].match.metadata.k.regex: is not a regular expression: unclosed group"
            "; needs: regular expression",
            "gateway.yaml:10: models.m.rules[2].match.metadata.k: needs one test; a value, a list of values, or one of "
            "'prefix', 'regex', 'present'",
            "gateway.yaml:11: models.m.rules[3].match.parameters.k[1]: is a list; needs: value",
            "gateway.yaml:12: models.m.rules[4].match.parameters.k: is empty; needs: value or list of value or section "
            "(1 or more entries)",
            "gateway.yaml:13: models.m.rules[5].match.metadata.a-bin: cannot be a name here; needs: metadata key (lower "
            "case, digits, '_', '-', '.'; neither 'grpc-…' nor '…-bin')",
        ],
    ),
    "fallback is a word": (
        MODEL + "    fallback: never\n",
        ["gateway.yaml:7: models.m.fallback: is 'never'; needs: list of variants, or 'forbid'"],
    ),
    "fallback twice": (
        MODEL + "    fallback: [a, b, a]\n",
        ["gateway.yaml:7: models.m.fallback[2]: 'a' is listed twice; write each name once"],
    ),
    "neither variants nor pipeline": (
        UPSTREAM + "models: {m: {attempts: 1}}\n",
        [
            "gateway.yaml:1: warning: upstreams.cpu: no variant uses it",
            "gateway.yaml:2: models.m: needs one thing to answer with; either 'variants' or 'pipeline'",
        ],
    ),
    "duplicate endpoint": (
        "upstreams: {cpu: {endpoints: [t:1, u:1, T:1]}}\ndirect: {models: all}\n",
        ["gateway.yaml:1: upstreams.cpu.endpoints[2]: 'T:1' is listed twice; write each endpoint once"],
    ),
    "a subset of one": (
        "upstreams: {cpu: {endpoints: [t:1, u:1], subset: 1}}\ndirect: {models: all}\n",
        ["gateway.yaml:1: upstreams.cpu.subset: is 1; needs: whole number (2 to 10000)"],
    ),
    "ports collide": (
        MODEL + "listen: 0.0.0.0:9001\nadmin: {listen: '127.0.0.1:9001'}\naccess: {open: true}\n",
        ["gateway.yaml:8: admin.listen: '127.0.0.1:9001' collides with listen '0.0.0.0:9001'; choose another port"],
    ),
    "calls go round in circles": (
        "listen: 0.0.0.0:9001\nupstreams: {cpu: {endpoints: [localhost:9001]}}\ndirect: {models: all}\n"
        "access: {open: true}\n",
        [
            "gateway.yaml:2: upstreams.cpu.endpoints[0]: 'localhost:9001' is where this gateway listens; give the address "
            "of a Triton server"
        ],
    ),
    "workers without a port to share": (
        MODEL + "listen: 127.0.0.1:0\nworkers: 2\n",
        ["gateway.yaml:8: workers: 2 workers cannot share port 0; set a fixed port in 'listen', or 1 worker"],
    ),
    "deadlines": (
        MODEL + "server: {default_deadline: 2m, max_deadline: 90s}\n",
        ["gateway.yaml:7: server.default_deadline: is 2m, above max_deadline; at most 90s"],
    ),
    "direct names without a home": (
        "upstreams: {a: {endpoints: [t:1]}, b: {endpoints: [u:1]}}\ndirect:\n  models: all\n",
        [
            "gateway.yaml:2: direct: does not say which upstream gets the names that no variant uses; set "
            "direct.upstream to one of: a, b"
        ],
    ),
    "direct names to nowhere": (
        UPSTREAM + "direct: {models: all, upstream: gpu}\n",
        ["gateway.yaml:2: direct.upstream: no upstream 'gpu'; known: cpu (did you mean 'cpu'?)"],
    ),
    "nothing to serve": (
        UPSTREAM,
        [
            "gateway.yaml:1: models: there is nothing to serve; a public model, or direct.models: all",
            "gateway.yaml:1: warning: upstreams.cpu: no variant uses it",
        ],
    ),
    "tls": (
        "upstreams: {cpu: {endpoints: [t:1], tls: {ca: ca.pem}}}\ndirect: {models: all}\n",
        [
            "gateway.yaml:1: upstreams.cpu.tls.ca: cannot use file 'ca.pem': No such file or directory; a path, relative "
            "to this file's folder"
        ],
    ),
    "half of mutual TLS": (
        "upstreams: {cpu: {endpoints: [t:1], tls: {cert: gateway.yaml}}}\ndirect: {models: all}\n",
        ["gateway.yaml:1: upstreams.cpu.tls: cert is given without key; both for mutual TLS, or neither"],
    ),
    "unset variables": (
        "upstreams: {cpu: {endpoints: ['${A}:${B}', '${A}']}}\ndirect: {models: all}\n",
        [
            "gateway.yaml:1: upstreams.cpu.endpoints[0]: the environment has no A; set it, or write ${A:-default}",
            "gateway.yaml:1: upstreams.cpu.endpoints[0]: the environment has no B; set it, or write ${B:-default}",
            "gateway.yaml:1: upstreams.cpu.endpoints[1]: the environment has no A; set it, or write ${A:-default}",
        ],
    ),
    "unset variable": (
        "upstreams: {cpu: {endpoints: ['${TRITON}']}}\ndirect: {models: all}\n",
        [
            "gateway.yaml:1: upstreams.cpu.endpoints[0]: the environment has no TRITON; set it, or write "
            "${TRITON:-default}"
        ],
    ),
    "variables only in endpoints": (
        MODEL + "listen: ${LISTEN:-0.0.0.0:1}\n",
        ["gateway.yaml:7: listen: is '${LISTEN:-0.0.0.0:1}'; needs: HOST:PORT (port 0 to 65535, 0 picks a free one)"],
    ),
    "long values are cut": (
        MODEL + f"admin: {{listen: {'x' * 5000}}}\n",
        [f"gateway.yaml:7: admin.listen: is '{'x' * 58}…; needs: HOST:PORT (port 0 to 65535, 0 picks a free one)"],
    ),
}


@pytest.mark.parametrize(("text", "expected"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_gives_every_finding_with_its_line(file: Path, text: str, expected: list[str]) -> None:
    assert findings(file, text) == expected


PIPELINE = (
    UPSTREAM
    + """\
models:
  m: {variants: {a: {upstream: cpu, model: x}}}
  p:
    pipeline:
      inputs: [{name: image, datatype: BYTES, shape: [1]}]
      outputs: [{name: label, datatype: BYTES, shape: [-1]}]
      steps:
      - {step: decode_image}
      - {call: m, inputs: [image], outputs: [scores]}
      - {step: top_k, with: {k: 5}}
"""
)


def test_a_pipeline_comes_out_built(file: Path) -> None:
    pipeline = loaded(file, PIPELINE).pipelines["p"]
    assert (pipeline.models, [part.name for part in pipeline.parts]) == (("m",), ["decode_image", "m", "top_k"])


WRONG_PIPELINES = {
    "unknown model": (
        ("call: m", "call: mm"),
        ["gateway.yaml:10: models.p.pipeline.steps[1].call: no public model 'mm'; known: m, p (did you mean 'm'?)"],
    ),
    "calls itself": (
        ("call: m", "call: p"),
        [
            "gateway.yaml:10: models.p.pipeline.steps[1].call: calls itself: p → p; call a model that does not lead back here"
        ],
    ),
    "unknown step": (
        ("step: top_k", "step: topk"),
        [
            "gateway.yaml:11: models.p.pipeline.steps[2].step: unknown step 'topk'; known: "
            f"{', '.join(sorted(SHIPPED))} (did you mean 'top_k'?)"
        ],
    ),
    "missing labels": (
        ("k: 5", "labels: nowhere.txt"),
        ["gateway.yaml:11: models.p.pipeline.steps[2].with.labels: "],
    ),
    "both kinds": (
        ("    pipeline:\n", "    variants: {a: {upstream: cpu, model: x}}\n    pipeline:\n"),
        ["gateway.yaml:4: models.p: needs one thing to answer with; either 'variants' or 'pipeline'"],
    ),
    "settings of routes": (
        ("    pipeline:\n", "    attempts: 2\n    pipeline:\n"),
        ["gateway.yaml:4: models.p: a pipeline has no 'attempts'; route the models that it calls instead"],
    ),
    "a step and a call": (
        ("{call: m, ", "{call: m, step: softmax, "),
        ["gateway.yaml:10: models.p.pipeline.steps[1]: needs either 'step' or 'call' or 'fan_out'"],
    ),
}


@pytest.mark.parametrize(("change", "expected"), WRONG_PIPELINES.values(), ids=WRONG_PIPELINES)
def test_a_wrong_pipeline_gives_findings_like_everything_else(
    file: Path, change: tuple[str, str], expected: list[str]
) -> None:
    found = findings(file, PIPELINE.replace(*change))
    assert [each[: len(right)] for each, right in zip(found, expected, strict=True)] == expected


def test_pipelines_that_call_each_other_in_a_circle_are_found(file: Path) -> None:
    second = PIPELINE[PIPELINE.index("  p:\n") :].replace("  p:\n", "  q:\n").replace("call: m", "call: p")
    found = findings(file, PIPELINE.replace("call: m", "call: q") + second)
    assert [each.split("; ")[0] for each in found] == [
        "gateway.yaml:10: models.p.pipeline.steps[1].call: calls itself: p → q → p",
        "gateway.yaml:18: models.q.pipeline.steps[1].call: calls itself: q → p → q",
    ]


WARNINGS = {
    "unused upstream": (
        MODEL.replace("upstreams: {", "upstreams: {spare: {endpoints: [s:1]}, "),
        ["gateway.yaml:1: warning: upstreams.spare: no variant uses it"],
    ),
    "twin variants": (
        MODEL.replace("model: y", "model: x"),
        [
            "gateway.yaml:6: warning: models.m.variants.b: is the same as variant 'a'; choose another model, version or upstream"
        ],
    ),
    "hidden name": (
        MODEL + "  y: {variants: {a: {upstream: cpu, model: z}}}\n",
        [
            "gateway.yaml:6: warning: models.m.variants.b.model: 'y' is also a public model, and calls of that name reach "
            "the public model; choose another public name if they should reach this one"
        ],
    ),
    "upstream for nothing": (
        MODEL + "direct: {upstream: cpu}\n",
        ["gateway.yaml:7: warning: direct.upstream: has no effect with direct.models 'variants'; direct.models: all"],
    ),
    "a time for nothing": (
        MODEL + "    share: {ttl: 5s}\n",
        ["gateway.yaml:7: warning: models.m.share.ttl: has no effect without 'cache'; a size for 'cache'"],
    ),
    "second attempts without a second endpoint": (
        MODEL + "    hedge: {}\n    merge: {}\n",
        [
            "gateway.yaml:7: warning: models.m.hedge: holds for no call that 'merge' merges; one of the two",
            "gateway.yaml:7: warning: models.m.hedge: no variant has a second endpoint for a second attempt; "
            "an upstream with several endpoints",
        ],
    ),
    "a subset of all": (
        "upstreams: {cpu: {endpoints: [t:1, u:1], subset: 2}, dns: {endpoints: ['dns:///t:1'], subset: 2}}\n"
        "models: {m: {variants: {a: {upstream: cpu, model: x}, b: {upstream: dns, model: x}}}}\n",
        [
            "gateway.yaml:1: warning: upstreams.cpu.subset: has no effect: 2 of 2 endpoints are all; fewer than there are "
            "endpoints, or leave it out",
        ],
    ),
    "changes through a subset": (
        "upstreams: {cpu: {endpoints: [t:1, u:1, v:1], subset: 2}}\ndirect: {models: all}\nserver: {control: all}\n",
        [
            "gateway.yaml:1: warning: upstreams.cpu.subset: keeps RPCs that change servers, which server.control allows, "
            "from this upstream: they would not reach all; server.control: none, or no subset",
        ],
    ),
    "public name is its own variant's name": (MODEL.replace("  m:", "  x:"), []),
}


@pytest.mark.parametrize(("text", "expected"), WARNINGS.values(), ids=WARNINGS)
def test_what_is_odd_is_a_warning_and_still_taken(file: Path, text: str, expected: list[str]) -> None:
    found = loaded(file, text).warnings
    assert [str(each) for each in found] == expected
    assert {each.severity for each in found} <= {Severity.WARNING}


def test_defaults_serve_only_this_host(file: Path) -> None:
    for config in (loaded(file, MODEL).config, transparent("triton:8001", {}).config):
        server = config.server
        assert (config.listen, config.admin.listen, server.control, server.reflection) == (
            "127.0.0.1:9001",
            "127.0.0.1:9002",
            "loopback",
            False,
        )
        assert config.telemetry.capture == ()


@pytest.mark.parametrize(
    ("listen", "written", "control"),
    [
        ("127.0.0.1:9001", "", "loopback"),
        ("127.0.0.9:9001", "", "loopback"),
        ("localhost:9001", "", "loopback"),
        ("'[::1]:9001'", "", "loopback"),
        ("0.0.0.0:9001", "", "none"),
        ("'[::]:9001'", "", "none"),
        ("10.0.0.1:9001", "", "none"),
        ("gateway.example:9001", "", "none"),
        ("0.0.0.0:9001", "all", "all"),
        ("0.0.0.0:9001", "loopback", "loopback"),
        ("127.0.0.1:9001", "none", "none"),
    ],
)
def test_nobody_changes_a_server_through_a_public_listener_unless_the_file_says_so(
    file: Path, listen: str, written: str, control: str
) -> None:
    """Behind a proxy on the same host every caller comes from loopback."""
    text = MODEL + f"listen: {listen}\n" + (f"server: {{control: {written}}}\n" if written else "")
    found = loaded(file, text)
    assert found.config.server.control == control
    warned = [str(each) for each in found.warnings if "server.control" in str(each)]
    assert bool(warned) == (written == "loopback" and listen.startswith("0"))
    assert all("proxy" in each for each in warned)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("5", 5), ("0.5", 0.5), ("250ms", 0.25), ("5s", 5), ("2m", 120), ("1h", 3600), ("1.5 s", 1.5)],
)
def test_durations_have_units(file: Path, written: str, seconds: float) -> None:
    assert loaded(file, MODEL + f"server: {{drain: {written}}}").config.server.drain == seconds


@pytest.mark.parametrize(("written", "octets"), [("65536", 65536), ("1MiB", 2**20), ("1MB", 10**6), ("0.5 GiB", 2**29)])
def test_sizes_have_units(file: Path, written: str, octets: int) -> None:
    size = loaded(file, MODEL + f"server: {{max_message_bytes: {written}}}").config.server.max_message_bytes
    assert (size, type(size)) == (octets, int)


def test_shorthands_come_out_in_one_form(file: Path) -> None:
    text = MODEL + (
        "    fallback: forbid\n"
        "    rules: [{name: r, match: {metadata: {a: 1, b: [x, true]}, parameters: {c: {any_of: [z]}}}, variant: a}]\n"
    )
    model = loaded(file, text).config.models["m"]
    conditions = {**model.rules[0].match.metadata, **model.rules[0].match.parameters}
    assert model.fallback == ()
    assert {key: condition.any_of for key, condition in conditions.items()} == {
        "a": (1,),
        "b": ("x", True),
        "c": ("z",),
    }


def test_a_version_may_be_written_as_a_number(file: Path) -> None:
    text = MODEL.replace("model: x", "model: x, version: 3").replace("model: y", 'model: y, version: "4"')
    variants = loaded(file, text).config.models["m"].variants or {}
    assert [variant.version for variant in variants.values()] == ["3", "4"]


def test_a_flag_wins_over_the_environment_over_the_file(file: Path) -> None:
    text = MODEL + "listen: 127.0.0.1:1\nadmin: {listen: '127.0.0.1:2'}\nworkers: 3\n"
    environ = {"GATEWAY_LISTEN": "127.0.0.1:4", "GATEWAY_WORKERS": "5", "GATEWAY_ADMIN_LISTEN": ""}
    config = loaded(file, text, environ, {"--workers": "6"}).config
    assert (config.listen, config.admin.listen, config.workers) == ("127.0.0.1:4", "127.0.0.1:2", 6)


def test_a_wrong_override_is_named_by_its_source(file: Path) -> None:
    found = findings(file, MODEL, {"GATEWAY_LISTEN": "nowhere"}, {"--workers": "many"})
    assert found == [
        "--workers: workers: is 'many'; needs: whole number (1 to 64)",
        "GATEWAY_LISTEN: listen: is 'nowhere'; needs: HOST:PORT (port 0 to 65535, 0 picks a free one)",
    ]


def test_endpoints_take_variables(file: Path) -> None:
    text = (
        "upstreams: {cpu: {endpoints: ['${T}', '${HOST:-local}:${PORT:-8001}', '${U:-u:1}']}}\ndirect: {models: all}\n"
    )
    endpoints = loaded(file, text, {"T": "t:1", "HOST": "h", "U": ""}).config.upstreams["cpu"].endpoints
    assert endpoints == ("t:1", "h:8001", "u:1")


def test_files_are_found_beside_the_config(file: Path, tmp_path: Path) -> None:
    """Wherever the process runs; and they are watched as well."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "ca.pem").write_text("pem\n" + any_authority())
    (tmp_path / "conf" / "labels.txt").write_text("cat\ndog\n")
    text = PIPELINE.replace("[triton:8001]", "[triton:8001], tls: {ca: ca.pem}").replace("k: 5", "labels: labels.txt")
    result = loaded(tmp_path / "conf" / "gateway.yaml", text)
    tls = result.config.upstreams["cpu"].tls
    assert tls is not None
    assert tls.ca == str(tmp_path / "conf" / "ca.pem")
    assert {path.name for path in result.files} == {"gateway.yaml", "ca.pem", "labels.txt"}


def test_the_digest_is_of_what_is_meant(file: Path, tmp_path: Path) -> None:
    """Comments do not change it; a value or the content of a file does."""
    (tmp_path / "ca.pem").write_text("one\n" + any_authority())
    text = MODEL.replace("[triton:8001]", "[triton:8001], tls: {ca: ca.pem}")
    first = loaded(file, text).digest
    assert loaded(file, "# a comment\n" + text + "workers: 1\n").digest == first
    assert loaded(file, text + "workers: 2\n").digest != first
    (tmp_path / "ca.pem").write_text("two\n" + any_authority())
    assert loaded(file, text).digest != first


def test_a_file_that_cannot_be_read_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    os.mkfifo("pipe")
    for name, reason in (
        ("missing.yaml", "No such file or directory"),
        ("folder", "Is a directory"),
        ("pipe", "not a regular file"),
        ("nul\0", "embedded null byte"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(name, {})
        shown = name.replace("\0", "\\x00")
        assert [str(each) for each in caught.value.findings] == [
            f"{shown}: cannot be read: {reason}; needs a readable YAML file"
        ]


def test_a_file_full_of_mistakes_does_not_flood_the_log(file: Path) -> None:
    found = findings(file, MODEL + "x: 1\n" * 1002)
    assert len(found) == 501
    assert found[-1] == "gateway.yaml:1008: and 502 more, up to here"


def test_a_huge_file_is_not_read_whole(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(10 * 2**30)
    with pytest.raises(ConfigError, match=f"at most {MAX_BYTES}"):
        load(file, {})


def test_transparent_serves_every_model_of_one_triton() -> None:
    result = transparent("triton:8001", {}, {"--listen": "0.0.0.0:9001"})
    assert result.config.upstreams["triton"].endpoints == ("triton:8001",)
    assert (result.config.direct.models, result.config.listen, result.files) == ("all", "0.0.0.0:9001", ())
    assert result.config.server.control == "none"


def test_transparent_names_the_wrong_flag() -> None:
    with pytest.raises(ConfigError) as caught:
        transparent("triton", {}, {"--listen": "x"})
    assert [str(each) for each in caught.value.findings] == [
        "--listen: listen: is 'x'; needs: HOST:PORT (port 0 to 65535, 0 picks a free one)",
        f"--triton: upstreams.triton.endpoints[0]: is 'triton'; needs: {AN_ENDPOINT}",
    ]


# Properties

NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}[a-z0-9]", fullmatch=True)
VARIANT_NAMES = st.lists(NAMES, min_size=1, max_size=4, unique=True)


@st.composite
def valid_files(draw: st.DrawFn) -> dict[str, object]:
    """Data of a valid config, with most of what can be in one."""
    upstreams = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    data: dict[str, object] = {
        "workers": draw(st.integers(1, 64)),
        "upstreams": {name: {"endpoints": [f"{name}:8001"], "probe_interval": draw(DURATIONS)} for name in upstreams},
        "direct": {"models": draw(st.sampled_from(["variants", "none"]))},
        "server": {"max_message_bytes": draw(st.integers(2**16, 2**31 - 1)), "reflection": draw(st.booleans())},
        "models": {name: draw(valid_models(upstreams)) for name in draw(VARIANT_NAMES)},
    }
    keys = draw(st.sets(st.sampled_from([key for key in data if key not in ("upstreams", "models")])))
    return {key: value for key, value in data.items() if key not in keys}


DURATIONS = st.floats(0.1, 600) | st.sampled_from(["250ms", "5s", "2m"])
CONDITIONS = st.one_of(
    st.text(max_size=5),
    st.integers(-5, 5),
    st.booleans(),
    st.lists(st.text(max_size=5), min_size=1, max_size=3),
    st.builds(lambda text: {"prefix": text}, st.text(min_size=1, max_size=5)),
    st.just({"regex": "a.*"}),
    st.just({"present": False}),
)


@st.composite
def valid_models(draw: st.DrawFn, upstreams: list[str]) -> dict[str, object]:
    names = draw(VARIANT_NAMES)
    some = st.sampled_from(names)
    model: dict[str, object] = {
        "variants": {name: {"upstream": draw(st.sampled_from(upstreams)), "model": f"t-{name}"} for name in names},
        "attempts": draw(st.integers(1, 5)),
    }
    if draw(st.booleans()):
        model["split"] = {name: draw(st.integers(1, 100) | st.floats(0.5, 10)) for name in names}
    if draw(st.booleans()):
        model["sticky"] = {draw(st.sampled_from(["metadata", "parameter"])): "x-user"}
    if draw(st.booleans()):
        model["fallback"] = draw(st.just("forbid") | st.lists(some, unique=True))
    if draw(st.booleans()):
        match = {draw(st.sampled_from(["metadata", "parameters"])): {"key": draw(CONDITIONS)}}
        model["rules"] = [{"name": "r", "match": match, "variant": draw(some)}]
    return model


@pytest.fixture(scope="module")
def shared_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "gateway.yaml"


@settings(max_examples=60, deadline=None)
@given(valid_files())
def test_a_valid_config_written_out_is_read_back_the_same(shared_file: Path, data: dict[str, object]) -> None:
    config = loaded(shared_file, json_yaml(data)).config
    again = loaded(shared_file, json_yaml(config.model_dump(mode="json", by_alias=True, exclude_unset=True)))
    assert again.config == config
    assert Config.model_validate(config.model_dump(by_alias=True, exclude_unset=True)) == config


class _Quoting(yaml.SafeDumper):
    """Quotes all texts: PyYAML writes `0E0` bare, which YAML 1.2 reads as a number."""


_Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def json_yaml(data: object) -> str:
    return yaml.dump(data, Dumper=_Quoting, sort_keys=False, allow_unicode=True)


def _paths(data: object, at: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for key, value in inner for path in [(*at, key), *_paths(value, (*at, key))]]


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["x:1", "forbid", "all"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(valid_files(), st.data())
def test_one_broken_value_is_found_at_its_own_place_or_not_at_all(
    shared_file: Path, data: dict[str, object], choose: st.DataObject
) -> None:
    """Any value of a valid file replaced by anything: taken, or refused with findings; nothing else is raised."""
    data = deepcopy(data)  # parts of what is drawn are hypothesis' own, and of other examples too
    path = choose.draw(st.sampled_from(_paths(data)))
    target: object = data
    for part in path[:-1]:
        target = target[part]  # type: ignore[index]
    target[path[-1]] = choose.draw(JUNK)  # type: ignore[index]
    shared_file.write_bytes(json_yaml(data).encode("utf-8", "surrogatepass"))
    try:
        load(shared_file, {})
    except ConfigError as error:
        assert error.findings  # noqa: PT017  (not raising is right as well)
        assert all(each.line > 0 and str(each).isprintable() for each in error.findings)  # noqa: PT017  (as above)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(list(Config.model_fields)), JUNK))
def test_any_values_under_known_keys_are_taken_or_refused(shared_file: Path, data: dict[str, object]) -> None:
    shared_file.write_bytes(json_yaml(data).encode("utf-8", "surrogatepass"))
    try:
        load(shared_file, {})
    except ConfigError as error:
        assert error.findings  # noqa: PT017  (not raising is right as well)
