"""Triton and the systems under test in front of it: started in order, ended together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from perf import gateways, models, null, peers
from perf.children import Child, NotStarted, Ports
from perf.gateways import Config
from perf.peers import Peer
from perf.sink import Sink
from perf.summary import DIRECT, GATEWAY, MERGING, NULL, SHARING


@dataclass(frozen=True, slots=True)
class System:
    """Something that answers for Triton's models.

    child: None for Triton itself. public: by the gateway's names? served: how many requests it has answered, if Triton
    does not get them.
    """

    name: str
    address: str
    child: Child | None
    public: bool = False
    served: Callable[[], int] | None = None

    def name_of(self, model: str) -> str:
        return gateways.PUBLIC[model] if self.public else model

    def cpu_seconds(self) -> float:
        return self.child.cpu_seconds() if self.child else 0.0


class Stack:
    """`with` starts Triton; everything else is started when it is asked for, and ends with it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.triton: Child
        self.ports = Ports()
        self.sink = Sink()
        self.peers: Sequence[Peer] = ()
        self._entered = ExitStack()

    def __enter__(self) -> Stack:
        with ExitStack() as entered:
            self.peers = peers.found()
            ports = (self.ports.take(), self.ports.take(), self.ports.take())
            repository = models.build(self.work / "models")
            self.triton = entered.enter_context(gateways.triton(repository, self.work, ports))
            until_ready(self.triton.address, models.ALL)
            entered.enter_context(self.sink)
            self._entered = entered.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    def direct(self) -> System:
        return System(DIRECT, self.triton.address, None)

    def peer(self, peer: Peer, *, triton: int | None = None, into: ExitStack | None = None) -> System:
        """triton: a port to use in place of Triton's. into: what ends it earlier than this stack."""
        folder = self.work / f"{peer.name}-{triton or 'x'}"
        folder.mkdir(exist_ok=True)
        child = (into or self._entered).enter_context(peer.start(folder, self.ports.take(), triton or self.triton.port))
        until_ready(child.address, [models.TINY_A])
        return System(peer.name, child.address, child)

    def null(self, nginx: str) -> System:
        """What answers at once. nginx: the program."""
        folder = self.work / "null"
        folder.mkdir(exist_ok=True)
        ports = (self.ports.take(), self.ports.take())
        child = self._entered.enter_context(null.null_server(nginx, folder, ports, self.triton.port))
        until_ready(child.address, [models.TINY_A])
        return System(NULL, child.address, child, served=partial(null.answered, ports[1]))

    def gateway(self, name: str = GATEWAY, *, config: Config | None = None, into: ExitStack | None = None) -> System:
        """name: if it is not the usual one."""
        config = config or gateways.config(self.triton.port)
        ports = (self.ports.take(), self.ports.take())
        file = name.replace(" ", "-")
        child = (into or self._entered).enter_context(
            gateways.gateway(config, file, self.work, ports, self.sink.endpoint)
        )
        until_ready(child.address, [gateways.TINY])
        return System(name, child.address, child, public=True)

    def systems(self, wanted: Sequence[str] = ()) -> list[System]:
        """Those that are wanted, or everything that is here.

        :raises NotStarted: if one that is wanted is not here.
        """
        nginx = peers.installed("nginx")
        start: dict[str, Callable[[], System]] = {
            DIRECT: self.direct,
            **({NULL: partial(self.null, nginx)} if nginx else {}),
            **{peer.name: partial(self.peer, peer) for peer in self.peers},
            GATEWAY: self.gateway,
            MERGING: self.merging,
            SHARING: self.sharing,
        }
        missing = [name for name in wanted if name not in start]
        if missing:
            raise NotStarted(f"not installed: {', '.join(missing)}")
        return [begin() for name, begin in start.items() if not wanted or name in wanted]

    def merging(self) -> System:
        """The gateway that puts small requests together."""
        return self.gateway(MERGING, config=gateways.config(self.triton.port, merge=True))

    def sharing(self) -> System:
        """The gateway that lays large tensors into memory that it shares with Triton."""
        return self.gateway(SHARING, config=gateways.config(self.triton.port, shared="128MiB"))


def until_ready(address: str, names: Sequence[str], seconds: float = 60.0) -> None:
    """:raises NotStarted: if a model is not ready in time."""
    give_up = time.monotonic() + seconds
    with InferenceServerClient(address) as client:
        while not all(_is_ready(client, name) for name in names):
            if time.monotonic() > give_up:
                raise NotStarted(f"{', '.join(names)} at {address} not ready within {seconds:g} s")
            time.sleep(0.1)


def _is_ready(client: InferenceServerClient, model: str) -> bool:
    try:
        return bool(client.is_model_ready(model))
    except (InferenceServerException, grpc.RpcError):
        return False
