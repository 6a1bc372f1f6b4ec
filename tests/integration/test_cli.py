"""The command line, as a user types it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path

import grpc
import jsonschema
import pytest
import tritonclient.grpc as triton_client
import yaml
from command_line import command, descendants, free_address, free_port, is_running, run
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from traffic import OK, config, until, until_readyz, write
from triton_fixture import TritonFactory, write_add
from v2_calls import call, channel_to, infer
from v2_gateways import Script

from gateway.app import _SERVICES, Gateway
from gateway.cli import main
from gateway.triton import LocalTriton

SPLIT = {"away": 1}
COMMANDS = ("serve", "check", "explain", "schema", "experiment", "rollout", "new", "models", "triton", "demo")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """Two variants, rules, a sticky split and a pipeline."""
    content = config(
        {"one": "triton:8001"},
        {
            "adder": {
                "variants": {
                    "a": {"upstream": "one", "model": "add_one_a"},
                    "b": {"upstream": "one", "model": "add_one_b", "version": "2"},
                },
                "split": {"a": 75, "b": 25},
                "sticky": {"metadata": "x-user-id"},
                "rules": [{"name": "testers", "match": {"metadata": {"x-tester": "1"}}, "variant": "b"}],
            },
            "best": {
                "pipeline": {
                    "inputs": [{"name": "IN", "datatype": "FP32", "shape": [4]}],
                    "outputs": [{"name": "label", "datatype": "BYTES", "shape": [1]}],
                    "max_batch_size": 8,
                    "steps": [
                        {"call": "adder", "inputs": ["IN"], "outputs": {"OUT": "scores"}},
                        {"step": "top_k", "with": {"k": 1}},
                    ],
                }
            },
        },
    )
    return write(tmp_path / "gateway.yaml", content)


class TestHelp:
    async def test_lists_the_commands_and_the_exit_codes(self, tmp_path: Path) -> None:
        code, output, _ = await run("--help", folder=tmp_path)
        assert code == 0
        assert all(re.search(rf"^    {name}\b", output, re.M) for name in COMMANDS)
        assert "Exit codes" in output

    @pytest.mark.parametrize("name", COMMANDS)
    async def test_says_of_every_command_what_it_does(self, tmp_path: Path, name: str) -> None:
        code, output, _ = await run(name, "--help", folder=tmp_path)
        assert code == 0
        assert output.startswith(f"usage: inference-gateway {name}")
        assert len(output.splitlines()) >= 5

    async def test_is_what_no_command_at_all_gets(self, tmp_path: Path) -> None:
        code, output, _ = await run(folder=tmp_path)
        assert code == 2
        assert output.startswith("usage: inference-gateway")

    async def test_ends_quietly_when_its_reader_goes_away(self, tmp_path: Path) -> None:
        """As in `inference-gateway schema | head -1`."""
        reader, writer = os.pipe()
        os.close(reader)
        async with command("schema", folder=tmp_path, output=writer) as running:
            os.close(writer)
            assert await running.wait() == 0
        assert running.errors == ""


WRONG = {
    "no command of ours": ("dance",),
    "serve needs a source": ("serve",),
    "one source": ("serve", "--config", "a.yaml", "--triton", "localhost:8001"),
    "an address": ("serve", "--triton", "nonsense"),
    "a number of workers": ("serve", "--triton", "localhost:8001", "--workers", "many"),
    "pairs": ("explain", "g.yaml", "--model", "m", "--metadata", "no-value"),
    "a draw": ("explain", "g.yaml", "--model", "m", "--draw", "1"),
    "replay's other model": ("replay", "f", "--to", "a:1", "--as", "m"),
    "what an input is for": ("demo", "--input", "f.txt"),
    "a task": ("demo", "--task", "dancing"),
    "a port": ("triton", "start", "--grpc-port", "70000"),
    "a config that is there": ("check", "nowhere.yaml"),
}


MENDABLE = {
    "a model to build": ("models", "build", "nope"),
    "the repository, to build": ("models", "build", "--repository", "nowhere"),
    "the repository, to list": ("models", "list", "--repository", "nowhere"),
    "the repository, to start": ("triton", "start", "--repository", "nowhere"),
    "a model to start": ("triton", "start", "--model", "nope"),
    "a model to sweep": ("models", "optimise", "nope"),
    "a model's file": ("models", "add", "nowhere.onnx"),
    "a model's content": ("models", "add", "gateway.yaml"),
    "a capture": ("replay", "nowhere.jsonl", "--to", "127.0.0.1:1"),
    "a capture's content": ("replay", "gateway.yaml", "--to", "127.0.0.1:1"),
    "where to replay": ("replay", "gateway.yaml", "--to", "nonsense"),
    "calls at once": ("replay", "gateway.yaml", "--to", "127.0.0.1:1", "--at-once", "0"),
    "a key's file": ("replay", "gateway.yaml", "--to", "127.0.0.1:1", "--key-file", "nowhere"),
    "a caller's name": ("keys", "new", ""),
    "a step's name": ("new", "step", "9x"),
    "where protos go": ("protos", "nowhere/all.binpb"),
    "an experiment": ("experiment", "report", "nope", "--config", "gateway.yaml"),
    "a file with experiments": (
        *("experiment", "analyse", "--config", "gateway.yaml"),
        *("--exposures", "none.csv", "--outcomes", "none.csv"),
    ),
    "a model with disagreements": ("experiment", "diffs", "nope", "--config", "gateway.yaml"),
    "a rollout": ("rollout", "show", "nope", "--config", "gateway.yaml"),
    "what to read in the demo": ("demo", "--task", "photo", "--input", "nowhere"),
    "what the demo has": ("demo", "--repository", "nowhere"),
    "a config of the demo": ("demo", "--task", "photo", "--once", "--config", "nowhere.yaml"),
    "a directory as a config": ("check", "."),
}


@pytest.mark.parametrize("arguments", MENDABLE.values(), ids=MENDABLE)
def test_what_is_named_and_is_not_there_exits_2_as_any_wrong_line(
    tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So a script can tell "mend the line" from "try again"."""
    monkeypatch.chdir(tmp_path)
    Path("gateway.yaml").write_text("upstreams: {cpu: {endpoints: ['triton:8001']}}\ndirect: {models: all}\n")
    try:
        code: object = main(arguments)
    except SystemExit as ended:  # by argparse
        code = ended.code
    assert code == 2
    assert capsys.readouterr().err.startswith(("inference-gateway: ", "usage: "))


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
async def test_a_wrong_command_line_exits_2_with_a_reason(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, output, errors = await run(*arguments, folder=tmp_path)
    assert code == 2
    assert output == ""
    assert "inference-gateway" in errors
    assert "Traceback" not in errors


class TestCheck:
    async def test_a_valid_file_exits_0(self, config_file: Path, tmp_path: Path) -> None:
        code, output, errors = await run("check", str(config_file), folder=tmp_path)
        assert (code, errors) == (0, "")
        assert output == f"{config_file}: valid, 2 public models, 1 upstreams\n"

    async def test_a_wrong_file_exits_2_with_every_finding_and_its_line(self, tmp_path: Path) -> None:
        file = tmp_path / "wrong.yaml"
        file.write_text(
            "upstreams:\n"
            "  one: {endpoints: [triton:8001, triton:8001]}\n"
            "models:\n"
            "  adder:\n"
            "    variants:\n"
            "      a: {upstream: two, model: add}\n"
            "    split: {a: 1, b: 1}\n"
        )
        code, output, errors = await run("check", str(file), folder=tmp_path)
        assert (code, output) == (2, "")
        for found in ("2: upstreams.one.endpoints", "6: models.adder.variants.a.upstream", "7: models.adder.split"):
            assert f"{file}:{found}" in errors


class TestExplain:
    async def explain(self, file: Path, *arguments: str) -> str:
        code, output, errors = await run("explain", str(file), *arguments, folder=file.parent)
        assert (code, errors) == (0, "")
        return output

    async def test_a_rule_decides_before_the_split(self, config_file: Path) -> None:
        said = await self.explain(config_file, "--model", "adder", "--metadata", "X-Tester=1", "x-user-id=u1")
        assert said.startswith("adder: a public model, reason: rule:testers\n")
        assert "rule testers: matches, variant b" in said
        assert "1. b: model add_one_b version 2 on one" in said
        assert "2. a: model add_one_a on one" in said

    async def test_a_sticky_key_gets_the_same_variant_whatever_is_drawn(self, config_file: Path) -> None:
        said = {
            await self.explain(config_file, "--model", "adder", "--metadata", "x-user-id=u1", "--draw", draw)
            for draw in ("0", "0.99")
        }
        (text,) = said
        assert "reason: sticky" in text
        assert "key 'u1'" in text

    async def test_metadata_is_read_as_a_call_s(self, config_file: Path) -> None:
        """Values are trimmed, and the first of several counts: else another variant is named than would be served."""
        given = ("--metadata", "x-user-id=  u1 ", "X-User-Id=u2")
        assert "key 'u1'" in await self.explain(config_file, "--model", "adder", *given)

    @pytest.mark.parametrize(("draw", "variant"), [("0.7499", "a"), ("0.7501", "b")])
    async def test_without_a_key_the_draw_decides(self, config_file: Path, draw: str, variant: str) -> None:
        said = await self.explain(config_file, "--model", "adder", "--draw", draw)
        assert "reason: split" in said
        assert f"1. {variant}: " in said

    async def test_a_running_gateway_says_how_it_stands_now(self, config_file: Path, gateway: Gateway) -> None:
        said = await self.explain(config_file, "--model", "adder", "--admin", gateway.admin_address)
        assert "now: adder is ready; retries: " in said
        assert "variant a: ready, its breaker is admitting" in said
        arguments = ("explain", str(config_file), "--model", "adder", "--admin", "127.0.0.1:1")
        code, output, errors = await run(*arguments, folder=config_file.parent)
        assert (code, "reason: split" in output) == (1, True)
        assert errors.startswith("127.0.0.1:1 does not say how it stands: ")

    async def test_a_pipeline_shows_its_steps_and_the_models_that_it_calls(self, config_file: Path) -> None:
        said = await self.explain(config_file, "--model", "best", "--metadata", "x-tester=1")
        assert said.startswith("best: a pipeline\n")
        assert "adder: a public model, reason: rule:testers" in said
        assert "step top_k" in said

    async def test_a_variants_own_name_goes_to_its_model(self, config_file: Path) -> None:
        said = await self.explain(config_file, "--model", "add_one_b")
        assert "called directly" in said

    async def test_an_unknown_model_is_answered_as_a_call_would_be(self, config_file: Path) -> None:
        code, said, _ = await run("explain", str(config_file), "--model", "addre", folder=config_file.parent)
        assert code == 1
        assert "NOT_FOUND: Request for unknown model: 'addre' is not found" in said
        assert "adder, best" in said

    async def test_a_version_that_no_variant_can_be_exits_as_an_unknown_model(self, tmp_path: Path) -> None:
        models = {"pinned": {"variants": {"a": {"upstream": "one", "model": "add_one_a", "version": "2"}}}}
        file = write(tmp_path / "gateway.yaml", config({"one": "triton:8001"}, models))
        for version, exits in (("2", 0), ("3", 1)):
            code, said, _ = await run(
                *("explain", str(file), "--model", "pinned", "--version", version), folder=tmp_path
            )
            assert (code, "no variant can be version 3" in said) == (exits, version == "3")

    async def test_a_model_that_the_running_gateway_does_not_have_exits_with_1(
        self, tmp_path: Path, gateway: Gateway
    ) -> None:
        """Such as one of a file that is not in force yet."""
        models = {"doubler": {"variants": {"a": {"upstream": "one", "model": "add_one_a"}}}}
        file = write(tmp_path / "gateway.yaml", config({"one": "triton:8001"}, models))
        arguments = ("explain", str(file), "--model", "doubler")
        assert (await run(*arguments, folder=tmp_path))[0] == 0
        code, said, _ = await run(*arguments, "--admin", gateway.admin_address, folder=tmp_path)
        assert (code, "the gateway has no public model 'doubler'" in said) == (1, True)


async def test_debug_says_each_decision_of_a_call_and_json_is_json(tmp_path: Path) -> None:
    """One that falls back from a server that is not there. Metadata is not said."""
    models = {
        "m": {"variants": {name: {"upstream": name, "model": "any"} for name in ("away", "here")}, "split": SPLIT}
    }
    for form in ("json", "text"):
        async with Script().serve() as address:
            listen, admin = free_address(), free_address()
            upstreams, more = {"away": free_address(), "here": address}, {"workers": 2, "listen": listen}
            content = config(upstreams, models, **more) | {"admin": {"listen": admin}}
            file = write(tmp_path / "gateway.yaml", content)
            flags = ("--log-level", "debug", "--log-format", form)
            async with command("serve", "--config", str(file), *flags, folder=tmp_path) as running:
                await running.until_said("2 workers on")
                await until_readyz(admin, True, 30)
                for worker in range(2):  # one is enough to be ready, and the other may not have said a word
                    await running.until_said(f'"worker": "{worker}"' if form == "json" else rf" \[{worker}\] ")
                async with channel_to(listen) as channel:
                    request = infer("m")
                    request.id = "r-7"
                    assert (await call(channel, request, metadata=[("x-secret", "hush")])).code is grpc.StatusCode.OK
                running.process.terminate()
                await running.wait()
                said = running.errors
        assert "hush" not in said
        if form == "json":
            lines = [json.loads(line) for line in said.splitlines()]
            assert {line["worker"] for line in lines} == {"0", "1", "supervisor"}
            of_calls = [line["message"] for line in lines if line["logger"] == "gateway.calls"]
            assert {line["request_id"] for line in lines if line["logger"] == "gateway.calls"} <= {"r-7"}
        else:
            of_calls = re.findall(r"Z \[\d\] DEBUG gateway\.calls: (.*) \(request 'r-7'\)$", said, re.MULTILINE)
        came, chosen, answered, ended = of_calls
        assert re.fullmatch(r"call 1: ModelInfer of 'm' from ipv4:127\.0\.0\.1:\d+", came)
        assert (
            f"attempt 1: variant 'here' at here/{address}, chosen by fallback in place of away (unavailable)" in chosen
        )
        assert re.search(r"attempt 1: OK in [\d.]+ ms$", answered)
        assert re.search(rf"ended with OK in [\d.]+ ms, answered by 'here' at {address}$", ended)


async def test_the_descriptor_set_has_every_method_that_is_served(tmp_path: Path) -> None:
    """As grpcurl and code generators read it: each import is there, before who imports it."""
    code, output, _ = await run("protos", str(tmp_path / "gateway.binpb"), folder=tmp_path)
    assert (code, output) == (0, "")
    declared = FileDescriptorSet.FromString((tmp_path / "gateway.binpb").read_bytes())
    pool, names = DescriptorPool(), set()
    for file in declared.file:
        pool.Add(file)
        names |= {f"{file.package}.{service.name}" for service in file.service}
    assert names == {*_SERVICES, "grpc.health.v1.Health"}
    assert pool.FindMethodByName("inference.GRPCInferenceService.ModelStreamInfer").server_streaming
    assert len({file.name for file in declared.file}) == len(declared.file)


async def test_the_schema_is_a_json_schema_that_accepts_the_examples(tmp_path: Path) -> None:
    code, output, _ = await run("schema", folder=tmp_path)
    assert code == 0
    schema = json.loads(output)
    jsonschema.Draft202012Validator.check_schema(schema)
    for example in (ROOT / "deploy" / "examples").glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(example.read_text()), schema)


async def test_models_list_says_what_is_built(tmp_path: Path) -> None:
    empty = tmp_path / "repository"
    empty.mkdir()
    code, output, _ = await run("models", "list", "--repository", str(empty), folder=tmp_path)
    assert code == 0
    rows = {line.split()[0]: line for line in output.splitlines()}
    assert rows.keys() >= {"efficientnet_lite0_onnx", "efficientnet_lite0_tensorrt", "magika", "langid"}
    assert all("missing" in row for row in rows.values())
    assert "GPU" in rows["efficientnet_lite0_tensorrt"]


async def test_models_list_says_which_are_the_user_s_own_and_why_one_cannot_be_loaded(tmp_path: Path) -> None:
    write_add(tmp_path / "models" / "plus" / "1" / "model.onnx", 1)
    empty = tmp_path / "models" / "empty"
    empty.mkdir()
    (empty / "config.pbtxt").write_text('backend: "onnxruntime"')
    code, output, _ = await run("models", "list", "--repository", str(tmp_path / "models"), folder=tmp_path)
    assert code == 0
    assert re.search(r"^plus +own +0\.0 MB  onnxruntime$", output, re.M)
    assert re.search(r"^empty +own .*can't be loaded here: its weights are missing", output, re.M)


async def test_models_build_names_the_models_that_there_are(tmp_path: Path) -> None:
    code, _, errors = await run("models", "build", "resnet", folder=tmp_path)
    assert code == 2
    assert "efficientnet_lite0_onnx" in errors


class TestTritonStart:
    async def test_serves_until_it_is_told_to_end_and_leaves_nothing(
        self, triton_repository: Path, tmp_path: Path
    ) -> None:
        arguments = ("--repository", str(triton_repository), "--model", "add_one_a", "--model", "params_echo")
        ports = [argument for name in ("grpc", "http", "metrics") for argument in (f"--{name}-port", str(free_port()))]
        async with command("triton", "start", *arguments, *ports, folder=tmp_path) as running:
            address = (await running.until_said(r"gRPC (\S+),"))[1]
            async with channel_to(address) as channel:
                assert (await call(channel, infer("add_one_a"))).code is OK
            below = descendants(running.pid)
            running.signal(signal.SIGINT)
            assert await running.wait() == 0
        assert below
        assert not any(map(is_running, below))

    async def test_its_end_by_itself_is_told_with_the_end_of_its_log(
        self, triton_repository: Path, tmp_path: Path
    ) -> None:
        arguments = ("--repository", str(triton_repository), "--model", "add_one_a")
        ports = [argument for name in ("grpc", "http", "metrics") for argument in (f"--{name}-port", str(free_port()))]
        async with command("triton", "start", *arguments, *ports, folder=tmp_path) as running:
            await running.until_said(r"gRPC (\S+),")
            server = next(pid for pid in descendants(running.pid) if executable(pid) == "tritonserver")
            os.kill(server, signal.SIGKILL)
            assert await running.wait() == 1
        assert "ended by itself" in running.errors
        assert "Traceback" not in running.errors

    async def test_a_taken_port_is_named(self, triton: LocalTriton, triton_repository: Path, tmp_path: Path) -> None:
        port = str(triton.grpc_port)
        arguments = ("--repository", str(triton_repository), "--model", "add_one_a", "--grpc-port", port)
        code, _, errors = await run("triton", "start", *arguments, folder=tmp_path)
        assert code == 1
        assert port in errors
        assert "Traceback" not in errors

    async def test_a_folder_without_models_is_refused(self, tmp_path: Path) -> None:
        code, _, errors = await run("triton", "start", "--repository", str(tmp_path / "none"), folder=tmp_path)
        assert code == 2
        assert "Traceback" not in errors


def executable(pid: int) -> str:
    return Path(f"/proc/{pid}/exe").readlink().name


async def test_serve_triton_is_that_triton_under_another_address(triton: LocalTriton, tmp_path: Path) -> None:
    """No config: any client, any model."""
    arguments = ("--triton", triton.grpc_address, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
    async with command("serve", *arguments, folder=tmp_path) as running:
        address, admin = await running.until_serving()
        await until_readyz(admin, True, within=5)
        with triton_client.InferenceServerClient(address) as here:
            with triton_client.InferenceServerClient(triton.grpc_address) as there:
                for asked in (lambda c: c.get_model_metadata("add_one_a"), lambda c: c.get_model_config("slow")):
                    assert asked(here) == asked(there)
                names = {model.name for model in there.get_model_repository_index().models}
                assert {model.name for model in here.get_model_repository_index().models} == names
            assert here.is_model_ready("classifier")
        async with channel_to(address) as channel, channel_to(triton.grpc_address) as direct:
            for request in (infer("add_one_b", [[1, 2, 3]]), infer("identity_bytes", [[b"x", b""]], "BYTES")):
                here_said, there_said = await call(channel, request), await call(direct, request)
                assert here_said.body == there_said.body
                assert here_said.code is OK
            unknown = await call(channel, infer("nobody"))
            assert unknown.code is grpc.StatusCode.NOT_FOUND
            assert unknown.text == (await call(direct, infer("nobody"))).text
        running.signal(signal.SIGTERM)
        assert await running.wait() == 0


async def test_a_reload_that_is_asked_for_during_the_start_ends_nothing(triton: LocalTriton, tmp_path: Path) -> None:
    arguments = ("--triton", triton.grpc_address, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
    async with command("serve", *arguments, folder=tmp_path) as running:
        await until(lambda: ignores_hangup(running.pid), 10, "the command's first line")
        for _ in range(20):
            running.signal(signal.SIGHUP)
            await asyncio.sleep(0.05)
        await running.until_serving()


def ignores_hangup(pid: int) -> bool:
    (ignored,) = re.findall(r"^SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(ignored, 16) & 1 << signal.SIGHUP - 1)


async def test_serve_triton_waits_for_a_triton_that_is_not_there_yet(
    triton_factory: TritonFactory, tmp_path: Path
) -> None:
    server = await triton_factory(["add_one_a"])
    await server.kill()
    arguments = ("--triton", server.grpc_address, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
    async with command("serve", *arguments, folder=tmp_path) as running:
        address, admin = await running.until_serving()
        await until_readyz(admin, False, within=5)
        async with channel_to(address) as channel:
            assert (await call(channel, infer("add_one_a"))).code is grpc.StatusCode.UNAVAILABLE
            await server.start()
            await until_readyz(admin, True, within=3)
            assert (await call(channel, infer("add_one_a"))).code is OK


async def test_the_environment_overrides_the_file_and_flags_override_both(triton: LocalTriton, tmp_path: Path) -> None:
    content = config({"one": triton.grpc_address}, {"m": {"variants": {"a": {"upstream": "one", "model": "slow"}}}})
    file = write(tmp_path / "g.yaml", {**content, "listen": "127.0.0.1:1"})
    environ = {"GATEWAY_LISTEN": free_address(), "GATEWAY_ADMIN_LISTEN": free_address()}
    admin = free_address()
    arguments = ("serve", "--config", str(file), "--admin-listen", admin)
    async with command(*arguments, folder=tmp_path, environ=environ) as running:
        assert await running.until_serving() == (environ["GATEWAY_LISTEN"], admin)
