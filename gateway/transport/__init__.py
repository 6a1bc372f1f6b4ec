"""I/O room, the asyncio edge of `wire`: a gRPC server and channel on one event loop, callbacks where bytes pass.

May import `wire`, values, asyncio, ssl, and of `grpc` the vocabulary (StatusCode, AioRpcError, Metadata, handlers).
"""
