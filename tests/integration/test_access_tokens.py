"""JWTs: real ones of a real issuer, its keys as it changes them, and attacks. Certificates that name callers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from access_gateways import CountingTriton, closed_gateway, counting, request
from aiohttp import web
from certificates import Authority, Files
from joserfc import jwt as jose
from joserfc.jwk import ECKey, KeySet, OKPKey, RSAKey
from patience import ask_until
from tritonclient.grpc import service_pb2 as pb
from v2_calls import channel_to

from gateway import key_fetching
from gateway.app import Gateway

INFER = "/inference.GRPCInferenceService/ModelInfer"
AUDIENCE = "inference"


async def infer(channel: grpc.aio.Channel, token: str) -> tuple[str, str]:
    """The status and its text."""
    call = channel.unary_unary(INFER, pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString)
    try:
        await call(request("adder"), metadata=(("authorization", f"Bearer {token}"),), timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


class Provider:
    """An issuer whose tokens joserfc signs, on a real HTTP server that counts how often its keys are fetched."""

    def __init__(self) -> None:
        self.keys = [RSAKey.generate_key(2048, {"kid": "rsa-1", "use": "sig"}, auto_kid=False)]
        self.extra: list[dict[str, Any]] = []
        self.url = ""
        self.fetched = 0
        self.is_away = False
        self.configuration: Any = None  # what is published in place of the right one
        self.instead: Any = None  # of keys

    async def _configuration(self, _: web.Request) -> web.Response:
        return web.json_response(self.configuration or {"issuer": self.url, "jwks_uri": f"{self.url}/keys"})

    async def _jwks(self, _: web.Request) -> web.Response:
        self.fetched += 1
        if self.is_away:
            return web.Response(status=503)
        if self.instead is not None:
            return web.json_response(self.instead)
        keys = KeySet([*self.keys]).as_dict(private=False)
        return web.json_response({"keys": [*keys["keys"], *self.extra]})

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[Provider]:
        app = web.Application()
        app.add_routes(
            [web.get("/.well-known/openid-configuration", self._configuration), web.get("/keys", self._jwks)]
        )
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    def token(self, key: Any = None, alg: str = "RS256", header: dict[str, Any] | None = None, **claims: Any) -> str:
        key = key or self.keys[0]
        now = int(time.time())
        default = {"iss": self.url, "aud": AUDIENCE, "sub": "ada", "exp": now + 300, "iat": now, "groups": ["vision"]}
        said = {name: value for name, value in {**default, **claims}.items() if value is not None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that EdDSA has another name since RFC 9864
            return str(jose.encode({"alg": alg, "kid": key.kid, **(header or {})}, said, key, algorithms=[alg]))


def access_for(issuer: str, more: str = "") -> str:
    return f"""
access:
  jwt:
    - issuer: {issuer}
      audience: [{AUDIENCE}]
      algorithms: [RS256, ES256, EdDSA]
      groups: groups
      leeway: 1s{more}
  grants:
    - {{groups: [vision], models: [adder]}}
"""


@pytest.fixture(scope="module")
async def triton() -> AsyncIterator[CountingTriton]:
    async with counting() as upstream:
        yield upstream


@pytest.fixture(scope="module")
async def provider() -> AsyncIterator[Provider]:
    async with Provider().serve() as serving:
        serving.keys.append(ECKey.generate_key("P-256", {"kid": "ec-1", "use": "sig"}, auto_kid=False))
        serving.keys.append(OKPKey.generate_key("Ed25519", {"kid": "ed-1", "use": "sig"}, auto_kid=False))
        serving.keys.append(RSAKey.generate_key(2048, {"kid": "for-encryption", "use": "enc"}, auto_kid=False))
        yield serving


@pytest.fixture(scope="module")
async def gateway(
    provider: Provider, triton: CountingTriton, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    access = access_for(provider.url)
    async with closed_gateway(tmp_path_factory.mktemp("tokens"), triton, access) as running:
        yield running


@pytest.fixture(scope="module")
async def channel(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    async with channel_to(gateway.listen) as opened:
        yield opened


@pytest.mark.parametrize(("number", "alg"), [(0, "RS256"), (1, "ES256"), (2, "EdDSA")])
async def test_a_token_of_the_issuer_opens_what_its_groups_are_granted(
    channel: grpc.aio.Channel, provider: Provider, number: int, alg: str
) -> None:
    assert await infer(channel, provider.token(provider.keys[number], alg)) == ("OK", "")
    other = provider.token(provider.keys[number], alg, groups=["audio"])
    assert (await infer(channel, other))[0] == "PERMISSION_DENIED"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def changed(token: str, **header: Any) -> str:
    """The token with another header and its old signature."""
    head, payload, signature = token.split(".")
    known = json.loads(base64.urlsafe_b64decode(head + "=="))
    return f"{b64(json.dumps({**known, **header}).encode())}.{payload}.{signature}"


def attacks(provider: Provider) -> Iterator[tuple[str, str]]:
    """Tokens that must not count, by what they try."""
    rsa, good, now = provider.keys[0], provider.token(), int(time.time())
    head, payload, signature = good.split(".")
    stranger = RSAKey.generate_key(2048, {"kid": "rsa-1"}, auto_kid=False)
    yield "no signature", f"{head}.{payload}."
    yield "alg none", changed(good, alg="none")
    yield "alg none without signature", changed(good, alg="none").rpartition(".")[0] + "."
    yield "alg NONE", changed(good, alg="NoNe")
    signed = changed(good, alg="HS256").rpartition(".")[0]
    for secret in (rsa.as_pem(private=False), rsa.as_der(private=False), b""):  # joserfc itself refuses to do this
        mac = hmac.digest(secret, signed.encode(), "sha256")
        yield f"HMAC by the public key {secret[:20]!r}", f"{signed}.{b64(mac)}"
    yield "another's key with a known kid", provider.token(stranger)
    yield "a key in the token", provider.token(stranger, header={"jwk": stranger.as_dict(private=False)})
    yield "a key elsewhere", provider.token(stranger, header={"jku": "http://127.0.0.1:1/keys"})
    yield "another algorithm", provider.token(alg="RS512")
    yield "the algorithm of another key", changed(good, alg="ES256")
    sealing = RSAKey.import_key(provider.keys[3].as_pem(private=True), {"kid": "for-encryption"})
    yield "a key for encryption", provider.token(sealing)
    yield "kid with a path", changed(good, kid="../../etc/passwd")
    yield "kid that is no text", changed(good, kid=["rsa-1"])
    yield "crit", changed(good, crit=["x"], x=1)
    yield "expired", provider.token(exp=now - 10)
    yield "no expiry", provider.token(exp=None)
    yield "no claims", f"{head}.{b64(b'{}')}.{signature}"
    yield "not yet", provider.token(nbf=now + 100)
    yield "issued in the future", provider.token(iat=now + 100)
    yield "another audience", provider.token(aud="billing")
    yield "no audience", provider.token(aud=None)
    yield "an audience like ours", provider.token(aud=AUDIENCE + "2")
    yield "another issuer", provider.token(iss="https://evil.example.com")
    yield "an issuer like ours", provider.token(iss=provider.url + "/")
    yield "no issuer", provider.token(iss=None)
    yield "no name", provider.token(sub="")
    yield "a name that is none", provider.token(sub="ada\nadmin")
    yield "a name that is too long", provider.token(sub="a" * 300)
    yield "groups that are no list", provider.token(groups={"vision": True})
    yield (
        "changed claims",
        f"{head}.{b64(base64.urlsafe_b64decode(payload + '==').replace(b'ada', b'eve'))}.{signature}",
    )
    yield "garbage", "a.b.c"
    yield "dots", ".."
    yield "deep JSON", f"{b64(b'[' * 4000)}.{payload}.{signature}"
    yield "deep claims", f"{head}.{b64(b'[' * 4000)}.{signature}"
    yield "an expiry that no number holds", provider.token(exp=10**400)
    yield "huge numbers", f"{head}.{b64(b'{' + b'%cexp%c:' % (34, 34) + b'9' * 5000 + b'}')}.{signature}"


async def test_no_attack_on_a_token_gets_through(
    channel: grpc.aio.Channel, provider: Provider, triton: CountingTriton
) -> None:
    fetched = provider.fetched
    for what, token in attacks(provider):
        code, text = await infer(channel, token)
        assert code in ("UNAUTHENTICATED", "UNAVAILABLE"), (what, code, text)
        assert token not in text
    assert provider.fetched - fetched <= 1, "what tokens name may not make the gateway ask without end"
    assert await infer(channel, provider.token()) == ("OK", "")


async def test_a_token_that_expires_ends_with_it_although_it_was_checked(
    channel: grpc.aio.Channel, provider: Provider
) -> None:
    for seconds in (1, 4, 16):  # and 1 s of leeway; on a busy machine it may have expired before it was used
        token = provider.token(exp=int(time.time()) + seconds)
        found = await infer(channel, token)
        if found == ("OK", ""):
            break
    assert found == ("OK", "")
    found = await ask_until(lambda: infer(channel, token), lambda found: found[0] != "OK")
    assert found == ("UNAUTHENTICATED", "the token has expired")


async def test_a_new_key_is_fetched_when_a_token_names_it_and_one_that_is_gone_counts_no_more(
    triton: CountingTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_fetching, "LEAST_SECONDS", 0.5)
    async with (
        Provider().serve() as issuer,
        closed_gateway(tmp_path, triton, access_for(issuer.url)) as running,
        channel_to(running.listen) as channel,
    ):
        old = issuer.token()
        assert await infer(channel, old) == ("OK", "")
        issuer.keys[:] = [RSAKey.generate_key(2048, {"kid": "rsa-2"}, auto_kid=False)]
        await asyncio.sleep(0.6)
        new, fetched = issuer.token(), issuer.fetched
        assert await infer(channel, new) == (
            "UNAVAILABLE", "the keys of the token's issuer are being fetched; try again"
        )  # fmt: skip
        await ask_until(lambda: infer(channel, new), lambda found: found[0] == "OK")
        assert issuer.fetched == fetched + 1
        assert (await infer(channel, old))[0] in ("UNAUTHENTICATED", "UNAVAILABLE")
        issuer.is_away = True  # then the keys that are known stay
        await asyncio.sleep(0.6)
        await infer(channel, issuer.token(RSAKey.generate_key(2048, {"kid": "rsa-3"}, auto_kid=False)))
        await asyncio.sleep(0.2)
        assert await infer(channel, issuer.token()) == ("OK", "")


async def test_tokens_wait_for_an_issuer_that_is_away_at_the_start(
    triton: CountingTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_fetching, "_RETRY_SECONDS", 0.1)
    async with Provider().serve() as issuer:
        issuer.is_away = True
        async with (
            closed_gateway(tmp_path, triton, access_for(issuer.url)) as running,
            channel_to(running.listen) as channel,
        ):
            assert (await infer(channel, issuer.token()))[0] == "UNAVAILABLE"
            issuer.is_away = False
            await ask_until(lambda: infer(channel, issuer.token()), lambda found: found[0] == "OK")


async def test_an_issuer_that_published_nonsense_is_asked_again(
    triton: CountingTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(key_fetching, "_RETRY_SECONDS", 0.02)
    async with Provider().serve() as issuer:
        issuer.configuration = ["no", "configuration"]
        async with (
            closed_gateway(tmp_path, triton, access_for(issuer.url)) as running,
            channel_to(running.listen) as channel,
        ):
            assert (await infer(channel, issuer.token()))[0] == "UNAVAILABLE"
            issuer.configuration = None
            odd: list[Any] = [["no key set"], "text", 5, {"keys": {}}, {"keys": [5, {"kty": "RSA", "n": 5}]}]
            for issuer.instead in odd:
                fetched, end = issuer.fetched, time.monotonic() + 60
                while issuer.fetched < fetched + 2:
                    assert time.monotonic() < end
                    await asyncio.sleep(0.01)
            issuer.instead = None
            await ask_until(lambda: infer(channel, issuer.token()), lambda found: found[0] == "OK")
    assert "unforeseen" not in caplog.text


async def test_keys_beyond_those_that_are_kept_are_told_and_only_those_that_sign_count(
    triton: CountingTriton, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Provider().serve() as issuer:
        [key] = KeySet([*issuer.keys]).as_dict(private=False)["keys"]
        sealing = [{**key, "kid": f"e{number}", "use": "enc"} for number in range(150)]
        others = [{**key, "kid": f"s{number}"} for number in range(120)]
        issuer.instead = {"keys": [*sealing, key, *others]}
        async with (
            closed_gateway(tmp_path, triton, access_for(issuer.url)) as running,
            channel_to(running.listen) as channel,
        ):
            assert await infer(channel, issuer.token()) == ("OK", "")
            assert (await infer(channel, issuer.token(header={"kid": "s98"})))[0] == "OK"
            assert (await infer(channel, issuer.token(header={"kid": "s119"})))[0] != "OK"
    assert "publishes too many keys: 21 are left out" in caplog.text


async def test_keys_in_a_file_do_as_well_and_are_followed(triton: CountingTriton, tmp_path: Path) -> None:
    issuer = Provider()
    issuer.url = "https://issuer.example.com"

    def write() -> None:
        (tmp_path / "jwks.json").write_text(json.dumps(KeySet([*issuer.keys]).as_dict(private=False)))

    write()
    access = access_for(issuer.url, "\n      jwks_file: jwks.json\n      prefix: 'idp:'").replace(
        "vision", "idp:vision"
    )
    async with closed_gateway(tmp_path, triton, access) as running, channel_to(running.listen) as channel:
        old = issuer.token()
        assert await infer(channel, old) == ("OK", "")
        issuer.keys[:] = [RSAKey.generate_key(2048, {"kid": "rsa-1"}, auto_kid=False)]
        write()
        await running._watcher.look(poked=True)
        assert await infer(channel, issuer.token()) == ("OK", "")
        assert (await infer(channel, old))[0] == "UNAUTHENTICATED"


@pytest.mark.filterwarnings("ignore")  # the provider's and its libraries' own
async def test_an_openid_connect_provider_works_as_it_is(triton: CountingTriton, tmp_path: Path) -> None:
    """Discovery, keys and tokens are the provider's own: an ID token that it gave a client for a user."""
    from authlib.integrations.requests_client import OAuth2Session  # noqa: PLC0415
    from oidc_provider_mock import run_server_in_thread  # noqa: PLC0415

    with run_server_in_thread() as server:
        url = f"http://localhost:{server.server_port}"

        def log_in() -> str:
            client = OAuth2Session("my-client", "secret", redirect_uri="https://example.com/", scope="openid")
            authorize, _ = client.create_authorization_url(f"{url}/oauth2/authorize", nonce="n")
            answer = client.request("POST", authorize, data={"sub": "ada"}, withhold_token=True, allow_redirects=False)
            token = client.fetch_token(f"{url}/oauth2/token", authorization_response=answer.headers["location"])
            return str(token["id_token"])

        token = await asyncio.to_thread(log_in)
        access = f"""
access:
  jwt: [{{issuer: "{url}", audience: [my-client]}}]
  grants: [{{callers: [ada], models: [adder]}}]
"""
        async with closed_gateway(tmp_path, triton, access) as running, channel_to(running.listen) as channel:
            assert await infer(channel, token) == ("OK", "")


# Certificates


def credentials(files: Files | None, authority: Files) -> grpc.ChannelCredentials:
    if files is None:
        return grpc.ssl_channel_credentials(Path(authority.ca).read_bytes())
    return grpc.ssl_channel_credentials(
        Path(files.ca).read_bytes(), Path(files.key).read_bytes(), Path(files.certificate).read_bytes()
    )


async def test_a_certificate_names_its_caller_and_others_may_come_without_one(
    triton: CountingTriton, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    server = authority.issue("localhost")
    web_client = authority.issue("web", names="URI:spiffe://example.org/ns/vision/sa/web")
    other = authority.issue("other", names="URI:spiffe://example.org/ns/other/sa/x")
    double = authority.issue("double", names="URI:spiffe://example.org/ns/vision/sa/web,URI:spiffe://example.org/b")
    access = """
access:
  certificates: {trust_domain: example.org}
  grants:
    - {callers: ["spiffe://example.org/ns/vision/sa/web"], models: [adder]}
"""
    pair = f"cert: {server.certificate}, key: {server.key}"
    tls = f"server: {{tls: {{{pair}, client_ca: {server.ca}, client_certificate: optional}}}}"
    async with closed_gateway(tmp_path, triton, access, tls) as running:
        port = running.listen.rpartition(":")[2]
        found = []
        for files in (web_client, other, double, None):
            async with grpc.aio.secure_channel(f"localhost:{port}", credentials(files, server)) as channel:
                call = channel.unary_unary(INFER, pb.ModelInferRequest.SerializeToString)
                try:
                    await call(request("adder"), timeout=10)
                    found.append("OK")
                except grpc.aio.AioRpcError as error:
                    found.append(error.code().name)
        assert found == ["OK", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAUTHENTICATED"]
