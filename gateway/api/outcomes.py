"""The typed API's OutcomeService: reports of what became of units → rows for the store."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from gateway.access.door import Access
from gateway.api.calls import CallLimits, Context, add_handlers, request_from, with_errors
from gateway.api.typed import stream_handler
from gateway.errors import BadRequest, GatewayError, MalformedMessage, Overloaded, shown
from gateway.experiments.plan import Kind, OutcomeSpec
from gateway.forwarding.exchange import Request
from gateway.forwarding.exposures import short
from gateway.status import Code
from gateway.store import OutcomeRow
from gateway.v1 import outcomes_pb2

_MOST: Final = 1000  # outcomes of one request
_MOST_BYTES: Final = 1 << 20  # of one request, which is parsed on the event loop
_LONGEST_ID: Final = 200
_CLOCK_SKEW: Final = 300.0  # seconds that a report may be ahead of this machine's clock
_WAIT_SECONDS: Final = 2.0  # for the store
_PART_OF_TIME: Final = 0.8  # of the caller's, which is spent on that


class UnknownOutcome(GatewayError):
    """No experiment asks for it."""

    code = Code.NOT_FOUND


Asked: TypeAlias = Mapping[str, Mapping[str, OutcomeSpec]]
"""What experiments ask for, by name and experiment."""


class OutcomeSink(Protocol):
    """Takes what was reported."""

    asked: Asked
    models: Mapping[str, str]
    """The public model of each experiment."""

    async def record(self, rows: Sequence[OutcomeRow], seconds: float) -> bool | None:
        """Have them written. Returns whether they were, within these seconds; None if there was no room."""
        ...


class OutcomeService:
    """Report and ReportStream."""

    def __init__(self, sink: OutcomeSink, limits: CallLimits, wall: Callable[[], float] = time.time) -> None:
        self._sink = sink
        self._limits = limits
        self._wall = wall
        self.Report = with_errors(self._report)
        self.ReportStream = stream_handler(self._answer, outcomes_pb2.ReportStreamResponse, limits, _read_streamed)

    async def _report(self, body: bytes, context: Context) -> Any:
        request = _read(body, outcomes_pb2.ReportRequest)
        return await self._answer(request, request_from(context, b"", "Report", self._limits))

    async def _answer(self, request: Any, opening: Request) -> Any:
        sink, access = self._sink, opening.metadata.access
        asked = sink.asked if access is None else _asked_of(access, sink.asked, sink.models)
        rows = rows_of(request.outcomes, asked, self._wall())
        if access is not None:
            rows = _for_his(rows, asked, sink.asked)
        seconds = _WAIT_SECONDS
        if opening.deadline is not None:
            seconds = min(seconds, _PART_OF_TIME * opening.deadline.remaining(time.monotonic()))
        stored = await self._sink.record(rows, seconds) if rows else True
        if stored is None:
            raise Overloaded("Too many records of experiments wait to be written; report it again later.")
        return outcomes_pb2.ReportResponse(stored=stored)


def add_outcome_service(service: OutcomeService, server: Any) -> None:
    """As grpcio's generated function, but that requests stay bytes until their size was looked at.

    server: a gateway.transport server.
    """
    handlers = {
        "Report": grpc.unary_unary_rpc_method_handler(
            service.Report, response_serializer=outcomes_pb2.ReportResponse.SerializeToString
        ),
        "ReportStream": grpc.stream_stream_rpc_method_handler(
            service.ReportStream, response_serializer=outcomes_pb2.ReportStreamResponse.SerializeToString
        ),
    }
    add_handlers(server, "gateway.v1.OutcomeService", handlers)


def _read(body: bytes, message: type[Any]) -> Any:
    if len(body) > _MOST_BYTES:
        raise BadRequest(f"the request has {len(body)} bytes; report at most {_MOST_BYTES} at once")
    try:
        return message.FromString(body)
    except DecodeError as error:
        raise MalformedMessage("The request message can't be parsed") from error


async def _read_streamed(body: bytes) -> Any:
    return _read(body, outcomes_pb2.ReportStreamRequest)


def _asked_of(access: Access, asked: Asked, models: Mapping[str, str]) -> Asked:
    """What experiments on the models that a caller may use ask for; there are no others for him."""
    his = {experiment for experiment, model in models.items() if access.scope.covers(model, is_public=True)}
    limited = {name: {each: spec for each, spec in specs.items() if each in his} for name, specs in asked.items()}
    return {name: specs for name, specs in limited.items() if specs}


def _for_his(rows: list[OutcomeRow], asked: Asked, all_asked: Asked) -> list[OutcomeRow]:
    """Rows that name no experiment count for all that ask; so one for each that is the caller's, if some are not."""
    found: list[OutcomeRow] = []
    for row in rows:
        if row.experiment or len(asked[row.name]) == len(all_asked[row.name]):
            found.append(row)
        else:  # told again they have the same ids
            found += [
                row._replace(report_id=f"{row.report_id} {each}", experiment=each)
                for each, spec in asked[row.name].items()
                if not spec.measure
            ]
    return found


def rows_of(outcomes: Sequence[Any], asked: Asked, now: float) -> list[OutcomeRow]:
    """Rows for the store.

    outcomes: messages. asked: by name and experiment. now: Unix time.

    :raises BadRequest: if one can't be what is asked for.
    :raises UnknownOutcome: if no experiment asks for it.
    """
    if len(outcomes) > _MOST:
        raise BadRequest(f"the request has {len(outcomes)} outcomes; report at most {_MOST} at once")
    return [_row(f"outcomes[{index}]", outcome, asked, now) for index, outcome in enumerate(outcomes)]


def _row(where: str, outcome: Any, asked: Asked, now: float) -> OutcomeRow:
    specs = asked.get(outcome.name, {})
    if outcome.experiment:
        specs = {name: spec for name, spec in specs.items() if name == outcome.experiment}
    if not specs:
        whose = f"experiment '{shown(outcome.experiment)}'" if outcome.experiment else "no experiment"
        asks = "does not ask" if outcome.experiment else "asks"
        raise UnknownOutcome(f"{where}: {whose} {asks} for '{shown(outcome.name)}'; known: {_known(asked)}")
    reported = [spec for spec in specs.values() if not spec.measure]
    if not reported:
        raise BadRequest(f"{where}: '{outcome.name}' is measured by the gateway; report others")
    if not (outcome.unit or outcome.request_id):
        raise BadRequest(f"{where}: says of nobody; set unit or request_id")
    if len(outcome.report_id) > _LONGEST_ID:
        raise BadRequest(f"{where}: report_id has more than {_LONGEST_ID} characters")
    value = _value(where, outcome)
    for spec in reported:
        _check(where, spec, value)
    return OutcomeRow(
        outcome.report_id or secrets.token_hex(16),
        outcome.experiment,
        outcome.name,
        value,
        _time(where, outcome, now),
        short(outcome.unit),
        short(outcome.request_id),
    )


def _known(asked: Asked) -> str:
    names = [name for name, specs in asked.items() if any(not spec.measure for spec in specs.values())]
    return ", ".join(names[:20]) or "none"


def _value(where: str, outcome: Any) -> float:
    kind = outcome.WhichOneof("value")
    if kind is None:
        raise BadRequest(f"{where}: has no value; set binary, numeric or duration")
    if kind == "duration":
        value: float = outcome.duration.seconds + outcome.duration.nanos / 1e9
    else:
        value = float(getattr(outcome, kind))
    if not math.isfinite(value):
        raise BadRequest(f"{where}: is {value}; a finite number")
    return value


def _check(where: str, spec: OutcomeSpec, value: float) -> None:
    if spec.kind is Kind.BINARY and value not in (0.0, 1.0):
        raise BadRequest(f"{where}: is {value:g}; '{spec.name}' is binary, so false or true")
    if spec.kind is Kind.DURATION and value < 0.0:
        raise BadRequest(f"{where}: is {value:g}; '{spec.name}' is a duration, which is not negative")


def _time(where: str, outcome: Any, now: float) -> float:
    if not outcome.HasField("at"):
        return now
    at = outcome.at.seconds + outcome.at.nanos / 1e9
    if not 0.0 <= at <= now + _CLOCK_SKEW:
        raise BadRequest(f"{where}: at is {'in the future' if at > now else 'before 1970'}")
    return float(at)
