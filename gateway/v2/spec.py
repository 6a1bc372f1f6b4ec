"""v2 (pure): what a tensor is called, what it holds and how large one row of it is. May use numpy only.

Inside this room a tensor is a numpy array whose axis 0 is the batch (one row per item). BYTES are object arrays of
`bytes`. BF16, which numpy lacks, is FP32 while it is here: widening loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]  # Any: the element type is data here, named by a tensor's datatype
Tensors = Mapping[str, Array]

Datatype = Literal[
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BF16",
    "BYTES",
]
"""Datatypes of the V2 protocol."""

DATATYPES: tuple[Datatype, ...] = get_args(Datatype)

_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
_NAMES: dict[np.dtype[Any], Datatype] = {dtype: name for name, dtype in _DTYPES.items()}  # type: ignore[misc]


def dtype_of(datatype: str) -> np.dtype[Any]:
    """The numpy type that holds a V2 datatype here; float32 for BF16.

    :raises KeyError: if there is no such datatype.
    """
    return _DTYPES["FP32" if datatype == "BF16" else datatype]


def datatype_of(array: Array) -> Datatype:
    """The V2 datatype of an array; never BF16.

    :raises KeyError: if the protocol has no such type (complex numbers, text, dates).
    """
    return _NAMES[array.dtype.newbyteorder("=")]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one tensor is: `shape` is that of one row, the batch axis left out; -1 stands for any size."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.datatype} {list(self.shape)}"

    def admits(self, array: Array) -> bool:
        """Is this array (batch axis included) what the spec says?"""
        return (
            array.ndim == 1 + len(self.shape) and dtype_of(self.datatype) == array.dtype and self._fits(array.shape[1:])
        )

    def agrees(self, other: TensorSpec) -> bool:
        """Can one tensor be both? The names need not be equal."""
        return self.datatype == other.datatype and len(self.shape) == len(other.shape) and self._fits(other.shape)

    def _fits(self, row: tuple[int, ...]) -> bool:
        return all(-1 in (want, got) or want == got for want, got in zip(self.shape, row, strict=True))


def describe(array: Array) -> str:
    """An array as texts for people show it, such as `FP32 [8, 1000]`, batch axis included."""
    try:
        name: str = datatype_of(array)
    except KeyError:
        name = str(array.dtype)
    return f"{name} {list(array.shape)}"
