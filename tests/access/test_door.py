"""The door: what a header list says is found out once, and anew when anything that it depends on changes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from gateway.access.api_keys import ApiKey, ApiKeys, hash_of
from gateway.access.certificates import Certificates
from gateway.access.door import Door, DoorSettings
from gateway.access.policy import Grant, Names, Policy
from gateway.access.principal import Principal
from gateway.access.rpcs import named_by
from gateway.errors import Forbidden, GatewayError, Unauthenticated
from gateway.rpc.requests import RequestHead

KEY = "igk_user"
INFER = b"/inference.GRPCInferenceService/ModelInfer"
CONFIG = b"/inference.GRPCInferenceService/ModelConfig"


def head(path: bytes = INFER, *fields: tuple[bytes, bytes]) -> RequestHead:
    return RequestHead(path, fields, b"", b"", None)


def with_key(path: bytes = INFER, *more: tuple[bytes, bytes]) -> RequestHead:
    return head(path, (b"x-api-key", KEY.encode()), *more)


def settings(keys: tuple[ApiKey, ...] = (ApiKey("user", hash_of(KEY)),), **more: Any) -> DoorSettings:
    grant = Grant(everybody=True, public=Names.of(["m"]), rpcs=named_by(["inference"]))
    return DoorSettings(Policy((grant,), {"user": frozenset({"team"})}), ApiKeys(keys), **more)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_equal_lists_are_asked_once_and_get_the_same_head() -> None:
    door, asked = Door(settings(), Clock()), with_key()
    entry = door.enter(asked, None)
    assert door.enter(asked, None) is entry
    assert entry.access.principal == Principal("user", frozenset({"team"}), "api_key")
    assert entry.access.scope.covers("m", True)
    assert not entry.access.scope.covers("n", True)


def test_credentials_and_names_that_only_the_gateway_gives_end_at_the_door() -> None:
    door = Door(settings(tell_upstream=b"x-caller"), Clock())
    sent = with_key(INFER, (b"x-caller", b"admin"), (b"gateway-caller", b"admin"), (b"x-other", b"1"))
    assert door.enter(sent, None).head.fields == ((b"x-other", b"1"), (b"x-caller", b"user"))
    passes = Door(settings(forward_credentials=True), Clock())
    assert passes.enter(with_key(), None).head.fields == ((b"x-api-key", KEY.encode()),)


def test_a_name_is_a_legal_field_upstream_whatever_an_issuer_calls_it() -> None:
    keys = (ApiKey("Zoë 100%\u2028", hash_of(KEY)),)
    door = Door(settings(keys, tell_upstream=b"x-caller"), Clock())
    assert door.enter(with_key(), None).head.fields == ((b"x-caller", b"Zo%C3%AB%20100%25%E2%80%A8"),)


@pytest.mark.parametrize("path", [INFER, CONFIG, b"/no/Such", INFER.lower(), b"/" + INFER, b""])
def test_who_is_not_known_learns_nothing_of_methods(path: bytes) -> None:
    with pytest.raises(Unauthenticated, match="say who is calling"):
        Door(settings(), Clock()).enter(head(path), None)


def test_a_known_caller_is_told_what_is_not_for_him_and_what_there_is_not() -> None:
    door = Door(settings(), Clock())
    with pytest.raises(Forbidden, match="ModelConfig"):
        door.enter(with_key(CONFIG), None)
    for path in (b"/no/Such", INFER.lower(), b"/" + INFER, INFER.replace(b"M", b"%4D")):
        with pytest.raises(GatewayError, match="Method not found!") as refused:
            door.enter(with_key(path), None)
        assert refused.value.code == 12


def test_a_change_of_the_config_counts_for_lists_that_are_known_and_for_calls_that_last() -> None:
    door, asked = Door(settings(), Clock()), with_key()
    access = door.enter(asked, None).access
    assert access.renewed() is access
    door.apply(settings((ApiKey("user", hash_of("another")),)), None)
    with pytest.raises(Unauthenticated):
        door.enter(asked, None)
    with pytest.raises(Unauthenticated):
        access.renewed()


def test_an_expired_key_opens_nothing_although_its_list_is_known() -> None:
    clock = Clock()
    door, asked = Door(settings((ApiKey("user", hash_of(KEY), until=1010.0),)), clock), with_key()
    access = door.enter(asked, None).access
    clock.now = 1010.0
    for ask in (lambda: door.enter(asked, None), access.renewed):
        with pytest.raises(Unauthenticated, match="expired"):
            ask()


def certificate(name: str) -> dict[str, Any]:
    return {"subjectAltName": (("URI", f"spiffe://example.org/{name}"),), "notAfter": "Jan  1 00:00:00 2100 GMT"}


def test_equal_lists_on_connections_with_different_certificates_are_different_callers() -> None:
    door, asked = Door(settings(certificates=Certificates()), Clock()), head()
    one, other = certificate("one"), certificate("other")
    names = [door.enter(asked, shown).access.name for shown in (one, other, one)]
    assert names == ["spiffe://example.org/one", "spiffe://example.org/other", "spiffe://example.org/one"]
    assert door.enter(asked, one) is door.enter(asked, one)
    with pytest.raises(Unauthenticated):
        door.enter(asked, None)
    assert door.enter(with_key(), one).access.name == "user"  # what the call itself shows


def test_what_callers_choose_is_remembered_in_bounded_tables() -> None:
    grant = Grant(everybody=True, rpcs=named_by(["inference"]))
    door = Door(
        DoorSettings(Policy((grant,), {}), ApiKeys(()), certificates=Certificates(), takes_tokens=True),
        Clock(),
        Principal,
    )
    for number in range(2000):
        door.enter(head(INFER, (b"authorization", b"Bearer a.b.%d" % number)), None)
        door.enter(head(), certificate(str(number)))
    assert len(door._tokens) <= 1024
    assert len(door._callers) <= 1024
    assert len(door._with_certificates) <= 1024


def test_what_is_found_out_goes_with_the_list_although_nothing_collects_cycles() -> None:
    gc.disable()
    try:
        door, asked = Door(settings(), Clock()), with_key()
        gone = weakref.ref(asked_access(door, asked))
        del asked
        assert gone() is None
    finally:
        gc.enable()


def asked_access(door: Door, asked: RequestHead) -> Any:
    """Something that only the list itself keeps."""

    class Mark: ...

    entry = door.enter(asked, None)
    mark = entry.head.derived = Mark()
    return mark


def test_a_token_is_checked_once_for_all_lists_that_have_it_until_it_expires() -> None:
    checked = []

    def read(token: str) -> Principal:
        checked.append(token)
        return Principal("someone", until=1010.0)

    clock = Clock()
    door = Door(settings(takes_tokens=True), clock, read)
    for number in range(3):
        door.enter(head(INFER, (b"authorization", b"Bearer a.b.c"), (b"x-id", b"%d" % number)), None)
    assert checked == ["a.b.c"]
    clock.now = 1010.0
    with pytest.raises(Unauthenticated, match="expired"):
        door.enter(head(INFER, (b"authorization", b"bearer a.b.c")), None)
    door.forget()
    assert door.enter(head(INFER, (b"authorization", b"Bearer a.b.c")), None).access.name == "someone"


def test_health_is_told_to_everybody_unless_the_config_says_otherwise() -> None:
    health = b"/grpc.health.v1.Health/Check"
    assert not Door(settings(), Clock()).enter(head(health), None).access.scope.covers("m", True)
    assert Door(settings(), Clock()).enter(head(health, (b"x-api-key", b"wrong")), None).access.name == ""
    assert Door(settings(), Clock()).enter(with_key(health), None).access.scope.covers("m", True)
    closed = Door(settings(open_probes=False), Clock())
    for path in (health, b"/inference.GRPCInferenceService/ServerLive"):
        for shown in (head(path), head(path, (b"x-api-key", b"wrong"))):
            with pytest.raises(Unauthenticated):
                closed.enter(shown, None)
        assert closed.enter(with_key(path), None).access.name == "user"
