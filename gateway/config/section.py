"""Config: what all sections of the schema share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen; unknown keys are refused, since a misspelt one would otherwise be a setting silently not made."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=False,
        allow_inf_nan=False,
        use_attribute_docstrings=False,
        str_max_length=10_000,
    )
