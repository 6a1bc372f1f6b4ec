"""http2 (sans-IO): RFC 9113 and RFC 7541. Bytes in, events out.

Knows no gRPC and no socket; its limits are values of a role.
"""
