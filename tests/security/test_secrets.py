"""Secrets come in in many places, and out in none: everything that a whole gateway writes is searched for them.

Each secret is a text of its own, so that a failure tells which one came out, and where.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml
from aiohttp import web
from certificates import Authority, Files, read
from command_line import Command, command, descendants, free_address
from joserfc import jwt as jose
from joserfc.jwk import RSAKey
from receiver import receiving
from traffic import until, until_readyz
from tritonclient.grpc import service_pb2 as pb
from v2_calls import Outcome, call, infer, stream
from v2_gateways import Script

from gateway.access.api_keys import hash_of
from gateway.config import ConfigError, load
from gateway.v1 import prediction_pb2

BEARER, COOKIE, API_KEY, BINARY = "bearer-a8f1c2", "cookie-b7e2d3", "key-c6d3e4", "binary-d5c4f5"
OTLP_HEADER, OTLP_URL, STORE_URL, WRONG_URL = "otlp-e4b5a6", "otlp-url-f3a6b7", "store-a2f7c8", "wrong-b1e8d9"
QUERY, HEADER, RAW = "query-c0d9ea", "header-d9cafb", "raw-e8bb0c"
SECRETS = (BEARER, COOKIE, API_KEY, BINARY, OTLP_HEADER, OTLP_URL, STORE_URL, WRONG_URL, QUERY, HEADER, RAW)

CREDENTIALS: Sequence[tuple[str, str | bytes]] = (
    ("authorization", f"Bearer {BEARER}"),
    ("cookie", f"session={COOKIE}"),
    ("x-api-key", API_KEY),
    ("x-token-bin", BINARY.encode()),
)


@dataclass
class Written:
    """All that came out, by where."""

    places: dict[str, list[bytes]] = field(default_factory=dict)

    def add(self, place: str, what: str | bytes) -> None:
        self.places.setdefault(place, []).append(what.encode() if isinstance(what, str) else what)

    def with_a(self, secret: bytes) -> list[str]:
        forms = (secret, base64.b64encode(secret).rstrip(b"="), secret.hex().encode())
        return [place for place, texts in self.places.items() if any(form in text for text in texts for form in forms)]


class Setting:
    """A gateway of two workers with TLS, traces, a store for captured requests and a Triton that fails as told."""

    def __init__(self, folder: Path, files: Files, triton: str, otlp: str) -> None:
        self.files = files
        self.listen = free_address()
        self.file = folder / "gateway.yaml"
        self.captured = folder / "captured"
        kept = {"share": 1, "metadata": ["x-user"]}
        self.content: dict[str, Any] = {
            "listen": self.listen,
            "admin": {"listen": "127.0.0.1:0"},
            "workers": 2,
            "server": {"tls": {"cert": files.certificate, "key": files.key}, "reflection": True},
            "telemetry": {
                "access_log": {"sample": 1},
                "capture": [
                    {"model": "good", "directory": str(self.captured), **kept},
                    {"model": "bad", "directory": f"ftp://user:{STORE_URL}@127.0.0.1:1/kept", **kept},
                ],
            },
            "upstreams": {"main": {"endpoints": [triton]}, "gone": {"endpoints": ["${GONE}"]}},
            "models": {
                name: {"variants": {"only": {"upstream": "gone" if name == "gone" else "main", "model": name}}}
                for name in ("good", "bad", "slow", "gone")
            },
        }
        self.environ = {
            "GONE": "127.0.0.1:1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.replace("//", f"//user:{OTLP_URL}@"),
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{OTLP_HEADER}",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "OTEL_TRACES_SAMPLER": "parentbased_always_on",
        }
        self.write(self.content)

    def write(self, content: dict[str, Any]) -> None:
        self.file.write_text(yaml.safe_dump(content))

    @contextlib.asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        trusted = grpc.ssl_channel_credentials(read(self.files.ca))
        options = [("grpc.ssl_target_name_override", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.secure_channel(self.listen, trusted, options) as channel:
            yield channel


async def answered(body: bytes, context: Any) -> bytes:
    """A Triton that does what the model's name says."""
    request = pb.ModelInferRequest.FromString(body)
    if request.model_name == "bad":
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape for input 'IN'")
    if request.model_name == "slow":
        await asyncio.sleep(5)
    return bytes(pb.ModelInferResponse(model_name=request.model_name, model_version="1").SerializeToString())


async def refused_spans(written: Written, request: web.Request) -> web.Response:
    """Every other batch of spans, so that the exporter has something to say."""
    written.add("traces", await request.read())
    even = len(written.places["traces"]) % 2 == 0
    return web.Response(status=403 if even else 200, content_type="application/x-protobuf")


async def calls_of_every_kind(setting: Setting, written: Written) -> None:
    def heard(outcome: Outcome) -> None:
        written.add("answers", repr((outcome.text, outcome.initial, outcome.trailing)))

    async with setting.channel() as channel:
        for name in ("good", "bad", "slow", "gone", "nobody"):
            heard(await call(channel, infer(name), metadata=CREDENTIALS, timeout=0.4 if name == "slow" else 60))
        heard(await call(channel, b"\xff\xff", metadata=CREDENTIALS))
        for method in ("ServerLive", "ModelReady", "ModelConfig", "RepositoryIndex", "LogSettings", "NoSuchMethod"):
            heard(await call(channel, b"", method, metadata=CREDENTIALS))
        for extra in (("x-odd", "a" * 20_000 + RAW), ("grpc-timeout", RAW), ("x-ok", "\xff" + RAW)):
            with contextlib.suppress(Exception):  # the client itself may refuse to send it
                heard(await call(channel, infer("good"), metadata=[*CREDENTIALS, extra]))
        streaming = stream(channel, CREDENTIALS)
        for name in ("good", "nobody", "bad"):
            await streaming.write(infer(name))
        await streaming.done_writing()
        with contextlib.suppress(grpc.aio.AioRpcError):
            while (answer := await streaming.read()) is not grpc.aio.EOF:
                written.add("answers", answer.SerializeToString())
        predict = channel.unary_unary("/gateway.v1.PredictionService/Predict")
        for model in ("good", "nobody"):
            body = prediction_pb2.PredictRequest(model=model).SerializeToString()
            try:
                written.add("answers", await predict(body, metadata=CREDENTIALS, timeout=60))
            except grpc.aio.AioRpcError as error:
                written.add("answers", repr(error))


async def bytes_by_hand(address: str, sent: bytes, tls: ssl.SSLContext | None = None) -> bytes:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(
        host, int(port), ssl=tls, server_hostname="localhost" if tls else None
    )
    try:
        writer.write(sent)
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError, OSError):
            return await asyncio.wait_for(reader.read(65_536), 0.5)
        return b""
    finally:
        writer.close()


async def odd_bytes(setting: Setting, admin: str, written: Written) -> None:
    """What no library would send: requests that are broken just at a secret."""
    trusted = ssl.create_default_context(cafile=setting.files.ca)
    trusted.set_alpn_protocols(["h2"])
    raw = RAW.encode()
    requests = [
        b"GET /state?token=" + raw + b" HTTP/1.1\r\nAuthorization: Bearer " + raw + b"\r\n\r\n",
        b"GET /" + raw + b" HTTX\r\n\r\n",
        b"GET / HTTP/1.1\r\nAuthorization: Bearer " + raw + b"\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nAuthorization " + raw + b"\r\n\r\n",
    ]
    head = b"\x83\x87\x04\x02/x\x01\x01a\x00\x0dauthorization" + bytes([len(raw) + 1]) + raw + b"\0"
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
    frame = len(head).to_bytes(3, "big") + b"\x01\x05\0\0\0\x01" + head
    for request in requests:
        await bytes_by_hand(admin, request)  # aiohttp tells the sender which of his own bytes are wrong
        written.add("answers", await bytes_by_hand(setting.listen, request))
    for request in (*requests, preface + frame, preface + raw * 10):
        written.add("answers", await bytes_by_hand(setting.listen, request, trusted))


async def all_of_the_admin_plane(admin: str, written: Written) -> None:
    secret = {"Authorization": f"Bearer {HEADER}", "Cookie": f"a={HEADER}"}
    async with aiohttp.ClientSession(headers=secret) as session:
        for path in ("/", "/metrics", "/state", "/config", "/healthz", "/readyz", "/no-such-page", "/page.js"):
            for method in ("GET", "POST", "HEAD"):
                async with session.request(method, f"http://{admin}{path}?token={QUERY}") as answer:
                    written.add(f"admin {path}", repr(answer.headers) + await answer.text())


async def reloads(setting: Setting, running: Command, written: Written) -> None:
    """Configs that are refused, each with a secret just where it is wrong."""
    url = f"ftp://user:{WRONG_URL}@127.0.0.1:1/kept"
    for number, (key, value) in enumerate(
        [
            ("listen", url),
            ("upstreams", {"main": {"endpoints": [url, f"http://{WRONG_URL}@host"]}}),
            ("telemetry", {"capture": [{"model": "good", "directory": url, "share": url}]}),
            ("telemetry", {"capture": [{"model": url, "directory": url}], url: 1}),
            ("server", {"tls": {"cert": setting.files.key, "key": setting.files.certificate}}),
        ]
    ):
        setting.write({**setting.content, key: value})
        os.kill(running.pid, signal.SIGHUP)
        await until(lambda n=number: running.errors.count("gateway.yaml") > n, 120, "a refusal")
    setting.file.write_text(f"upstreams: [&{WRONG_URL} ! {url} : '")
    with pytest.raises(ConfigError) as refused:
        load(setting.file, {})
    written.add("findings", str(refused.value))


def listed_processes(running: Command) -> list[bytes]:
    """What `ps` shows of the gateway's processes."""
    return [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (running.pid, *descendants(running.pid))]


def read_files(logs: Path, captured: Path, written: Written) -> None:
    for file in logs.iterdir():
        written.add(f"log {file.suffix}", file.read_bytes())
    for file in captured.iterdir():
        written.add("captures", file.read_bytes())


@pytest.mark.timeout(600)
async def test_no_secret_comes_out_whatever_happens(tmp_path: Path) -> None:
    written = Written()
    authority = Authority(tmp_path)
    files = authority.issue("localhost")
    out = tmp_path / "out"
    out.mkdir()
    async with (
        Script(answered).serve() as triton,
        receiving("/v1/traces", partial(refused_spans, written)) as otlp,
    ):
        setting = Setting(tmp_path, files, triton, otlp)
        arguments = ("serve", "--config", str(setting.file), "--log-level", "debug")
        async with command(*arguments, folder=out, environ=setting.environ) as running:
            _, admin = await running.until_serving()
            await until_readyz(admin, True, within=120)
            await calls_of_every_kind(setting, written)
            await odd_bytes(setting, admin, written)
            await all_of_the_admin_plane(admin, written)
            await until(lambda: "nothing of bad is kept in" in running.errors, 120, "a store that is away")
            await until(lambda: written.places.get("traces"), 120, "spans")
            await calls_of_every_kind(setting, written)
            await until(lambda: len(written.places["traces"]) >= 2, 120, "spans of the later calls, which are refused")
            await reloads(setting, running, written)
            await all_of_the_admin_plane(admin, written)
            for line in listed_processes(running):
                written.add("ps", line)
            running.signal(signal.SIGTERM)
            await running.wait()
    read_files(out, setting.captured, written)
    keys = [line for line in read(files.key).splitlines() if len(line) > 40 and b"-" not in line]
    assert keys
    for place in ("admin /metrics", "admin /state", "answers", "traces", "captures", "log .out", "log .err", "ps"):
        assert sum(map(len, written.places[place])) > 50, place
    found = {str(secret): places for secret in (*map(str.encode, SECRETS), *keys) if (places := written.with_a(secret))}
    assert not found


KNOWN_KEY, FILE_KEY, WRONG_KEY, ADMIN_TOKEN, WRONG_TOKEN = (f"igk_{name}-f0a9b8c7d6" for name in "abcde")
QUOTA_PASSWORD, EVIDENCE_PASSWORD, UNIT_KEY = "quota-c7b6a5", "evidence-d8c7b6", "unit-key-e9d8c7b6a5"
USAGE_PASSWORD, ISSUER_PASSWORD, ISSUER_QUERY = "usage-f0e9d8", "issuer-a1f0e9", "query-b2a1f0"
WRITTEN_WRONG = ("pass/word-c3b2a1", "word#pass-d4c3b2", "secret-e5d4c3", "hash-f6e5d4")
OF_ACCESS = (
    *(KNOWN_KEY, FILE_KEY, WRONG_KEY, ADMIN_TOKEN, WRONG_TOKEN, QUOTA_PASSWORD, EVIDENCE_PASSWORD, UNIT_KEY),
    *(USAGE_PASSWORD, ISSUER_PASSWORD, ISSUER_QUERY, *WRITTEN_WRONG, "word-c3b2a1"),
)


class Guarded(Setting):
    """The same with callers of every kind, quotas in a store, evidence in a database and an admin plane with tokens."""

    def __init__(self, folder: Path, files: Files, triton: str, otlp: str) -> None:
        self.issuer_key = RSAKey.generate_key(2048, {"kid": "k", "use": "sig"}, auto_kid=False)
        super().__init__(folder, files, triton, otlp)
        (folder / "jwks.json").write_text(json.dumps({"keys": [self.issuer_key.as_dict(private=False)]}))
        (folder / "keys.txt").write_text(f"bob {hash_of(FILE_KEY).hex()}\n")
        away = f"http://user:{ISSUER_PASSWORD}@127.0.0.1:1/keys?token={ISSUER_QUERY}"
        self.content |= {
            "admin": {"listen": "127.0.0.1:0", "tokens": [hash_of(ADMIN_TOKEN).hex()]},
            "access": {
                "api_keys": [{"caller": "ada", "sha256": hash_of(KNOWN_KEY).hex()}],
                "api_key_file": "keys.txt",
                "jwt": [
                    {"issuer": "https://here", "audience": ["a"], "jwks_file": "jwks.json", "prefix": "here:"},
                    {"issuer": "https://away", "audience": ["a"], "jwks": away, "prefix": "away:"},
                ],
                "grants": [
                    {"callers": ["ada"], "models": ["*"], "rpcs": ["inference", "metadata", "details", "outcomes"]},
                    {"everybody": True, "models": ["good"]},
                ],
                "tell_upstream": "x-caller",
            },
            "quotas": {
                "default": {"requests": 5, "models": {"bad": {"requests": 0.01}}},
                "shared": {"url": f"redis://user:{QUOTA_PASSWORD}@127.0.0.1:1/0"},
                "usage": {"directory": f"ftp://user:{USAGE_PASSWORD}@127.0.0.1:1/used", "interval": "1s"},
            },
            "store": {"url": f"postgresql://user:{EVIDENCE_PASSWORD}@127.0.0.1:1/evidence", "unit_key": UNIT_KEY},
            "experiments": {
                "trial": {
                    "model": "good",
                    "arms": {"only": 1, "other": 1},
                    "outcomes": {"bought": {"kind": "binary", "better": "higher"}},
                    "primary": "bought",
                    "smallest_effect": "5%",
                    "units": 100,
                }
            },
        }
        only = self.content["models"]["good"]["variants"]["only"]
        self.content["models"]["good"] = {
            "variants": {"only": only, "other": {**only, "model": "better"}}, "sticky": {"metadata": "x-user"}
        }  # fmt: skip
        self.write(self.content)

    def token(self, **claims: Any) -> str:
        now = int(time.time())
        said = {"iss": "https://here", "aud": "a", "sub": "eve", "exp": now + 300, **claims}
        return str(jose.encode({"alg": "RS256", "kid": "k"}, said, self.issuer_key))

    def wrong_ones(self) -> list[dict[str, Any]]:
        """Configs that are refused, each with a secret where it is wrong."""
        access, quotas = self.content["access"], self.content["quotas"]
        jwt = access["jwt"][1]
        return [
            {"quotas": {**quotas, "shared": {"url": f"redis://user:{WRITTEN_WRONG[0]}@127.0.0.1:1/0", "period": 0}}},
            {"quotas": {**quotas, "shared": {"url": f"http://user:{WRITTEN_WRONG[1]}@127.0.0.1:1/0"}}},
            {"access": {**access, "api_keys": [{"caller": "ada", "sha256": WRITTEN_WRONG[3]}]}},
            {"access": {**access, "jwt": [{**jwt, "jwks": f"http://user:{WRITTEN_WRONG[2]}@elsewhere/keys"}]}},
            {"admin": {"listen": "127.0.0.1:0", "tokens": [WRITTEN_WRONG[3]]}},
            {"store": {"url": f"mysql://user:{WRITTEN_WRONG[2]}@host/x", "unit_key": UNIT_KEY}},
        ]


async def calls_of_callers(setting: Guarded, tokens: Sequence[str], written: Written) -> None:
    """By every way to say who is calling, right and wrong; more than the quotas let in."""
    by_key = [(("x-api-key", key),) for key in (KNOWN_KEY, FILE_KEY, WRONG_KEY)]
    by_bearer = [(("authorization", f"Bearer {token}"),) for token in (KNOWN_KEY, WRONG_KEY, *tokens)]
    both = [*by_key[0], *by_bearer[1]]
    async with setting.channel() as channel:
        for credentials in (*by_key, *by_bearer, both, (("authorization", f"Basic {WRONG_KEY}"),)):
            for name in ("good", "bad", "bad", "gone", "nobody"):
                outcome = await call(channel, infer(name), metadata=[*credentials, ("x-user", "u")], timeout=60)
                written.add("answers", repr((outcome.text, outcome.initial, outcome.trailing)))
            for method in ("ModelConfig", "LogSettings", "NoSuchMethod"):
                outcome = await call(channel, b"", method, metadata=credentials)
                written.add("answers", repr((outcome.text, outcome.initial, outcome.trailing)))
            streaming = stream(channel, credentials)
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                for name in ("good", "nobody", "bad"):
                    await streaming.write(infer(name))
                await streaming.done_writing()
                while (answer := await streaming.read()) is not grpc.aio.EOF:
                    written.add("answers", answer.SerializeToString())


async def admin_plane_by_token(admin: str, written: Written) -> None:
    async with aiohttp.ClientSession() as session:
        for token in (ADMIN_TOKEN, WRONG_TOKEN):
            basic = base64.b64encode(f"me:{token}".encode()).decode()
            for path in ("/", "/metrics", "/state", "/config"):
                for scheme in (f"Bearer {token}", f"Basic {basic}"):
                    headers = {"Authorization": scheme}
                    async with session.get(f"http://{admin}{path}?token={token}", headers=headers) as answer:
                        written.add(f"admin {path}", repr(answer.headers) + await answer.text())


async def commands_about_it(setting: Guarded, admin: str, key_file: Path, written: Written) -> None:
    """What the command says of a config that is good, and of those that are not."""
    files = [setting.file]
    for number, wrong in enumerate(setting.wrong_ones()):
        files.append(setting.file.with_name(f"wrong-{number}.yaml"))
        files[-1].write_text(yaml.safe_dump({**setting.content, **wrong}))
    asked = [["check", str(file)] for file in files]
    asked.append(["explain", str(setting.file), "--as", "ada", "--model", "good", "--admin", admin])
    captured = [str(file) for file in setting.captured.iterdir()]
    asked.append(["replay", *captured, "--to", setting.listen, "--key-file", str(key_file)])
    for arguments in asked:
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-m", "gateway", *arguments], capture_output=True, check=False,
            env={**os.environ, **setting.environ},
        )  # fmt: skip
        assert b"Traceback" not in done.stderr, (arguments, done.stderr)
        written.add(f"command {arguments[0]}", done.stdout + done.stderr)


@pytest.mark.timeout(600)
async def test_no_credential_of_access_comes_out_whoever_shows_it_and_wherever_it_is_written(tmp_path: Path) -> None:
    """Keys, tokens and passwords: in calls, in the config, in configs that are wrong, on the admin plane."""
    written = Written()
    files = Authority(tmp_path).issue("localhost")
    out, key_file = tmp_path / "out", tmp_path / "key"
    out.mkdir()
    key_file.write_text(KNOWN_KEY)
    async with (
        Script(answered).serve() as triton,
        receiving("/v1/traces", partial(refused_spans, written)) as otlp,
    ):
        setting = Guarded(tmp_path, files, triton, otlp)
        tokens = [setting.token(), setting.token(exp=1), setting.token(iss="https://away"), setting.token(sub="")]
        tokens.append(setting.token() + "x")
        arguments = ("serve", "--config", str(setting.file), "--log-level", "debug")
        async with command(*arguments, folder=out, environ=setting.environ) as running:
            await running.until_said("admin on")
            _, admin = await running.until_serving()
            await until_readyz(admin, True, within=120)
            await until(lambda: "the store of quotas is away" in running.errors, 120, "the store of quotas")
            await until(lambda: "could not be fetched" in running.errors, 120, "the keys of an issuer")
            await calls_of_callers(setting, tokens, written)
            await admin_plane_by_token(admin, written)
            await commands_about_it(setting, admin, key_file, written)
            await until(lambda: len(written.places.get("traces", ())) >= 1, 120, "spans")
            for number, wrong in enumerate(setting.wrong_ones()):
                setting.write({**setting.content, **wrong})
                os.kill(running.pid, signal.SIGHUP)
                await until(lambda n=number: running.errors.count("new config is refused") > n, 120, "a refusal")
            await admin_plane_by_token(admin, written)
            for line in listed_processes(running):
                written.add("ps", line)
            running.signal(signal.SIGTERM)
            await running.wait()
    read_files(out, setting.captured, written)
    for place in ("admin /metrics", "admin /state", "admin /config", "answers", "traces", "log .out", "log .err", "ps"):
        assert sum(map(len, written.places[place])) > 50, place
    parts = [part for token in tokens for part in token.split(".") if len(part) > 40]
    found = {secret: places for secret in (*OF_ACCESS, *parts) if (places := written.with_a(secret.encode()))}
    assert not found
