"""I/O: `inference-gateway models add FILE`: a model of one's own, from an ONNX file to the call of a client.

It is put into the model repository, loaded, and asked once. Only if it answers does it stay, and a config of a gateway
with it as a public model is written; otherwise nothing is left of it.
"""

from __future__ import annotations

import asyncio
import json
import keyword
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from tritonclient import grpc as triton_client
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from gateway.config import ConfigError, load
from gateway.errors import CommandFailed
from gateway.models.onnx_graph import (
    USUAL_BATCH,
    Graph,
    batch_error,
    config_text,
    explained,
    read_graph,
    shapes_of,
)
from gateway.triton import LocalTriton, UnsuitableHost, install

LOCAL: Final = "127.0.0.1:8001"
_LISTEN: Final = "127.0.0.1:9001"
_ANSWER_SECONDS: Final = 60.0
_LIVE_SECONDS: Final = 2.0
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_IN_THE_CALL: Final = frozenset({"np", "triton", "client", "answer", "print"})


class AddFailed(CommandFailed):
    """The model could not be added; the text says why and what to do. Nothing is left of it."""


class WrongArgument(AddFailed):
    """The model, or the public one, can't have this name, or the model not this batch; the text says why."""

    exit_code = 2


@dataclass(frozen=True)
class NewModel:
    """What to add, as the command line has it.

    name:    at Triton; "" is the file's.
    public:  that callers use; "" is that at Triton.
    batch:   rows that Triton may put together; None: if the graph says which axis is the batch.
    shapes:  of inputs in the request of zeros, whole.
    triton:  that runs with this repository; "" tries the usual address, and else starts one for the time of the check.
    """

    file: Path
    repository: Path
    name: str = ""
    public: str = ""
    batch: int | None = None
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    triton: str = ""


def add(new: NewModel, say: Callable[[str], None]) -> None:
    """Add it, and say what was done and how to go on. Blocks.

    :raises NotServable: if the file is no ONNX model that a Triton can serve.
    :raises AddFailed: if a name is taken or wrong, or the model does not load or does not answer.
    :raises OSError: if something can't be read or written.
    """
    graph = read_graph(new.file)
    most = new.batch if new.batch is not None else USUAL_BATCH if graph.batch_axis else 0
    if wrong := batch_error(graph, most):
        raise WrongArgument(f"--batch {most}: {wrong}; --batch 0 puts no requests together.")
    shapes = shapes_of(graph, new.shapes)
    name = new.name or new.file.stem
    public = new.public or name
    config = Path(f"{public}.yaml")
    _require_free(new, name, public, config)
    with _put(new, name, graph, most) as folder, _written(config, public, name):
        for kind, tensors in (("in", graph.inputs), ("out", graph.outputs)):
            for tensor in tensors:
                say(f"{kind:>4}  {tensor}")
        for line in explained(graph, most, new.batch is not None):
            say(f"      {line}")
        is_served = _tried(new, name, shapes, say)
    say(f"made {folder / 'config.pbtxt'}, {folder / '1' / 'model.onnx'}, {config}\nserve it:")
    if not is_served:
        repository = shlex.quote(str(new.repository))
        say(f"  inference-gateway triton start --model {name} --repository {repository}")
    say(f"  inference-gateway serve --config {shlex.quote(str(config))}")
    say(f"call it (Python):\n{_indented(client_code(public, graph, shapes))}")


def _require_free(new: NewModel, name: str, public: str, config: Path) -> None:
    """:raises WrongArgument: if the name can be none, or a model or file has it."""
    if not _NAME.fullmatch(name):
        raise WrongArgument(f"{name!r} can be no model's name; --name gives one of letters, digits, '_', '-' and '.'.")
    if (new.repository / name).exists():
        raise WrongArgument(f"{new.repository} has a model {name} already; --name gives this one another name.")
    if "/" in public or public.startswith("."):
        raise WrongArgument(f"{public!r} can be no public model's name here, since its config is named after it.")
    if config.exists():
        raise WrongArgument(f"{config} is there already; --as gives the public model, and so the file, another name.")


@contextmanager
def _put(new: NewModel, name: str, graph: Graph, most: int) -> Iterator[Path]:
    """The model's folder in the repository; gone again if what is done with it fails."""
    new.repository.mkdir(parents=True, exist_ok=True)
    folder = new.repository / name
    folder.mkdir()
    try:
        version = folder / "1"
        version.mkdir()
        for weights in graph.files:
            (version / weights).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(new.file.parent / weights, version / weights)
        shutil.copyfile(new.file, version / "model.onnx")
        (folder / "config.pbtxt").write_text(config_text(name, graph, most), encoding="utf-8")
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _written(config: Path, public: str, name: str) -> Iterator[None]:
    """The gateway's config; gone again if what is done with it fails.

    :raises WrongArgument: if the gateway refuses the public model's name.
    """
    config.write_text(yaml_of(public, name), encoding="utf-8")
    try:
        load(config, {})
        yield
    except BaseException as error:
        config.unlink()
        if isinstance(error, ConfigError):
            finding = error.findings[0]
            raise WrongArgument(
                f"{public!r} can be no public model's name: {finding.wrong}; {finding.right}"
            ) from error
        raise


def yaml_of(public: str, name: str) -> str:
    """A whole config of a gateway, with this public model."""
    return f"""\
# Made by `inference-gateway models add`. In another config, the lines below `models` are enough.
listen: {_LISTEN}
admin: {{listen: "127.0.0.1:9002"}}
upstreams:
  local: {{endpoints: ["${{TRITON_ENDPOINT:-{LOCAL}}}"]}}
models:
  {_quoted(public)}:
    variants:
      onnx: {{upstream: local, model: {_quoted(name)}}}
"""


# Loading and asking


def _tried(new: NewModel, name: str, shapes: Mapping[str, list[int]], say: Callable[[str], None]) -> bool:
    """Load the model and ask it once. Is it served from now on, by a Triton that was there?

    :raises AddFailed: if it does not load or answer.
    """
    address = new.triton or LOCAL
    with triton_client.InferenceServerClient(address) as client:
        if _is_live(client):
            _load(client, address, name, new)
            try:
                say(_asked(client, name, shapes, f"Triton {address}"))
            except BaseException:
                client.unload_model(name)
                raise
            return True
    if new.triton:
        raise AddFailed(f"No Triton answers at {new.triton}; without --triton, one is started for the time of a check.")
    try:
        install()
    except UnsuitableHost as error:
        say(f"not tried: no Triton answers at {address}, and none can be started here. {error}")
        return False
    asyncio.run(_tried_alone(new, name, shapes, say))
    return False


async def _tried_alone(new: NewModel, name: str, shapes: Mapping[str, list[int]], say: Callable[[str], None]) -> None:
    """With a local Triton that ends afterwards."""
    async with LocalTriton(new.repository, models=[name]) as server:
        with triton_client.InferenceServerClient(server.grpc_address) as client:
            say(await asyncio.to_thread(_asked, client, name, shapes, "a Triton that was started for it"))


def _is_live(client: Any) -> bool:
    try:
        return bool(client.is_server_live(client_timeout=_LIVE_SECONDS))
    except InferenceServerException:
        return False


def _load(client: Any, address: str, name: str, new: NewModel) -> None:
    """:raises AddFailed: if the Triton knows another model of this name, or does not load it."""
    known = {each.name: each.state for each in client.get_model_repository_index(client_timeout=_ANSWER_SECONDS).models}
    if known.get(name) == "READY":
        raise AddFailed(f"Triton {address} serves another model {name} already; --name gives this one another name.")
    try:
        client.load_model(name, client_timeout=_ANSWER_SECONDS)
    except InferenceServerException as error:
        raise AddFailed(
            f"Triton {address} has not loaded {name}: {error.message()}\n"
            f"Its model repository must be {new.repository.resolve()}, and it must let models be loaded, "
            "as `inference-gateway triton start` does."
        ) from error


def _asked(client: Any, name: str, shapes: Mapping[str, list[int]], where: str) -> str:
    """What came back for a request of zeros.

    :raises AddFailed: if it was refused.
    """
    inputs = []
    for tensor in client.get_model_metadata(name, client_timeout=_ANSWER_SECONDS).inputs:
        made = triton_client.InferInput(tensor.name, shapes[tensor.name], tensor.datatype)
        made.set_data_from_numpy(_zeros(shapes[tensor.name], tensor.datatype))
        inputs.append(made)
    began = time.perf_counter()
    try:
        answer = client.infer(name, inputs, client_timeout=_ANSWER_SECONDS).get_response()
    except InferenceServerException as error:
        sent = ", ".join(f"{input_} {shape}" for input_, shape in shapes.items())
        raise AddFailed(
            f"{name} was loaded, but refused a request of zeros ({sent}): {error.message()}\n"
            "If an open axis has a least size, say the shape: --shape INPUT:1,3,224,224"
        ) from error
    took = (time.perf_counter() - began) * 1e3
    made_of = ", ".join(f"{each.name} {each.datatype} {list(each.shape)}" for each in answer.outputs)
    return f"loaded by {where}; zeros were answered in {took:.1f} ms by {made_of}"


def _zeros(shape: Sequence[int], datatype: str) -> np.ndarray[Any, Any]:
    return np.full(shape, b"", np.object_) if datatype == "BYTES" else np.zeros(shape, triton_to_np_dtype(datatype))


# The call


def client_code(public: str, graph: Graph, shapes: Mapping[str, Sequence[int]]) -> str:
    """A program that sends the request of zeros through the gateway."""
    lines = [
        "import numpy as np, tritonclient.grpc as triton",
        "",
        f"client = triton.InferenceServerClient({_quoted(_LISTEN)})",
    ]
    names = []
    for number, tensor in enumerate(graph.inputs):
        is_usable = tensor.name.isidentifier() and not keyword.iskeyword(tensor.name)
        name = tensor.name if is_usable and tensor.name not in _IN_THE_CALL else f"input_{number}"
        shape = list(shapes[tensor.name])
        zeros = f'np.full({shape}, b"", object)'
        if tensor.datatype != "BYTES":
            dtype = "bool_" if tensor.datatype == "BOOL" else np.dtype(triton_to_np_dtype(tensor.datatype)).name
            zeros = f"np.zeros({shape}, np.{dtype})"
        lines += [
            f"{name} = triton.InferInput({_quoted(tensor.name)}, {shape}, {_quoted(tensor.datatype)})",
            f"{name}.set_data_from_numpy({zeros})",
        ]
        names.append(name)
    shown = ", ".join(f"answer.as_numpy({_quoted(tensor.name)})" for tensor in graph.outputs)
    lines += [f"answer = client.infer({_quoted(public)}, [{', '.join(names)}])", f"print({shown})"]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """In quotes, as Python and YAML both read it."""
    return json.dumps(text, ensure_ascii=False)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
