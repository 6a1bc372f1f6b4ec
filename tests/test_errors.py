"""Every error that ends a call has a status, a text for the caller, and survives the way to the wire."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import grpc
import pytest

import gateway
from gateway.errors import GatewayError, UnknownModel, UpstreamFailed
from gateway.server.calls import abort
from gateway.stages.step import BadTensor
from gateway.status import Code

MADE_OTHERWISE = {
    UnknownModel: lambda: UnknownModel("m", "3"),
    UpstreamFailed: lambda: UpstreamFailed(Code.ABORTED, "text", (("k", "v"),)),
    BadTensor: lambda: BadTensor("image", "empty", 2),
}


def _subclasses(of: type[GatewayError]) -> Iterator[type[GatewayError]]:
    yield of
    for sub in of.__subclasses__():
        yield from _subclasses(sub)


def _all_errors() -> list[type[GatewayError]]:
    for module in pkgutil.walk_packages(gateway.__path__, "gateway."):
        if ".triton.backends" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    return sorted(set(_subclasses(GatewayError)) - {GatewayError}, key=lambda cls: cls.__name__)


def _make(cls: type[GatewayError]) -> GatewayError:
    make = MADE_OTHERWISE.get(cls)
    return make() if make else cls("text")


@pytest.mark.parametrize("cls", _all_errors())
async def test_every_error_becomes_its_grpc_status(cls: type[GatewayError]) -> None:
    class Context:
        """Notes how a call was ended; grpc.aio's own can be made by a server only."""

        async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: object) -> None:
            self.ended = (code, details, trailing_metadata)

    context, error = Context(), _make(cls)
    await abort(context, error)
    code, details, trailing = context.ended
    assert code.value[0] == error.code
    assert code is not grpc.StatusCode.OK
    assert details == error.text == str(error) != ""
    assert trailing == (error.trailers if isinstance(error, UpstreamFailed) else ())


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
