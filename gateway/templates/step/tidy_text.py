"""A step of one's own: texts without needless white space, in lower case, of bounded length."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from gateway.steps import Array, BadTensor, Params, Read, Step, Tensors, TensorSpec


class TidyTextParams(Params):
    """How texts are tidied."""

    longest: int = Field(default=1000, ge=1, description="Characters that a text may have once it is tidy.")


class TidyText(Step[TidyTextParams]):
    """Text → the same text without needless white space, in lower case."""

    params_type = TidyTextParams

    def __init__(self, params: TidyTextParams, read: Read) -> None:
        self.reads = self.writes = (TensorSpec("text", "BYTES", (1,)),)
        self._longest = params.longest

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        """raises: BadTensor if a text is no UTF-8, or too long."""
        made = np.empty_like(tensors["text"])
        for row, (text,) in enumerate(tensors["text"]):
            made[row, 0] = self._tidy(text, row)
        return {"text": made}

    def _tidy(self, text: bytes, row: int) -> bytes:
        try:
            tidy = " ".join(text.decode().split()).lower()
        except UnicodeDecodeError as error:
            raise BadTensor("text", f"is no UTF-8 at byte {error.start}", row) from error
        if len(tidy) > self._longest:
            raise BadTensor("text", f"has {len(tidy)} characters; {self._longest} are allowed", row)
        return tidy.encode()
