"""Torch checkpoints, written here opcode by opcode, as there is no torch."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gateway.models.checkpoint import BadCheckpoint, read_checkpoint, read_zip_checkpoint

_MAGIC = 0x1950A86A20F9469CFC6C


def _value(value: object) -> bytes:
    """The opcodes of a plain value, without the protocol before and the stop behind."""
    return pickle.dumps(value, 2)[2:-1]


def _tensor(*, offset: int, shape: Sequence[int], strides: Sequence[int], elements: int) -> bytes:
    storage = (
        b"(" + _value("storage") + b"ctorch\nFloatStorage\n" + _value("7") + _value("cpu") + _value(elements) + b"NtQ"
    )
    rest = _value(offset) + _value(tuple(shape)) + _value(tuple(strides)) + _value(False)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"ccollections\nOrderedDict\n)RtR"


def _checkpoint(state_value: bytes, values: Sequence[float] = (0, 1, 2, 3, 4, 5)) -> bytes:
    head = b"".join(pickle.dumps(value, 2) for value in (_MAGIC, 1001, {"little_endian": True}))
    state = b"\x80\x02}" + _value("weight") + state_value + b"s."
    raw = struct.pack("<q", len(values)) + np.array(values, "<f4").tobytes()
    return head + state + pickle.dumps(["7"], 2) + raw


ROW_MAJOR = _tensor(offset=0, shape=(2, 3), strides=(3, 1), elements=6)


def test_a_row_major_tensor_is_read_as_written() -> None:
    (array,) = read_checkpoint(_checkpoint(ROW_MAJOR)).values()
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_strides_and_offset_of_a_tensor_are_respected() -> None:
    (array,) = read_checkpoint(_checkpoint(_tensor(offset=1, shape=(2, 2), strides=(1, 2), elements=6))).values()
    assert array.tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (2, 4), (4, 1)), (5, (2,), (1,)), (0, (2,), (6,)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (-2,), (1,))],
    ids=["too long", "offset too far", "stride too far", "negative offset", "negative stride", "negative length"],
)
def test_a_tensor_beyond_its_storage_is_refused(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    with pytest.raises(BadCheckpoint, match="beyond its storage"):
        read_checkpoint(_checkpoint(_tensor(offset=offset, shape=shape, strides=strides, elements=6)))


def test_a_global_that_is_not_on_the_list_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    attack = b"cpathlib\nPath\n(" + _value(str(trace)) + b"tR"
    with pytest.raises(BadCheckpoint, match=r"pathlib\.Path, which is not allowed"):
        read_checkpoint(_checkpoint(attack))
    with pytest.raises(BadCheckpoint, match=r"os\.mkdir"):
        read_checkpoint(b"\x80\x02cos\nmkdir\n(" + _value(str(trace)) + b"tR.")
    assert not trace.exists()


def test_a_checkpoint_cut_anywhere_is_refused() -> None:
    whole = _checkpoint(ROW_MAJOR)
    for length in range(len(whole)):
        with pytest.raises(BadCheckpoint):
            read_checkpoint(whole[:length])


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04" + b"\0" * 60, pickle.dumps({"a": 1}), b"\xff" * 100])
def test_another_format_is_refused(data: bytes) -> None:
    with pytest.raises(BadCheckpoint):
        read_checkpoint(data)


def test_a_storage_of_another_length_than_declared_is_refused() -> None:
    with pytest.raises(BadCheckpoint, match="another length than the 6"):
        read_checkpoint(_checkpoint(ROW_MAJOR, values=(1, 2, 3)))


# The zipped format


def _zipped(state: bytes, values: Sequence[float] = (0, 1, 2, 3, 4, 5), key: str = "7") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + state + b".")
        archive.writestr(f"archive/data/{key}", np.array(values, "<f4").tobytes())
    return file.getvalue()


def _state(tensor: bytes) -> bytes:
    """{"loss": 0.5, "encoder": {"weight": tensor}}"""
    return b"}(" + _value("loss") + _value(0.5) + _value("encoder") + b"}" + _value("weight") + tensor + b"su"


ZIPPED_TENSOR = ROW_MAJOR.replace(b"NtQ", b"tQ")  # since 1.6 a storage has no views


def test_a_zipped_checkpoint_is_read_by_the_path_to_each_tensor() -> None:
    ((name, array),) = read_zip_checkpoint(_zipped(_state(ZIPPED_TENSOR))).items()
    assert (name, array.tolist()) == ("encoder.weight", [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        _zipped(b"]"),
        _zipped(_state(b"cos\nsystem\n")),
        _zipped(_state(ZIPPED_TENSOR), values=(0, 1)),
        _zipped(_state(ZIPPED_TENSOR), key="8"),
        _zipped(_state(ZIPPED_TENSOR))[:-30],
    ],
    ids=["empty", "no archive", "no dict", "a foreign name", "a short storage", "a missing storage", "cut"],
)
def test_a_zipped_checkpoint_that_is_damaged_or_asks_for_more_is_refused(data: bytes) -> None:
    with pytest.raises(BadCheckpoint):
        read_zip_checkpoint(data)
