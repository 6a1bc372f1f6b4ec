"""`models add`: from an ONNX file to a client's call, on a real Triton; or nothing is left of it."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import tritonclient.grpc as triton_client
from command_line import command, run
from onnx import TensorProto, helper
from triton_fixture import save_onnx, write_add

from gateway.add_model import AddFailed, NewModel, add
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
async def own_triton(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalTriton]:
    """One with no model yet, as `triton start` gives it."""
    server = LocalTriton(tmp_path_factory.mktemp("own") / "models", models=[])
    server.repository.mkdir()
    await server.start()
    yield server
    await server.kill()
    await server.aclose()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def added(new: NewModel) -> str:
    said: list[str] = []
    await asyncio.to_thread(add, new, said.append)
    return "\n".join(said)


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def write(file: Path, text: str = "") -> None:
    file.write_text(text)


def ready(server: LocalTriton) -> set[str]:
    with triton_client.InferenceServerClient(server.grpc_address) as client:
        return {each.name for each in client.get_model_repository_index().models if each.state == "READY"}


def graph(
    name: str,
    nodes: list[onnx.NodeProto],
    inputs: list[object],
    outputs: list[object],
    **constants: tuple[tuple[int, ...], list[float]],
) -> None:
    made = [helper.make_tensor(key, TensorProto.FLOAT, *of) for key, of in constants.items()]
    save_onnx(helper.make_graph(nodes, name, inputs, outputs, made), Path(f"{name}.onnx"))


def value(name: str, datatype: int, *shape: int | str | None) -> object:
    return helper.make_tensor_value_info(name, datatype, shape)


async def test_the_printed_commands_and_the_printed_call_work(own_triton: LocalTriton, folder: Path) -> None:
    """Two inputs, one of texts and one whose name is no word of Python; no axis is a batch."""
    nodes = [helper.make_node("Identity", [one], [other]) for one, other in (("text", "same"), ("n:0", "out"))]
    inputs = [value("text", TensorProto.STRING, None), value("n:0", TensorProto.INT64, 2, "w")]
    graph("two", nodes, inputs, [value("same", TensorProto.STRING, None), value("out", TensorProto.INT64, 2, "w")])
    new = NewModel(Path("two.onnx"), own_triton.repository, public="echo", triton=own_triton.grpc_address)
    said = await added(new)
    assert "zeros were answered" in said
    assert "Axes of any size ('w', one without a name)" in said
    assert "triton start" not in said
    assert "inference-gateway serve --config echo.yaml" in said
    environ = {
        "TRITON_ENDPOINT": own_triton.grpc_address,
        "GATEWAY_LISTEN": "127.0.0.1:0",
        "GATEWAY_ADMIN_LISTEN": "127.0.0.1:0",
    }
    async with command("serve", "--config", "echo.yaml", folder=folder, environ=environ) as running:
        address, _ = await running.until_serving()
        code = "\n".join(line.removeprefix("  ") for line in said.partition("call it (Python):\n")[2].splitlines())
        assert "127.0.0.1:9001" in code
        write(folder / "call.py", code.replace("127.0.0.1:9001", address))
        async with command(folder=folder, start=("call.py",)) as calling:
            assert await calling.wait() == 0, calling.errors
            assert calling.output.split() == ["[b'']", "[[0]", "[0]]"]


async def test_the_command_starts_a_triton_where_none_runs(folder: Path) -> None:
    """And it is put into the repository of the current folder, which is made."""
    write_add(Path("plus.onnx"), 1)
    code, output, errors = await run("models", "add", "plus.onnx", "--repository", "own", folder=folder)
    assert (code, errors) == (0, "")
    assert "loaded by " in output
    assert "The first axis is taken for the batch" in output
    assert "serve --config plus.yaml" in output
    assert files(folder / "own") == ["plus/1/model.onnx", "plus/config.pbtxt"]
    code, output, _ = await run("check", "plus.yaml", folder=folder)
    assert code == 0
    code, output, errors = await run("models", "add", "plus.onnx", "--repository", "own", folder=folder)
    assert (code, output) == (2, "")
    assert "has a model plus already; --name" in errors


async def test_a_model_that_needs_more_than_ones_is_added_with_a_shape(own_triton: LocalTriton, folder: Path) -> None:
    """Without it nothing is left: no folder, no config, nothing loaded."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    axes = (TensorProto.FLOAT, "n", 1, "height", "width")
    graph("conv", nodes, [value("x", *axes)], [value("y", *axes)], w=((1, 1, 3, 3), [1.0] * 9))
    new = NewModel(Path("conv.onnx"), own_triton.repository, triton=own_triton.grpc_address)
    before = files(own_triton.repository)
    with pytest.raises(AddFailed, match=r"refused a request of zeros \(x \[1, 1, 1, 1\]\)[^Z]*--shape INPUT"):
        await added(new)
    assert files(own_triton.repository) == before
    assert "conv" not in ready(own_triton)
    assert files(folder) == ["conv.onnx"]
    said = await added(NewModel(**{**vars(new), "shapes": {"x": [1, 1, 5, 5]}}))
    assert "y FP32 [1, 1, 3, 3]" in said
    assert "conv" in ready(own_triton)


async def test_a_model_that_does_not_load_leaves_nothing(own_triton: LocalTriton, folder: Path) -> None:
    ends = [value("x", TensorProto.FLOAT, "n", 4)], [value("y", TensorProto.FLOAT, "n", 4)]
    graph("odd", [helper.make_node("NoSuchOperator", ["x"], ["y"])], *ends)
    new = NewModel(Path("odd.onnx"), own_triton.repository, triton=own_triton.grpc_address)
    with pytest.raises(AddFailed, match=r"has not loaded odd: .*NoSuchOperator"):
        await added(new)
    assert not (own_triton.repository / "odd").exists()
    assert files(folder) == ["odd.onnx"]


async def test_a_name_that_is_taken_or_wrong_is_refused(own_triton: LocalTriton, folder: Path) -> None:
    write_add(Path("sum.onnx"), 1)
    address, there = own_triton.grpc_address, own_triton.repository
    await added(NewModel(Path("sum.onnx"), there, name="taken", triton=address))
    write(folder / "mine.yaml")
    wrong: dict[str, dict[str, Any]] = {
        "has a model taken already": {"name": "taken", "public": "x"},
        "serves another model taken": {"name": "taken", "public": "x", "repository": folder / "other"},
        "taken.yaml is there already": {"public": "taken"},
        "mine.yaml is there already": {"public": "mine"},
        "can be no model's name": {"name": "a/b"},
        "can be no public model's name": {"public": "a b"},
        "can be no public model's name here": {"public": "../a"},
    }
    for reason, changed in wrong.items():
        before = files(folder), files(there)
        with pytest.raises(AddFailed, match=reason):
            await added(NewModel(**{"file": Path("sum.onnx"), "repository": there, "triton": address, **changed}))
        assert (files(folder), files(there)) == before


async def test_a_triton_that_is_named_and_not_there_is_told(folder: Path) -> None:
    write_add(Path("plus.onnx"), 1)
    with pytest.raises(AddFailed, match=r"No Triton answers at 127\.0\.0\.1:1"):
        await added(NewModel(Path("plus.onnx"), folder / "own", triton="127.0.0.1:1"))
    assert not (folder / "own" / "plus").exists()


WRONG = {
    "no file": (("none.onnx",), 2, "none.onnx: No such file"),
    "no model": ((__file__,), 2, "is no ONNX model"),
    "no shape": (("m.onnx", "--shape", "x"), 2, "INPUT:1,3,224,224"),
    "no batch": (("m.onnx", "--batch", "-1"), 2, "0 or more"),
}


@pytest.mark.parametrize(("arguments", "code", "reason"), WRONG.values(), ids=WRONG)
async def test_the_command_line_is_checked(folder: Path, arguments: tuple[str, ...], code: int, reason: str) -> None:
    told, output, errors = await run("models", "add", *arguments, folder=folder)
    assert (told, output) == (code, "")
    assert re.search(reason, errors)
    assert "Traceback" not in errors


async def test_what_is_not_installed_is_said(folder: Path) -> None:
    """onnx comes with an extra."""
    write(folder / "onnx.py", "raise ModuleNotFoundError(\"No module named 'onnx'\", name='onnx')")
    code, _, errors = await run("models", "add", os.devnull, folder=folder, environ={"PYTHONPATH": str(folder)})
    assert code == 1
    assert errors == "inference-gateway: this needs 'onnx': pip install 'inference-gateway[local]'\n"
