"""An upstream's metadata that gRPC's own API would not send: callers get it, and what none could take is left out."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from frames import END_HEADERS, END_STREAM, Frame, Pair, Peer, block, data, headers, literal, message
from processes import Served, gateway
from tritonclient.grpc import service_pb2 as pb
from upstreams import RESPONSE, TRAILERS, TRITON, RawServer, accept_client, infer_request, infer_response, requests

CITY = "São Paulo"
HEAD: tuple[Pair, ...] = ((b"x-city", CITY.encode()), (b"x!odd", b"v"))
END: tuple[Pair, ...] = ((b"x-left", CITY.encode()), (b"x-raw", b"S\xe3o"), (b"x-bin", b"!"))


def odd(fields: tuple[Pair, ...]) -> bytes:
    return b"".join(literal(name, value) for name, value in fields)


def answer(peer: Peer, got: Frame) -> None:
    method = dict(got.fields)[":path"].rpartition("/")[2]
    bodies = {
        "ServerLive": pb.ServerLiveResponse(live=True).SerializeToString(),
        "ModelReady": pb.ModelReadyResponse(ready=True).SerializeToString(),
        "ModelInfer": infer_response("a"),
        "ModelStreamInfer": pb.ModelStreamInferResponse(
            infer_response=pb.ModelInferResponse.FromString(infer_response("a"))
        ).SerializeToString(),
    }
    end = headers(got.stream, TRAILERS + odd(END), END_HEADERS | END_STREAM)
    peer.send(headers(got.stream, RESPONSE + odd(HEAD)) + data(got.stream, message(bodies[method])) + end)


def failure(peer: Peer, got: Frame) -> None:
    if dict(got.fields)[":path"].endswith("ModelInfer"):
        status = block(((b"grpc-status", b"3"), (b"grpc-message", b"no such city")))
        peer.send(headers(got.stream, RESPONSE + status + odd(END), END_HEADERS | END_STREAM))
    else:
        answer(peer, got)


@pytest.fixture(scope="module", params=[answer, failure], ids=["answers", "fails"])
def odd_product(request: pytest.FixtureRequest) -> Iterator[tuple[Served, bool]]:
    def script(peer: Peer, number: int) -> None:
        accept_client(peer)
        for got in requests(peer):
            request.param(peer, got)

    with RawServer(script) as server, gateway(server.port) as served:
        yield served, request.param is failure


def test_a_unary_caller_gets_every_field_that_a_peer_can_take(odd_product: tuple[Served, bool]) -> None:
    served, fails = odd_product
    with grpc.insecure_channel(f"127.0.0.1:{served.port}") as channel:
        call = channel.unary_unary(f"/{TRITON}/ModelInfer")
        try:
            _, done = call.with_call(infer_request(), timeout=60)
        except grpc.RpcError as error:
            done = error
    trailing = dict(done.trailing_metadata())
    assert done.code() is (grpc.StatusCode.INVALID_ARGUMENT if fails else grpc.StatusCode.OK)
    assert (trailing["x-left"], trailing["x-raw"]) == (CITY, "São")  # as grpcio reads them
    assert "x-bin" not in trailing
    if not fails:
        initial = dict(done.initial_metadata())
        assert initial["x-city"] == CITY
        assert "x!odd" not in initial
