"""What `check` says of the requests by which models are tried out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tritonclient.grpc import service_pb2 as pb

from gateway.assemble import upstreams_of
from gateway.config import ConfigError, load


def written(folder: Path, *probes: object) -> Path:
    """A config with a public model for each of these probes, all on one Triton model."""
    variants = [{"only": {"upstream": "u", "model": "net", "probe": probe}} for probe in probes]
    models = {f"m{number}": {"variants": each} for number, each in enumerate(variants)}
    file = folder / "g.yaml"
    file.write_text(yaml.safe_dump({"upstreams": {"u": {"endpoints": ["a:1"]}}, "models": models}))
    return file


def request() -> pb.ModelInferRequest:
    made = pb.ModelInferRequest()
    made.inputs.add(name="IN", datatype="UINT8", shape=[1])
    made.raw_input_contents.append(b"\1")
    return made


def sent(file: Path) -> bytes:
    (tried,) = upstreams_of(load(file, {}).config)["u"].probe.inferences.values()
    return tried.request


def test_a_request_is_read_from_a_file_as_bytes_or_as_json(tmp_path: Path) -> None:
    from google.protobuf import json_format  # noqa: PLC0415

    (tmp_path / "warm").write_bytes(request().SerializeToString())
    (tmp_path / "warm.json").write_text(json_format.MessageToJson(request()))
    for name in ("warm", "warm.json"):
        assert pb.ModelInferRequest.FromString(sent(written(tmp_path, {"request": name}))) == request()
    assert sent(written(tmp_path, {})) == b""


WRONG = {
    "missing": ("none", None, "none"),
    "no message": ("warm", b"\xff\xff", "no ModelInferRequest can be read"),
    "no json": ("warm.json", b"{", "no ModelInferRequest can be read"),
    "nothing": ("warm", b"", "it has no inputs"),
}


@pytest.mark.parametrize(("name", "content", "text"), WRONG.values(), ids=WRONG)
def test_a_file_without_a_request_is_told(tmp_path: Path, name: str, content: bytes | None, text: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load(written(tmp_path, {"request": name}), {})
    (finding,) = refused.value.findings
    assert finding.key == "models.m0.variants.only.probe.request"
    assert text in str(finding)


def test_one_model_of_the_same_servers_is_tried_out_in_one_way(tmp_path: Path) -> None:
    load(written(tmp_path, {}, {}), {})
    with pytest.raises(ConfigError) as refused:
        load(written(tmp_path, {}, {"interval": "1s", "timeout": "1s"}), {})
    assert "models.m0.variants.only" in str(refused.value)
