"""Upstreams for the gateway under attack: a fake Triton on grpcio, and servers made of raw bytes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
from frames import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    Frame,
    Peer,
    block,
    data,
    headers,
    message,
    ping,
    settings,
)
from tritonclient.grpc import service_pb2 as pb

TRITON = "inference.GRPCInferenceService"
INFER = f"/{TRITON}/ModelInfer".encode()


def infer_request(model: str = "m", id_: str = "", size: int = 4) -> bytes:
    tensor = pb.ModelInferRequest.InferInputTensor(name="IN", datatype="UINT8", shape=[size])
    message_ = pb.ModelInferRequest(model_name=model, id=id_, inputs=[tensor], raw_input_contents=[bytes(size)])
    return bytes(message_.SerializeToString())


def infer_response(model: str, id_: str = "", size: int = 0) -> bytes:
    tensor = pb.ModelInferResponse.InferOutputTensor(name="OUT", datatype="UINT8", shape=[size])
    answer = pb.ModelInferResponse(model_name=model, id=id_, outputs=[tensor], raw_output_contents=[bytes(size)])
    return bytes(answer.SerializeToString())


class FakeTriton:
    """Answers probes, and ModelInfer with the request's id; if that is a number, with so many bytes."""

    def __init__(self) -> None:
        self.executions = 0
        self.connections: set[str] = set()  # the peers that have called

    def live(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        return bytes(pb.ServerLiveResponse(live=True).SerializeToString())

    def ready(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        return bytes(pb.ModelReadyResponse(ready=True).SerializeToString())

    def infer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.executions += 1
        self.connections.add(context.peer())
        asked = pb.ModelInferRequest.FromString(request)
        return infer_response(asked.model_name, asked.id, int(asked.id) if asked.id.isdigit() else 0)

    @contextmanager
    def served(self) -> Iterator[int]:
        server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        methods = {
            "ServerLive": self.live,
            "ServerReady": self.live,
            "ModelReady": self.ready,
            "ModelInfer": self.infer,
        }
        server.add_registered_method_handlers(
            TRITON, {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield port
        finally:
            server.stop(0).wait()


RESPONSE = block(((b":status", b"200"), (b"content-type", b"application/grpc")))
TRAILERS = block(((b"grpc-status", b"0"),))


def reply(stream: int, body: bytes) -> bytes:
    """A good unary answer."""
    return headers(stream, RESPONSE) + data(stream, message(body)) + headers(stream, TRAILERS, END_HEADERS | END_STREAM)


def raw_triton(peer: Peer, got: Frame) -> None:
    """Answer a request as a Triton with every model would."""
    method = dict(got.fields)[":path"].rpartition("/")[2]
    answers = {
        "ServerLive": pb.ServerLiveResponse(live=True).SerializeToString(),
        "ModelReady": pb.ModelReadyResponse(ready=True).SerializeToString(),
        "ModelInfer": infer_response("a"),
        "ModelConfig": pb.ModelConfigResponse().SerializeToString(),
    }
    peer.send(reply(got.stream, answers[method]))


class RawServer:
    """Plays a script on each connection, in a thread of its own. The script gets the connection's number, from 0."""

    def __init__(self, script: Callable[[Peer, int], None]) -> None:
        self._script = script
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._peers: list[Peer] = []
        self._threads: list[threading.Thread] = []
        self.port: int = self._socket.getsockname()[1]
        self.connections = 0

    def __enter__(self) -> RawServer:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for peer in self._peers:
            try:
                peer.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # gone before us
        for thread in self._threads:
            thread.join()
        for peer in self._peers:
            peer.sock.close()

    def _start(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            peer, number = Peer(sock), self.connections
            self._peers.append(peer)
            self.connections += 1
            self._start(lambda peer=peer, number=number: self._play(peer, number))  # type: ignore[misc]

    def _play(self, peer: Peer, number: int) -> None:
        try:
            self._script(peer, number)
        except OSError:
            return  # the client has gone, or is silent for long


def accept_client(peer: Peer, values: tuple[tuple[int, int], ...] = ()) -> None:
    """The server's half of the greeting."""
    if peer.take(len(PREFACE), 5.0) != PREFACE:
        raise ConnectionError("the client went away before it greeted")
    peer.send(settings(values))


def requests(peer: Peer, seconds: float = 30.0) -> Iterator[Frame]:
    """The HEADERS of each request, once it is whole; answers PINGs. Ends when the client does."""
    heads: dict[int, Frame] = {}
    while (got := peer.read(seconds)) is not None:
        if got.kind == PING and not got.flags & ACK:
            peer.send(ping(got.payload, ACK))
        if got.kind == HEADERS:
            heads.setdefault(got.stream, got)
        if got.kind in (HEADERS, DATA) and got.flags & END_STREAM and got.stream in heads:
            yield heads.pop(got.stream)
