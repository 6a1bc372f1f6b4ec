"""Which requests are kept, what of them, and how much of the disk they may take."""

from __future__ import annotations

import base64
import json
import os
import resource
import stat

import fsspec
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.config.serving import Capture
from gateway.hooks import CallStarted
from gateway.telemetry.capture import Captures, redact
from gateway.telemetry.replay import BadCapture, read
from gateway.types import Facts

MODEL = "photos"


def request(id: str = "r-1", values: int = 4) -> bytes:
    message = pb.ModelInferRequest(model_name=MODEL, id=id)
    message.inputs.add(name="IN", datatype="FP32", shape=[1, values])
    message.raw_input_contents.append(np.ones(values, np.float32).tobytes())
    return bytes(message.SerializeToString())


def call(id: str = "r-1", **metadata: str) -> CallStarted:
    return CallStarted("ModelInfer", MODEL, True, id, "10.0.0.9:5", 0.0, Facts(metadata))


def keep(settings: Capture, *requests: bytes, draw=lambda: 0.5, **metadata: str) -> None:
    """Capture these requests and end."""
    with Captures("0", draw) as captures:
        take = captures.apply([settings])[MODEL]
        for each in requests:
            take(call(**metadata), each)


@pytest.fixture
def capture(tmp_path):
    def make(**more) -> Capture:
        return Capture.model_validate({"model": MODEL, "directory": str(tmp_path), "share": 1, **more})

    return make


def lines(folder):
    return [json.loads(line) for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]


def test_a_captured_request_can_be_read_back_as_it_came(capture, tmp_path):
    keep(capture(metadata=["x-user"]), request(), **{"x-user": "ann", "authorization": "secret"})
    (file,) = tmp_path.iterdir()
    (line,) = lines(tmp_path)
    assert line["metadata"] == {"x-user": "ann"}
    assert (line["method"], line["model"], line["request_id"], line["redacted"]) == ("ModelInfer", MODEL, "r-1", [])
    (kept,) = read(str(file))
    assert (kept.model, kept.body, kept.metadata) == (MODEL, request(), {"x-user": "ann"})
    assert "secret" not in file.read_text()


def test_only_the_user_of_the_gateway_may_read_the_files(capture, tmp_path):
    keep(capture(), request())
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_share_is_kept_and_what_is_too_large_is_not(capture, tmp_path):
    draws = iter([0.1, 0.3, 0.2, 0.25])
    keep(capture(share=0.25), *[request()] * 4, draw=lambda: next(draws))
    assert len(lines(tmp_path)) == 2
    keep(capture(max_bytes=1024), request(values=1000), request(id="small"))
    assert len(lines(tmp_path)) == 3


def test_the_files_of_a_model_are_a_ring(capture, tmp_path):
    """Whoever wrote them: what is left of an earlier process counts too, and what is another model's does not."""
    other = tmp_path / "photos-old-20200101T000000000000Z-h-1-0.jsonl"
    other.write_text("")
    for _ in range(3):
        keep(capture(files=4, file_bytes=64 * 1024), *[request(values=4096)] * 6)  # two to a file
    files = sorted(file.name for file in tmp_path.iterdir())
    assert other.name in files
    assert len(files) == 1 + 4
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 4 * 64 * 1024
    assert len(lines(tmp_path)) == 8


def test_redacted_inputs_are_zeros_of_the_same_shape_and_parameters_go(capture, tmp_path):
    message = pb.ModelInferRequest.FromString(request())
    message.inputs.add(name="TEXT", datatype="BYTES", shape=[2])
    message.raw_input_contents.append(b"\x06\0\0\0secret\x03\0\0\0key")
    message.parameters["token"].string_param = "secret"
    message.parameters["kept"].string_param = "x"
    keep(capture(redact=["TEXT", "token", "absent"]), message.SerializeToString())
    (line,) = lines(tmp_path)
    kept = pb.ModelInferRequest.FromString(base64.b64decode(line["request"]))
    assert line["redacted"] == ["TEXT", "token"]
    assert kept.raw_input_contents[0] == message.raw_input_contents[0]
    assert kept.raw_input_contents[1] == bytes(8)
    assert list(kept.parameters) == ["kept"]
    assert kept.inputs == message.inputs


def test_typed_contents_are_redacted_and_shared_memory_has_none():
    message = pb.ModelInferRequest(model_name=MODEL)
    message.inputs.add(name="SHARED", datatype="FP32", shape=[1]).parameters["shared_memory_region"].string_param = "r"
    message.inputs.add(name="RAW", datatype="FP32", shape=[1])
    message.raw_input_contents.append(b"abcd")
    typed = message.inputs.add(name="TYPED", datatype="INT32", shape=[2])
    typed.contents.int_contents.extend([7, 8])
    redact(message, ["SHARED"])
    assert list(message.raw_input_contents) == [b"abcd"]
    redact(message, ["RAW", "TYPED"])
    assert list(message.raw_input_contents) == [bytes(4)]
    assert list(typed.contents.int_contents) == [0, 0]


def test_a_shape_that_claims_more_than_came_costs_nothing():
    message = pb.ModelInferRequest(model_name=MODEL)
    message.inputs.add(name="TEXT", datatype="BYTES", shape=[1 << 40])
    message.raw_input_contents.append(b"\x01\0\0\0a")
    redact(message, ["TEXT"])
    assert message.raw_input_contents[0] == bytes(4)


def test_what_cannot_be_redacted_is_not_kept(capture, tmp_path):
    keep(capture(redact=["IN"]), b"\xff\xff", request())
    assert len(lines(tmp_path)) == 1


def test_an_object_store_works_like_a_folder():
    """fsspec's store in memory, which like S3 shows a file once it is closed."""
    settings = Capture(model=MODEL, directory="memory://captured/here", share=1, files=2)
    for _ in range(3):
        keep(settings, request())
    store = fsspec.filesystem("memory")
    files = store.ls("/captured/here", detail=False)
    assert len(files) == 2
    assert [each.body for file in files for each in read(f"memory://{file}")] == [request()] * 2
    store.rm("/captured", recursive=True)


def test_a_folder_that_cannot_be_written_is_told_once_and_left_alone_for_a_while(capture, tmp_path, caplog):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    settings = capture(directory=str(blocked))
    with Captures("0") as captures:
        take = captures.apply([settings])[MODEL]
        for _ in range(3):
            take(call(), request())
    assert caplog.text.count("nothing of photos is kept in") == 1


def test_a_full_disk_costs_no_file_that_was_kept(capture, tmp_path):
    settings = capture(files=2)
    for number in range(2):
        keep(settings, request(f"r-{number}"))
    kept = {file: file.read_bytes() for file in tmp_path.iterdir()}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        keep(settings, request("r-3"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == kept


def test_new_settings_take_over_at_once_and_unchanged_ones_go_on(capture, tmp_path):
    with Captures("0") as captures:
        captures.apply([capture()])[MODEL](call(), request())
        captures.apply([capture()])[MODEL](call(), request())
        assert captures.apply([]) == {}
    assert len(list(tmp_path.iterdir())) == 1
    assert len(lines(tmp_path)) == 2


@pytest.mark.parametrize("content", ["{}\n", "no json\n", '{"model": "m", "metadata": {}, "request": "§"}\n'])
def test_a_file_that_is_no_capture_is_named_with_its_line(content, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(content)
    with pytest.raises(BadCapture, match=rf"{file}, line 1"):
        list(read(str(file)))


def test_a_line_that_was_cut_off_is_left_out(capture, tmp_path):
    keep(capture(), request(), request())
    (file,) = tmp_path.iterdir()
    os.truncate(file, file.stat().st_size - 10)
    assert len(list(read(str(file)))) == 1
