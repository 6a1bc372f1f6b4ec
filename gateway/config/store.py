"""Config of the store: where exposures and outcomes of experiments are kept."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr

from gateway.config.section import Section
from gateway.config.units import HOURS, Duration, Whole, refused

_KINDS = ("sqlite:///", "postgresql://")


def _url(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().startswith(_KINDS):  # which is not shown, since there may be a password in it
        raise refused("is no URL of a store", "sqlite:///FILE or postgresql://USER@HOST/DATABASE")
    return value


def _key(value: SecretStr) -> SecretStr:
    if not 16 <= len(value.get_secret_value()) <= 1000:
        raise refused("is too short or too long to be a key", "16 to 1000 characters that nobody can guess")
    return value


class Store(Section):
    """Where exposures and outcomes of experiments are kept, and what workers and replicas find out together.

    It is opened where there are experiments, or where `url` is said and a shadow has `parity`.
    """

    url: Annotated[SecretStr, AfterValidator(_url)] | None = Field(
        default=None,
        description="`sqlite:///FILE` (`sqlite:////FILE` from the root on): a file of this host, for the workers of "
        "one gateway; by default `experiments.db` in the working directory. "
        "`postgresql://USER:PASSWORD@HOST/DATABASE`: for several replicas; it needs the extra `postgresql`. "
        "`${VARIABLE}` is taken from the environment.",
        examples=["${GATEWAY_STORE}"],
    )
    unit_key: Annotated[SecretStr, AfterValidator(_key)] | None = Field(
        default=None,
        description="Keys the hash by which units and requests are known in the store, the same on all replicas. "
        "`${VARIABLE}` is taken from the environment. Without it a random key is made once and kept in the store, "
        "where whoever reads the hashes can read it too. With another key all units are new ones.",
        examples=["${GATEWAY_UNIT_KEY}"],
    )
    retention: Annotated[float, Duration(1 * HOURS, 10 * 365 * 24 * HOURS)] = Field(
        default=180 * 24 * HOURS,
        description="How long exposures and outcomes are kept. A report that is sent again after that counts anew.",
        examples=["2160h"],
    )
    queue: Whole = Field(
        default=100_000,
        ge=1000,
        le=10_000_000,
        description="Most records that wait to be written, in each worker, some 300 bytes each; further ones are "
        "dropped and counted. At 1000 a second the default outlasts a database that is away for 100 s.",
    )
