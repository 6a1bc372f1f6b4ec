"""Read a torch checkpoint, without torch and without running anything it says.

source: `torch/serialization.py`, `_legacy_load` (before 1.6): three pickles (magic number, protocol, system), the
        pickled state dict whose tensors refer to storages by persistent ids, the pickled list of storage keys, then for
        each key its number of elements as a little-endian int64 and the raw values. `_load` (since 1.6): a zip archive
        in whose folder `data.pkl` is the pickled state dict, and `data/<key>` the raw values of a storage.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_MAGIC = 0x1950A86A20F9469CFC6C
_MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError)
_Ints = tuple[int, ...]
_DTYPES: dict[str, np.dtype[np.generic]] = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class BadCheckpoint(Exception):
    """The file is not a checkpoint of this format, or asks for something that is not allowed."""


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype[np.generic]
    elements: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int  # in elements, as are the strides
    shape: _Ints
    strides: _Ints


def _rebuild_tensor(storage: _Storage, offset: int, shape: _Ints, strides: _Ints, *_: object) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


_ALLOWED: dict[tuple[str, str], Callable[..., object] | np.dtype[np.generic]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}
"""Everything a checkpoint may name. Storage classes stand for their dtype."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise BadCheckpoint(f"The checkpoint asks for {module}.{name}, which is not allowed.") from None

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", np.dtype() as dtype, str() as key, _, int() as elements, *views) if views in ([], [None]):
                return _Storage(key, dtype, elements)
        raise BadCheckpoint(f"The checkpoint refers to {pid!r}, which is not a storage.")


def read_checkpoint(data: bytes) -> dict[str, NDArray[np.generic]]:
    """The state dict: name of the parameter → array.

    :raises BadCheckpoint: if the file is of another format, is cut, or names anything beyond tensors and dicts.
    """
    file = BytesIO(data)
    try:
        if _unpickle(file) != _MAGIC:
            raise BadCheckpoint("The file does not begin with the magic number of an old torch checkpoint.")
        _unpickle(file)  # the protocol's version
        _unpickle(file)  # the sizes of types on the writer's system
        state = _unpickle(file)
        keys = _unpickle(file)
    except (pickle.UnpicklingError, EOFError, *_MALFORMED) as e:
        raise BadCheckpoint(f"The file is not an old torch checkpoint: {e}") from e
    if not isinstance(state, dict) or not isinstance(keys, list):
        raise BadCheckpoint("The checkpoint is not a state dict.")
    tensors = {name: value for name, value in state.items() if isinstance(value, _Tensor)}
    values = _read_storages(file, keys, {tensor.storage.key: tensor.storage for tensor in tensors.values()})
    return {name: _view(tensor, values) for name, tensor in tensors.items()}


def read_zip_checkpoint(data: bytes) -> dict[str, NDArray[np.generic]]:
    """All tensors of a checkpoint since torch 1.6: the keys that lead to one, joined by dots → array.

    :raises BadCheckpoint: as `read_checkpoint`.
    """
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            state = _unpickle(BytesIO(archive.read(pickled)))
            tensors = dict(_tensors_in(state, ""))
            folder = pickled.removesuffix(".pkl")
            raw = {key: archive.read(f"{folder}/{key}") for key in {each.storage.key for each in tensors.values()}}
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, *_MALFORMED) as e:
        raise BadCheckpoint(f"The file is not a zipped torch checkpoint: {e}") from e
    for storage in (tensor.storage for tensor in tensors.values()):
        if len(raw[storage.key]) != storage.elements * storage.dtype.itemsize:
            raise BadCheckpoint(f"Storage {storage.key} is cut or has another length than the {storage.elements} told.")
    values = {each.storage.key: np.frombuffer(raw[each.storage.key], each.storage.dtype) for each in tensors.values()}
    return {name: _view(tensor, values) for name, tensor in tensors.items()}


def _tensors_in(state: object, prefix: str) -> Iterator[tuple[str, _Tensor]]:
    if not isinstance(state, dict):
        raise BadCheckpoint("The checkpoint is not a state dict.")
    for name, value in state.items():
        if isinstance(value, _Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict):
            yield from _tensors_in(value, f"{prefix}{name}.")


def _unpickle(file: BinaryIO) -> object:
    return _Unpickler(file).load()


def _read_storages(file: BytesIO, keys: list[str], known: dict[str, _Storage]) -> dict[str, NDArray[np.generic]]:
    values = {}
    for key in keys:
        storage = known.get(key)
        if storage is None:
            raise BadCheckpoint(f"Storage {key} belongs to no tensor, so its size is unknown.")
        count = int.from_bytes(file.read(8), "little")
        raw = file.read(count * storage.dtype.itemsize) if count == storage.elements else b""
        if len(raw) != storage.elements * storage.dtype.itemsize:
            raise BadCheckpoint(f"Storage {key} is cut or has another length than the {storage.elements} it declares.")
        values[key] = np.frombuffer(raw, storage.dtype)
    return values


def _view(tensor: _Tensor, values: dict[str, NDArray[np.generic]]) -> NDArray[np.generic]:
    flat = values[tensor.storage.key]
    farthest = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    # Checked here because as_strided itself would read whatever lies beyond.
    if min((tensor.offset, *tensor.shape, *tensor.strides)) < 0 or farthest >= flat.size:
        raise BadCheckpoint(f"A tensor of shape {tensor.shape} reaches beyond its storage.")
    in_bytes = [stride * flat.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, in_bytes, writeable=False)
    return np.ascontiguousarray(view).reshape(tensor.shape)
