"""v2 (pure): tensors as the V2 protocol's raw buffers, and back. May use numpy, ml_dtypes; knows no protobuf.

Source: grpc_service.proto, `raw_input_contents` and `raw_output_contents`: row-major, little-endian, no padding; a
BYTES element is its length in four little-endian bytes, then the element.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, cast

import numpy as np
import numpy.typing as npt
from ml_dtypes import bfloat16

from gateway.errors import BadInput
from gateway.types import Buffer
from gateway.v2.shapes import ImpossibleShape, elements_of
from gateway.v2.spec import DATATYPES, Array, dtype_of

_LENGTH = struct.Struct("<I")
_FEW: Final = 64
_UNPACK: Final = [struct.Struct(f"<{count}f").unpack_from for count in range(_FEW + 1)]


def few_floats(datatype: str, body: bytes, at: int, stop: int) -> tuple[float, ...] | None:
    """The numbers of an FP32 tensor that has 64 at most, which numpy takes longer for; None of any other."""
    if datatype != "FP32" or stop - at > 4 * _FEW or (stop - at) % 4:
        return None
    numbers: tuple[float, ...] = _UNPACK[(stop - at) // 4](body, at)
    return numbers


def to_array(name: str, datatype: str, shape: Sequence[int], raw: Buffer) -> Array:
    """View one raw buffer as an array, copying only BYTES, BOOL and BF16.

    name:     the tensor's, for the error.
    shape:    as the request gives it, batch axis included.
    raw:      a memoryview must be one of unsigned bytes.
    returns:  a read-only array of that shape; BYTES as an object array of `bytes`, BF16 as float32.
    raises:   BadInput if the datatype is unknown, or the shape impossible, or the buffer not of its size.
    """
    if datatype not in DATATYPES:
        raise BadInput(f"input '{name}': unknown datatype '{datatype[:40]}'; known: {', '.join(DATATYPES)}")
    try:
        count = elements_of(shape)
    except ImpossibleShape as error:
        raise BadInput(f"input '{name}': {error}") from None
    if datatype == "BYTES":
        flat = _split_elements(name, count, raw)
    elif datatype == "BF16":
        _check_size(name, datatype, shape, 2 * count, len(raw))
        flat = _cast(np.frombuffer(raw, bfloat16), np.float32)
    elif datatype == "BOOL":
        _check_size(name, datatype, shape, count, len(raw))
        flat = np.frombuffer(raw, np.uint8) != 0  # a byte that is neither 0 nor 1 must not become a numpy bool
    else:
        dtype = dtype_of(datatype)
        _check_size(name, datatype, shape, dtype.itemsize * count, len(raw))
        flat = np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype, copy=False)
    try:
        array = flat.reshape(tuple(shape))
    except ValueError:  # a zero among sizes whose product numpy cannot address
        raise BadInput(f"input '{name}': shape {list(shape)} is not possible") from None
    array.flags.writeable = False
    return array


def to_raw(datatype: str, array: Array) -> bytes:
    """Write an array as one raw buffer; float32 becomes BF16 by rounding to the nearest, ties to even.

    :raises TypeError: if the array is not what `dtype_of(datatype)` says, or holds an element that is not `bytes`.
    """
    return bytes(raw_view(datatype, array))


def raw_view(datatype: str, array: Array) -> Buffer:
    """As `to_raw`; where the array is in memory as it must be written, a view of it and no copy."""
    if array.dtype != dtype_of(datatype):
        raise TypeError(f"{array.dtype} is not {datatype}")
    if datatype == "BYTES":
        return _join_elements(array)
    written = bfloat16 if datatype == "BF16" else array.dtype.newbyteorder("<")
    return np.ascontiguousarray(_cast(array, written)).reshape(-1).view(np.uint8).data


def _cast(array: Array, to: npt.DTypeLike) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):  # a signalling NaN, a value that becomes infinite: both are data
        return array.astype(to, copy=False)


def _check_size(name: str, datatype: str, shape: Sequence[int], want: int, got: int) -> None:
    if want != got:
        raise BadInput(f"input '{name}': {datatype} {list(shape)} takes {want} bytes, got {got}")


def _split_elements(name: str, count: int, raw: Buffer) -> Array:
    if count * _LENGTH.size > len(raw):  # before anything of that size is allocated
        raise BadInput(f"input '{name}': {count} BYTES elements take at least {4 * count} bytes, got {len(raw)}")
    elements = np.empty(count, np.object_)
    view = memoryview(raw)
    at = 0
    for index in range(count):
        start = at + _LENGTH.size
        if start > len(view):
            raise BadInput(f"input '{name}': the data ends before element {index} of {count}")
        at = start + cast(int, _LENGTH.unpack_from(view, at)[0])
        if at > len(view):
            raise BadInput(f"input '{name}': element {index} claims {at - start} bytes, {len(view) - start} are left")
        elements[index] = bytes(view[start:at])
    if at != len(view):
        raise BadInput(f"input '{name}': {len(view) - at} bytes are left after the last of {count} elements")
    return elements


def _join_elements(array: Array) -> bytes:
    parts: list[bytes] = []
    for element in array.ravel():
        if not isinstance(element, bytes):
            raise TypeError(f"a BYTES element must be bytes, not {type(element).__name__}")
        parts.append(_LENGTH.pack(len(element)))
        parts.append(element)
    return b"".join(parts)
