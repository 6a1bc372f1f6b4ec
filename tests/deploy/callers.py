"""Load for the rehearsal: calls through every way to the gateways, of which none may fail."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import numpy as np
from network_policies import OURS, Peer, allowed
from rehearsal import Cluster, calling
from tritonclient.grpc import service_pb2 as pb

INFER = "/inference.GRPCInferenceService/ModelInfer"


def image() -> bytes:
    message = pb.ModelInferRequest(model_name="imagenet")
    message.inputs.add(name="image", datatype="FP32", shape=[1, 3, 224, 224])
    message.raw_input_contents.append(np.zeros((1, 3, 224, 224), np.float32).tobytes())
    return bytes(message.SerializeToString())


class Callers:
    """Calls through the Service's one address, and among the pods that its headless twin lists."""

    def __init__(self, cluster: Cluster, channels: AsyncExitStack, authority: bytes | None) -> None:
        self.ended: Counter[str] = Counter()
        self._cluster = cluster
        self._channels = channels
        self._credentials = authority and grpc.ssl_channel_credentials(authority)
        self._open: dict[str, grpc.aio.Channel] = {}
        self._image = image()

    async def _call(self, key: str, address: str) -> None:
        if key not in self._open:
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500)]
            if self._credentials:
                options.append(("grpc.ssl_target_name_override", "inference-gateway"))  # localhost is not in it
                channel = grpc.aio.secure_channel(address, self._credentials, options)
            else:
                channel = grpc.aio.insecure_channel(address, options)
            self._open[key] = await self._channels.enter_async_context(channel)
        try:
            answer = await self._open[key].unary_unary(INFER)(self._image, timeout=60)
            self.ended["OK" if pb.ModelInferResponse.FromString(answer).raw_output_contents else "empty"] += 1
        except grpc.aio.AioRpcError as error:
            self.ended[f"{error.code().name}: {error.details()}"] += 1

    async def by_service(self) -> None:
        await self._call("service", self._cluster.services["inference-gateway"].address)

    async def among_pods(self) -> None:
        address = self._cluster.services["inference-gateway-headless"].pick()
        await self._call(address, address)


@asynccontextmanager
async def under_load(cluster: Cluster, authority: bytes | None = None) -> AsyncIterator[Callers]:
    """Calls all the while, of which none may fail; no pod may be restarted for it, nor reach whom it must not.

    authority: whom the callers trust, where gateways speak TLS.
    """
    async with AsyncExitStack() as channels:
        callers = Callers(cluster, channels, authority)
        async with calling([callers.by_service, callers.among_pods], pause=0.05):
            await asyncio.sleep(1)
            assert_policies_allow_what_is_connected(cluster)
            yield callers
            await asyncio.sleep(1)
            assert_policies_allow_what_is_connected(cluster)
    assert callers.ended.keys() == {"OK"}, callers.ended
    assert callers.ended["OK"] > 30
    assert not [pod.name for pods in cluster.pods.values() for pod in pods if pod.restarts]


def assert_policies_allow_what_is_connected(cluster: Cluster) -> None:
    """Each connection that a pod holds is one that the overlay's NetworkPolicies would have let it open."""
    pods = {pod.name: pod for pods in cluster.pods.values() for pod in pods}
    upstreams = set()
    for source, target, port in cluster.connections():
        if target in pods:
            peer = Peer(OURS, pods[target].labels, template=pods[target].template)
            upstreams.add(target)
        else:
            peer = Peer.elsewhere(target.split(".")[1])
        mine = Peer(OURS, pods[source].labels, template=pods[source].template)
        assert allowed(cluster.objects, mine, peer, port), (source, target, port)
    assert upstreams, "a gateway holds a connection to each Triton"
