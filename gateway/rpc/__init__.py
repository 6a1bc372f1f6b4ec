"""rpc (sans-IO): gRPC on `http2`, in both roles: calls, framing, metadata, status codes, deadlines.

Knows no V2 message and no socket.
"""
