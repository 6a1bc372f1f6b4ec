"""Where exposures, outcomes and decisions are kept, as a config says."""

from __future__ import annotations

from typing import Final

from gateway.config import Config
from gateway.store import StoreSettings

_DEFAULT_URL: Final = "sqlite:///experiments.db"


def store_settings_of(config: Config) -> StoreSettings:
    store = config.store
    url = _DEFAULT_URL if store.url is None else store.url.get_secret_value()
    key = None if store.unit_key is None else store.unit_key.get_secret_value()
    return StoreSettings(url, key, store.retention, store.queue)
