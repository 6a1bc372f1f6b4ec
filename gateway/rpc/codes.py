"""What HTTP and HTTP/2 codes mean as gRPC status, and the failure that ends one call.

Sources: grpc `doc/http-grpc-status-mapping.md`, `doc/PROTOCOL-HTTP2.md` (section "Errors").
"""

from __future__ import annotations

from typing import Final

from gateway.http2.frames import ErrorCode
from gateway.status import Code

_BY_HTTP: Final = {
    400: Code.INTERNAL,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.UNIMPLEMENTED,
    429: Code.UNAVAILABLE,
    431: Code.INTERNAL,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.UNAVAILABLE,
}

_BY_RESET: Final = {
    ErrorCode.REFUSED_STREAM: Code.UNAVAILABLE,
    ErrorCode.CANCEL: Code.CANCELLED,
    ErrorCode.ENHANCE_YOUR_CALM: Code.RESOURCE_EXHAUSTED,
    ErrorCode.INADEQUATE_SECURITY: Code.PERMISSION_DENIED,
}

_CODES: Final = {str(int(code)).encode(): code for code in Code}


class CallFailed(Exception):
    """Ends one call with a status; its connection lives on."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def from_http(status: bytes) -> Code:
    """The status of a response without grpc-status, by its HTTP status."""
    return _BY_HTTP.get(int(status), Code.UNKNOWN) if status.isdigit() else Code.UNKNOWN


def from_reset(error_code: int) -> Code:
    """The status of a stream that RST_STREAM ended, by its error code."""
    return _BY_RESET.get(ErrorCode(error_code), Code.INTERNAL) if error_code <= max(ErrorCode) else Code.INTERNAL


def from_field(value: bytes) -> Code:
    """The code that `grpc-status` names; UNKNOWN if there is none such."""
    return _CODES.get(value, Code.UNKNOWN)
