"""Config: what all sections of the schema share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen; unknown keys are refused, since a misspelt one would otherwise be a setting silently not made."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        str_max_length=10_000,  # a longer text is a mistake, and would be copied into every finding and state page
    )
