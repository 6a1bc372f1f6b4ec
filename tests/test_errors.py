"""Every error that ends a call has a status, a text for the caller, and survives the way to the wire."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

import gateway
from gateway.api.calls import with_errors
from gateway.api.parts import AnswerError
from gateway.errors import GatewayError, QuotaExceeded, UnknownModel, UpstreamFailed, without_credentials
from gateway.forwarding.pipelines import CallRefused
from gateway.status import Code
from gateway.steps.step import BadTensor, StepFailed

MADE_OTHERWISE = {
    UnknownModel: lambda: UnknownModel("m", "3"),
    UpstreamFailed: lambda: UpstreamFailed(Code.ABORTED, "text", (("k", "v"),)),
    AnswerError: lambda: AnswerError(Code.ABORTED, "text"),
    QuotaExceeded: lambda: QuotaExceeded("text", 0.5, "caller:acme", "requests", "10 requests per second"),
    BadTensor: lambda: BadTensor("image", "empty", 2),
    StepFailed: lambda: StepFailed("decode", "ValueError"),
    CallRefused: lambda: CallRefused("p", "m", UnknownModel("m")),
}


def _subclasses(of: type[GatewayError]) -> Iterator[type[GatewayError]]:
    yield of
    for sub in of.__subclasses__():
        yield from _subclasses(sub)


def _all_errors() -> list[type[GatewayError]]:
    for module in pkgutil.walk_packages(gateway.__path__, "gateway."):
        runs_in_triton = any(room in module.name for room in (".triton.backends", ".models.programs."))
        if not runs_in_triton and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    ours = (cls for cls in _subclasses(GatewayError) if cls.__module__.startswith("gateway."))
    return sorted(set(ours) - {GatewayError}, key=lambda cls: cls.__name__)


def _make(cls: type[GatewayError]) -> GatewayError:
    make = MADE_OTHERWISE.get(cls)
    return make() if make else cls("text")


@pytest.fixture(scope="module")
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    """To a server that raises the error whose class it is sent the name of."""

    async def fail(body: bytes, context: Any) -> bytes:
        raise _make(next(cls for cls in _all_errors() if cls.__name__ == body.decode()))

    method = grpc.unary_unary_rpc_method_handler(with_errors(fail))
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Errors", {"Raise": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


@pytest.mark.parametrize("cls", _all_errors())
async def test_every_error_reaches_its_caller_with_its_status(
    channel: grpc.aio.Channel, cls: type[GatewayError]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/test.Errors/Raise")(cls.__name__.encode())
    got, error = caught.value, _make(cls)
    assert got.code().value[0] == error.code != Code.OK
    assert got.details() == error.text != ""
    if isinstance(error, UpstreamFailed):
        assert set(error.trailers) <= set(got.trailing_metadata() or ())


@pytest.mark.parametrize("cls", _all_errors())
def test_every_error_says_when_it_is_raised(cls: type[GatewayError]) -> None:
    assert cls.__doc__


def test_an_unknown_models_text_is_tritons_and_its_length_bounded() -> None:
    assert str(UnknownModel("m")) == "Request for unknown model: 'm' is not found"
    assert str(UnknownModel("m", "9")) == "Request for unknown model: 'm' version 9 is not found"
    assert len(str(UnknownModel("m" * 100_000, "9" * 100_000))) < 600


def test_an_upstreams_code_does_not_leak_into_the_next() -> None:
    first, second = UpstreamFailed(Code.ABORTED, "a"), UpstreamFailed(Code.INTERNAL, "b")
    assert (first.code, second.code, UpstreamFailed.code) == (Code.ABORTED, Code.INTERNAL, Code.UNKNOWN)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("kept in s3://key:secret@bucket/x: no", "kept in s3://…@bucket/x: no"),
        ("'ftp://user:p@ss/word@host:1/x'", "'ftp://…@host:1/x'"),
        ("https://store/x?sig=secret and more", "https://store/x?… and more"),
        ("http://a/x, http://user@b/y", "http://a/x, http://…@b/y"),
        ("dns:///triton:8001", "dns:///triton:8001"),
        ("a@b ?c=d", "a@b ?c=d"),
    ],
)
def test_a_url_is_shown_without_its_credentials(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
