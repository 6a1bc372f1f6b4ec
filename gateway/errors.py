"""Values: one class per situation in which this gateway itself ends a call; and the base of what ends a command.

Each class of the first kind carries its gRPC code. Texts are written for the caller: they name what is wrong and what
would be right, and never an address, a path or a stack. What an upstream said is passed on as `UpstreamFailed`, with
the same code and text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Final

from gateway.status import Code
from gateway.types import Served


class GatewayError(Exception):
    """Ends a call with `code` and the exception's text."""

    code: ClassVar[Code]
    is_callers: ClassVar[bool] = False  # is it the caller's fault, although the code does not say so?

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text
        self.served: Served | None = None  # who was asked last; None if no upstream was


def shown(name: str) -> str:
    """A caller's text, cut to the length at which an error repeats it: a status is a header field of limited size."""
    return name if len(name) <= 200 else name[:200] + "…"


_SECRET_PARTS: Final = re.compile(r"(://)[^\s'\"]*@|(://[^\s'\"?]*\?)[^\s'\"]+")


def without_credentials(text: str) -> str:
    """A text for logs and pages, in which URLs have neither their user and password nor their query.

    It takes out too much rather than too little: all up to a URL's last `@`, since passwords may hold anything.
    """
    if "://" not in text:
        return text
    return _SECRET_PARTS.sub(lambda found: f"{found[1]}…@" if found[1] else f"{found[2]}…", text)


# The caller's fault


class BadRequest(GatewayError):
    """The request cannot be understood or is refused as it is."""

    code = Code.INVALID_ARGUMENT


class BadInput(BadRequest):
    """An input of a pipeline or typed call is not what its step needs; the text names the input and the reason."""


class TooHeavy(BadRequest):
    """A message whose parsing would make too many objects."""


class MalformedMessage(GatewayError):
    """Bytes that are no message of their method. gRPC servers, Triton too, end such a call with INTERNAL."""

    code = Code.INTERNAL
    is_callers = True


class UnknownModel(GatewayError):
    """The caller named a model that is neither public nor callable directly. Same text as Triton's."""

    code = Code.NOT_FOUND

    def __init__(self, model: str, version: str = "") -> None:
        at = f" version {shown(version)}" if version else ""
        super().__init__(f"Request for unknown model: '{shown(model)}'{at} is not found")


class ControlRefused(GatewayError):
    """An RPC that changes a server came from a place that may not call it."""

    code = Code.PERMISSION_DENIED


class UnknownMethod(GatewayError):
    """There is no such method, or none that has a place in `access.rpcs`."""

    code = Code.UNIMPLEMENTED


class Unauthenticated(GatewayError):
    """The caller has not shown who he is, or in a way that does not count."""

    code = Code.UNAUTHENTICATED

    def __init__(self, text: str, reason: str = "none") -> None:
        """reason: one of few words, for metrics."""
        super().__init__(text)
        self.reason = reason


class Forbidden(GatewayError):
    """The caller is known, and may not call this method."""

    code = Code.PERMISSION_DENIED


class KeysAwaited(GatewayError):
    """The key that a caller's token is signed with is being fetched from its issuer."""

    code = Code.UNAVAILABLE


class DeadlineExceeded(GatewayError):
    """The caller's time was used up here."""

    code = Code.DEADLINE_EXCEEDED


# Upstream's fault


class NoTarget(GatewayError):
    """Nothing that could answer is available now."""

    code = Code.UNAVAILABLE


class SequenceLost(GatewayError):
    """The endpoint that holds a sequence's state is gone; the sequence must start again."""

    code = Code.UNAVAILABLE


class UpstreamFailed(GatewayError):
    """What an upstream answered, passed on untouched."""

    code = Code.UNKNOWN

    def __init__(self, code: Code, text: str, trailers: Sequence[tuple[str, str | bytes]] = ()) -> None:
        super().__init__(text)
        self.code = code  # type: ignore[misc]  # the one class whose code is the upstream's
        self.trailers = tuple(trailers)


# Capacity


class Overloaded(GatewayError):
    """A bounded queue, here or upstream, is full."""

    code = Code.RESOURCE_EXHAUSTED

    def __init__(self, text: str, retry_after: float = 1.0) -> None:
        """retry_after: seconds after which it may be worth trying again."""
        super().__init__(text)
        self.retry_after = retry_after


class QuotaExceeded(Overloaded):
    """The caller, the model or both have used up their quota."""

    is_callers = True  # so that it does not count as overload

    def __init__(self, text: str, retry_after: float, subject: str, reason: str, limit: str) -> None:
        """subject: whose quota it is, such as `caller:acme,model:net`.

        reason: "requests", "bytes", "rows" or "concurrent". limit: as people read it.
        """
        super().__init__(text, retry_after)
        self.subject = subject
        self.reason = reason
        self.limit = limit


# Our bug


BUG_TEXT = "The gateway failed unexpectedly; its log has the details."


class Bug(GatewayError):
    """Something unforeseen; the log has the details, the caller a fixed text."""

    code = Code.INTERNAL


# A command of the command line

INTERRUPTED: Final = 130
"""The exit code of a command that a signal ended, as shells report it for SIGINT."""


class CommandFailed(Exception):
    """Ends a command with its text, which tells users what they can mend; without a text nothing is printed."""

    exit_code: ClassVar[int] = 1


class Misused(CommandFailed):
    """The command line, or a file that it names, is wrong: the same line fails until somebody mends one of them."""

    exit_code = 2
