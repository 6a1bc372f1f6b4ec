"""A gRPC gateway in front of NVIDIA Triton. `python -m gateway` is the command; docs/architecture.md is the map."""

import os

from gateway.native import ignore_native_modules, ignore_stale_modules

if os.environ.get("GATEWAY_NO_EXTENSIONS"):
    ignore_native_modules()
else:
    ignore_stale_modules()
