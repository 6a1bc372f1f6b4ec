"""transport (I/O): the asyncio edge of `rpc`: a gRPC listener and dialer on one event loop, callbacks where bytes pass.

May import `rpc`, values, asyncio, ssl, and of `grpc` the vocabulary of generated servicers (StatusCode, handlers).
"""
