"""I/O: the listening side on the gateway's own transport, `forward`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.forward.server import ForwardMethod, WireServer
from gateway.server.grpcio import CannotServe, Register, ServerSettings
from gateway.wire.limits import Limits


class WireListener:
    """A server as `GrpcioServer` is one, with some methods forwarded as bytes."""

    def __init__(
        self, settings: ServerSettings, services: Sequence[Register], forward: Mapping[str, ForwardMethod]
    ) -> None:
        """forward: by full method path; these win over services."""
        self._settings = settings
        self._server = WireServer(forward, Limits(message_bytes=settings.max_message_bytes))
        for register in services:
            register(self._server)
        self.port = 0

    async def start(self) -> None:
        """:raises CannotServe: if the address is taken or not ours."""
        listen = self._settings.listen
        try:
            self.port = self._server.listen(listen, reuse_port=self._settings.share_port)
        except OSError as error:
            raise CannotServe(
                f"cannot listen on {listen}: {error.strerror}; stop what uses it or choose another with --listen"
            ) from error
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Take no more calls, give those in flight `grace` seconds, then cut them."""
        await self._server.stop(grace)
