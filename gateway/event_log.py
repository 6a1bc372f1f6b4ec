"""Logs changes of endpoints and of the config, and reports them to `hooks`."""

from __future__ import annotations

import logging
import time

from gateway.config import Finding, Loaded
from gateway.hooks import ConfigChanged, EndpointChanged, Hooks
from gateway.upstream.endpoint import Endpoint, ModelKey, State

_log = logging.getLogger(__name__)


class EventLog:
    """Tells the log and telemetry the same."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks

    def endpoint_changed(self, endpoint: Endpoint) -> None:
        """An endpoint's state, or the models that it serves, have changed."""
        upstream, address, is_ready = endpoint.upstream, endpoint.address, endpoint.state is State.READY
        models = tuple(name for (name, _), ready in endpoint.models.items() if ready)
        missing = ", ".join(_shown(endpoint, key) for key, ready in endpoint.models.items() if not ready)
        tried = {name: not why for (name, _), why in endpoint.probed.items()}
        reason = endpoint.reason or (f"models not ready: {missing}" if missing else "")
        self._hooks.endpoint_changed(
            EndpointChanged(upstream, address, is_ready, models, reason, time.monotonic(), tried=tried)
        )
        if is_ready:
            _log.info("endpoint %s/%s is ready%s", upstream, address, f" ({reason})" if reason else "")
        else:
            _log.warning("endpoint %s/%s is %s: %s", upstream, address, endpoint.state.value, reason)

    def endpoint_left(self, endpoint: Endpoint) -> None:
        """The config, or the addresses of a name in it, no longer include an endpoint."""
        upstream, address = endpoint.upstream, endpoint.address
        self._hooks.endpoint_changed(EndpointChanged(upstream, address, False, (), "left", time.monotonic(), gone=True))
        _log.info("endpoint %s/%s has left", upstream, address)

    def config_in_force(self, loaded: Loaded, notices: tuple[Finding, ...]) -> None:
        """notices: the settings that only a restart puts in force."""
        texts = tuple(str(finding) for finding in (*loaded.warnings, *notices))
        upstreams = tuple(loaded.config.upstreams)
        self._hooks.config_changed(
            ConfigChanged(loaded.source, loaded.digest, True, texts, time.monotonic(), loaded.expiries, upstreams)
        )
        _log.info("config %s from %s is in force", loaded.digest[:12], loaded.source)
        for text in texts:
            _log.warning("%s", text)

    def config_refused(self, source: str, findings: tuple[Finding, ...]) -> None:
        texts = tuple(map(str, findings))
        self._hooks.config_changed(ConfigChanged(source, "", False, texts, time.monotonic()))
        _log.error("the new config is refused, the old one stays:\n  %s", "\n  ".join(texts))


def _shown(endpoint: Endpoint, model: ModelKey) -> str:
    """A model that is not ready, and why if its probe inferences are the reason."""
    why = endpoint.probed.get(model, "")
    return f"{model[0]} ({why})" if why else model[0]
