"""A gRPC gateway in front of NVIDIA Triton. `python -m gateway` is the command; docs/architecture.md is the map."""

import os

if os.environ.get("GATEWAY_NO_EXTENSIONS"):
    from gateway.native import ignore_native_modules

    ignore_native_modules()
