"""I/O: `check --ask-triton`, which compares the pipelines of a config with the models as Triton describes them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping

from gateway.assemble import names_of, routes_of, upstreams_of
from gateway.config import Finding, Loaded, Severity
from gateway.config.findings import dotted
from gateway.forwarding.contracts import ask_all, ask_model
from gateway.steps.compare import ModelFacts, compare
from gateway.types import Variant
from gateway.upstream.connection import CallFailed, Connection
from gateway.upstream.discovery import Discovery

_LOOK_UP_SECONDS = 3.0


async def fitting(loaded: Loaded) -> list[Finding]:
    """Mismatches as errors, and variants that could not be asked as warnings, in the order of the file."""
    findings: list[Finding] = []

    def add(path: tuple[str | int, ...], wrong: str, right: str, severity: Severity = Severity.ERROR) -> None:
        findings.append(Finding(loaded.source, loaded.line_of(path), dotted(path), wrong, right, severity))

    routes = routes_of(loaded.config).public
    async with _connections(loaded) as connections:

        async def ask(variant: Variant) -> ModelFacts | None:
            why = "no address is known"
            for connection in connections.get(variant.upstream, ()):
                try:
                    return await ask_model(connection, variant)
                except CallFailed as failure:
                    why = failure.text
            for name, route in routes.items():
                if variant in route.variants:
                    path = ("models", name, "variants", variant.name)
                    add(path, f"could not be asked what it takes and answers: {why}", "", Severity.WARNING)
            return None

        facts = await ask_all(loaded.pipelines, routes, ask)
    for name, pipeline in loaded.pipelines.items():
        for each in compare(pipeline, facts):
            add(("models", name, "pipeline", *each.where), each.wrong, each.right)
    return sorted(dict.fromkeys(findings), key=lambda finding: (finding.line, finding.key))


@contextlib.asynccontextmanager
async def _connections(loaded: Loaded) -> AsyncIterator[Mapping[str, list[Connection]]]:
    """Connections to every endpoint, by upstream."""
    async with contextlib.AsyncExitStack() as exits:
        discovery = await exits.enter_async_context(Discovery(lambda: None))
        await discovery.learn(names_of(loaded.config), _LOOK_UP_SECONDS)
        connections: dict[str, list[Connection]] = {}
        for name, upstream in upstreams_of(loaded.config, discovery.addresses).items():
            connections[name] = [upstream.dial(address) for address in upstream.endpoints]
            for connection in connections[name]:
                exits.push_async_callback(connection.aclose)
        yield connections
