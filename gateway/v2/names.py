"""Names of the V2 protocol's service and of the RPCs that the gateway calls or forwards. Source: grpc_service.proto."""

from __future__ import annotations

from typing import Final

SERVICE_NAME: Final = "inference.GRPCInferenceService"
SERVICE: Final = f"/{SERVICE_NAME}/"
"""The path of every RPC begins with this; its method follows."""

INFER: Final = SERVICE + "ModelInfer"
STREAM: Final = SERVICE + "ModelStreamInfer"
