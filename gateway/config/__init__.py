"""Config: one YAML file, one typed schema; validated whole before it is used, reloaded live."""

from gateway.config.document import json_schema_text, reference
from gateway.config.findings import ConfigError, Finding, Severity
from gateway.config.load import Loaded, load, transparent
from gateway.config.reload import Watcher, restart_notices
from gateway.config.schema import Config, json_schema
from gateway.config.units import DISCOVERED, split_address, split_endpoint

__all__ = [
    "DISCOVERED",
    "Config",
    "ConfigError",
    "Finding",
    "Loaded",
    "Severity",
    "Watcher",
    "json_schema",
    "json_schema_text",
    "load",
    "reference",
    "restart_notices",
    "split_address",
    "split_endpoint",
    "transparent",
]
