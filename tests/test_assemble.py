"""From a config to the rooms' own values."""

from __future__ import annotations

from pathlib import Path

from gateway.assemble import upstreams_of
from gateway.config import Config


def test_a_renewed_certificate_makes_new_connections_and_nothing_else_does(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"

    def identity(interval: str = "1s") -> object:
        upstream = {"endpoints": ["triton:8001"], "tls": {"ca": str(authority)}, "probe_interval": interval}
        config = Config.model_validate({"upstreams": {"one": upstream}, "direct": {"models": "all"}})
        return upstreams_of(config)["one"].identity

    authority.write_text("old")
    before = identity()
    assert identity("2s") == before
    authority.write_text("new")
    assert identity() != before
