"""A shadow's answers are compared with those that callers got, and no caller notices."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import fsspec
import grpc
import numpy as np
import pytest
from played_triton import PlayedTriton, hangs, played, playing
from test_upstream_faults import infer as large_infer
from traffic import OK, config, gateway, http, until, write
from triton_fixture import TritonFactory
from tritonclient.grpc import service_pb2 as pb
from v2_calls import call, channel_to, infer

from gateway.app import Gateway
from gateway.cli import main
from gateway.telemetry.replay import BadCapture, read, replay
from gateway.triton import LocalTriton

ADDERS = {
    "one": {"upstream": "main", "model": "add_one_a"},
    "same": {"upstream": "main", "model": "add_one_b"},
    "other": {"upstream": "main", "model": "add_two"},
}


def adder(**more: Any) -> dict[str, Any]:
    return {"adder": {"variants": ADDERS, "split": {"one": 1}, "fallback": "forbid", **more}}


def serve(triton: LocalTriton, folder: Path, models: dict[str, Any]) -> Any:
    return gateway(write(folder / "gateway.yaml", config({"main": triton.grpc_address}, models)))


def shadows(running: Gateway) -> dict[str, Any]:
    """What became of copies, by variant."""
    return {each.variant: each for each in running._shadows.now()}


async def done(running: Gateway, copies: int) -> dict[str, Any]:
    """What became of them, once these many copies have been dealt with."""
    total = lambda: sum(sum(each.results.values()) + sum(each.dropped.values()) for each in running._shadows.now())  # noqa: E731
    await until(lambda: total() >= copies, 20, f"{copies} copies", lambda: str(shadows(running)))
    return shadows(running)


@pytest.fixture
async def kept(triton: LocalTriton, tmp_path: Path) -> AsyncIterator[tuple[Gateway, Path]]:
    keep = {"directory": str(tmp_path / "kept"), "request": True}
    models = adder(shadow={"same": {"share": 1}, "other": {"share": 1, "keep": keep}})
    async with serve(triton, tmp_path, models) as running:
        yield running, tmp_path / "kept"


async def test_callers_get_the_variants_answer_and_differences_are_counted_and_kept(
    kept: tuple[Gateway, Path],
) -> None:
    running, folder = kept
    async with channel_to(running.listen) as channel:
        for _ in range(5):
            answer = await call(channel, infer("adder"))
            assert (answer.code, answer.trailers["gateway-variant"]) == (OK, "one")
        found = await done(running, 10)
    assert found["same"].results["agreed"] == 5
    assert found["other"].results["differed"] == 5
    assert found["other"].measures["absolute"] == 1.0
    (told,) = [e for e in (await http(running.admin_address, "/state"))[1]["shadows"] if e["variant"] == "other"]
    assert (told["results"]["differed"], told["mean_measures"]["absolute"]) == (5, 1.0)
    metrics = (await http(running.admin_address, "/metrics"))[1]
    assert 'gateway_shadow_copies_total{model="adder",result="differed",variant="other"} 5.0' in metrics
    lines = [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]
    assert len(lines) == 5
    line = lines[0]
    assert (line["variant"], line["shadow"]) == ("one", "other")
    assert line["why"].startswith("output 'OUT' differs in")
    assert pb.ModelInferRequest.FromString(base64.b64decode(line["request"])).model_name == "adder"
    (file,) = folder.iterdir()
    assert [pb.ModelInferRequest.FromString(each.body).model_name for each in read(str(file))] == ["adder"] * 5
    without = file.with_suffix(".without")
    without.write_text(json.dumps({key: value for key, value in line.items() if key != "request"}) + "\n")
    with pytest.raises(BadCapture, match="line 1: the request was not kept"):
        list(read(str(without)))


class OfNothing(PlayedTriton):
    """Answers with NaN."""

    async def infer(self, body: bytes, context: Any) -> bytes:
        answer = pb.ModelInferResponse.FromString(await super().infer(body, context))
        answer.outputs[0].datatype = "FP32"
        answer.raw_output_contents[0] = np.float32("nan").tobytes()
        return bytes(answer.SerializeToString())


async def test_answers_with_nan_are_counted_by_whose_they_are(tmp_path: Path) -> None:
    async with played() as well, playing(OfNothing()) as nan:
        variants = {"well": {"upstream": "well", "model": "net"}, "nan": {"upstream": "nan", "model": "net"}}
        models = {
            name: {"variants": variants, "split": {asked: 1}, "fallback": "forbid", "shadow": {other: {"share": 1}}}
            for name, asked, other in (("shadows", "well", "nan"), ("callers", "nan", "well"))
        }
        file = write(tmp_path / "gateway.yaml", config({"well": well.address, "nan": nan.address}, models))
        async with gateway(file) as running, channel_to(running.listen) as channel:
            for _ in range(3):
                for name in models:
                    assert (await call(channel, infer(name))).code is OK
            await done(running, 6)
            metrics = (await http(running.admin_address, "/metrics"))[1]
    for name, variant, whose, count in (
        ("shadows", "nan", "shadow", 3),
        ("shadows", "nan", "caller", 0),
        ("callers", "well", "shadow", 0),
        ("callers", "well", "caller", 3),
    ):
        labels = f'{{model="{name}",variant="{variant}",whose="{whose}"}}'
        assert f"gateway_not_finite_answers_total{labels} {count}.0" in metrics


async def test_what_is_kept_in_an_object_store_is_listed_and_asked_of_another_variant(
    triton: LocalTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = {"directory": "memory://disagreements/here", "request": True}
    file = write(
        tmp_path / "g.yaml",
        config({"main": triton.grpc_address}, adder(shadow={"other": {"share": 1, "keep": keep}})),
    )
    async with gateway(file) as running, channel_to(running.listen) as channel:
        for _ in range(3):
            assert (await call(channel, infer("adder"))).code is OK
        await done(running, 3)
    assert await asyncio.to_thread(main, ["experiment", "diffs", "adder", "--config", str(file)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("adder: 3 kept\n")
    assert told.count("one and other: output 'OUT' differs in") == told.count("can be replayed") == 3
    (kept,) = fsspec.filesystem("memory").ls("/disagreements/here", detail=False)
    for variant, codes in (("add_one_b", {"OK": 3}), ("add_two", {"OK": 3}), ("add_nothing", {"NOT_FOUND": 3})):
        asked = await replay([f"memory:/{kept}"], triton.grpc_address, model="adder", instead=variant)
        assert asked.codes == codes


async def test_a_shadow_that_hangs_costs_callers_nothing(tmp_path: Path) -> None:
    async with played() as good, played() as stuck:
        stuck.behaviour = hangs
        variants = {"good": {"upstream": "a", "model": "net"}, "stuck": {"upstream": "b", "model": "net"}}
        shadow = {"stuck": {"share": 1, "in_flight": 2, "timeout": "60s"}}
        models = {"net": {"variants": variants, "fallback": "forbid", "shadow": shadow}}
        file = write(tmp_path / "g.yaml", config({"a": good.address, "b": stuck.address}, models))
        async with gateway(file) as running, channel_to(running.listen) as channel:
            answers = await asyncio.gather(*(call(channel, large_infer(size=4)) for _ in range(200)))
            assert {answer.code for answer in answers} == {OK}
            assert {answer.trailers["gateway-variant"] for answer in answers} == {"good"}
            found = shadows(running)["stuck"]
            assert found.dropped["full"] == 200 - 64 - 2
            state = running.shown.state()["upstreams"]["b"]  # type: ignore[index]
            assert state[0]["state"] == "ready"  # whatever copies meet is no evidence against an endpoint


async def test_merged_calls_are_copied_one_by_one(triton: LocalTriton, tmp_path: Path) -> None:
    models = {
        "labels": {
            "variants": {
                "only": {"upstream": "main", "model": "classifier"},
                "again": {"upstream": "main", "model": "classifier", "version": "1"},
            },
            "merge": {"recheck": "10ms"},
            "shadow": {"again": {"share": 1, "in_flight": 64, "compare": {"classification": {}}}},
        }
    }
    async with serve(triton, tmp_path, models) as running, channel_to(running.listen) as channel:
        requests = [infer("labels", [[1.0, 2.0, 3.0, float(n)]], "FP32") for n in range(30)]
        made = merged = 0
        while not merged and made < 600:  # nothing merges before the model is proven to batch
            answers = await asyncio.gather(*(call(channel, request) for request in requests))
            assert {answer.code for answer in answers} == {OK}
            made += len(answers)
            merged += sum("gateway-batch" in answer.trailers for answer in answers)
        assert merged
        found = await done(running, made)
        assert found["again"].results["agreed"] + found["again"].dropped["full"] == made
        assert not found["again"].results["differed"]


async def test_a_pipelines_model_is_copied(triton: LocalTriton, tmp_path: Path) -> None:
    pipeline = {
        "inputs": [{"name": "IN", "datatype": "FP32", "shape": [4]}],
        "outputs": [{"name": "OUT", "datatype": "FP32", "shape": [4]}],
        "max_batch_size": 8,
        "steps": [{"call": "labels", "inputs": {"IN": "IN"}, "outputs": {"OUT": "OUT"}}],
    }
    variants = {
        "only": {"upstream": "main", "model": "classifier"},
        "again": {"upstream": "main", "model": "classifier", "version": "1"},
    }
    models = {"labels": {"variants": variants, "shadow": {"again": {"share": 1}}}, "piped": {"pipeline": pipeline}}
    async with serve(triton, tmp_path, models) as running, channel_to(running.listen) as channel:
        answer = await call(channel, infer("piped", [[1.0, 2.0, 3.0, 4.0]], "FP32"))
        assert answer.code is OK
        assert (await done(running, 1))["again"].results["agreed"] == 1


def piped(datatype: str, triton: LocalTriton, model: str, copy: str, **shadow: Any) -> dict[str, Any]:
    """A pipeline of one call, of which another model gets a copy."""
    tensor = {"datatype": datatype, "shape": [1]}
    pipeline = {
        "inputs": [{"name": "IN", **tensor}],
        "outputs": [{"name": "OUT", **tensor}],
        "max_batch_size": 1,
        "steps": [{"call": "numbers", "inputs": {"IN": "IN"}, "outputs": {"OUT": "OUT"}}],
    }
    variants = {"only": {"upstream": "main", "model": model}, "copy": {"upstream": "main", "model": copy}}
    numbers = {"variants": variants, "split": {"only": 1}, "fallback": "forbid"}
    models = {"numbers": {**numbers, "shadow": {"copy": {"share": 1, **shadow}}}, "piped": {"pipeline": pipeline}}
    return config({"main": triton.grpc_address}, models)


async def answers_of_pipeline(channel: grpc.aio.Channel, number: float, datatype: str, calls: int) -> set[bytes]:
    """What one caller got, call after call."""
    got = set()
    for _ in range(calls):
        answer = await call(channel, infer("piped", [[number]], datatype))
        assert answer.code is OK, answer.text
        got.add(pb.ModelInferResponse.FromString(answer.body).raw_output_contents[0])
    return got


async def test_a_pipelines_shadow_that_hangs_holds_up_neither_its_callers_nor_the_end(
    triton_factory: TritonFactory, tmp_path: Path
) -> None:
    """It sleeps for a minute. Its copies end by their own deadline, and what has no room is dropped."""
    triton = await triton_factory(["identity_int32", "slow"])
    calls, milliseconds = 80, 60_000
    for timeout in ("60s", "500ms"):
        told = piped("INT32", triton, "identity_int32", "slow", in_flight=1, timeout=timeout)
        async with gateway(write(tmp_path / "g.yaml", told)) as running, channel_to(running.listen) as channel:
            expected = {np.int32(milliseconds).tobytes()}
            assert await answers_of_pipeline(channel, milliseconds, "INT32", calls) == expected
            if timeout == "60s":
                assert not shadows(running)["copy"].results[
                    "failed"
                ]  # each caller had his answer before any copy ended
                assert shadows(running)["copy"].dropped["full"] == calls - 64 - 1
            else:
                await until(lambda: shadows(running)["copy"].results["failed"] >= 3, 20, "copies have ended")
                codes = running._shadows.table["numbers"][0].codes
                assert set(codes) == {"DEADLINE_EXCEEDED"}
                assert await answers_of_pipeline(channel, milliseconds, "INT32", 3) == expected
            assert running._shadows.table["numbers"][0].in_flight == 1
            await asyncio.wait_for(running.drain(), 30)  # it waits for calls, of which copies are none


async def test_a_pipelines_shadow_that_is_slow_is_compared_by_and_by(triton: LocalTriton, tmp_path: Path) -> None:
    told = piped("INT32", triton, "identity_int32", "slow", in_flight=1)
    async with gateway(write(tmp_path / "g.yaml", told)) as running, channel_to(running.listen) as channel:
        callers = [answers_of_pipeline(channel, 300, "INT32", 1) for _ in range(12)]
        assert await asyncio.gather(*callers) == [{np.int32(300).tobytes()}] * 12
        assert sum(shadows(running)["copy"].results.values()) < 12  # nobody has waited for them
        assert (await done(running, 12))["copy"].results["agreed"] == 12
        assert running._shadows.table["numbers"][0].seconds >= 12 * 0.3


async def test_a_pipelines_shadow_that_answers_nan_is_counted_and_nobody_else_has_it(
    triton: LocalTriton, tmp_path: Path
) -> None:
    told = piped("FP32", triton, "add_one_a", "faulty")
    async with gateway(write(tmp_path / "g.yaml", told)) as running, channel_to(running.listen) as channel:
        assert await answers_of_pipeline(channel, -1.0, "FP32", 20) == {np.float32(0.0).tobytes()}
        found = (await done(running, 20))["copy"]
        assert (found.results["differed"], found.wrong, found.wrong_here) == (20, 20, 0)
        metrics = (await http(running.admin_address, "/metrics"))[1]
        assert 'gateway_not_finite_answers_total{model="numbers",variant="copy",whose="shadow"} 20.0' in metrics


async def test_messages_of_streams_are_copied(kept: tuple[Gateway, Path]) -> None:
    running, _ = kept
    async with channel_to(running.listen) as channel:
        method = "/inference.GRPCInferenceService/ModelStreamInfer"
        stream = channel.stream_stream(method)(iter([infer("adder").SerializeToString()] * 3))
        answers = [pb.ModelStreamInferResponse.FromString(body) async for body in stream]
        assert len(answers) == 3
        assert not any(answer.error_message for answer in answers)
        found = await done(running, 6)
    assert found["same"].results["agreed"] == 3
    assert found["other"].results["differed"] == 3


async def test_large_requests_and_answers_are_compared(triton: LocalTriton, tmp_path: Path) -> None:
    variants = {
        "only": {"upstream": "main", "model": "identity_fp32"},
        "again": {"upstream": "main", "model": "identity_fp32", "version": "1"},
    }
    models = {"same": {"variants": variants, "shadow": {"again": {"share": 1}}}}
    async with serve(triton, tmp_path, models) as running, channel_to(running.listen) as channel:
        request = pb.ModelInferRequest(model_name="same")
        request.inputs.add(name="IN", datatype="FP32", shape=[1, 150_000])
        request.raw_input_contents.append(np.arange(150_000, dtype=np.float32).tobytes())
        answer = await call(channel, request)
        assert (answer.code, len(answer.body) > 600_000) == (OK, True)
        assert (await done(running, 1))["again"].results["agreed"] == 1


async def test_sequences_and_shared_memory_are_left_out(triton: LocalTriton, tmp_path: Path) -> None:
    variants = {
        "only": {"upstream": "main", "model": "accumulate"},
        "again": {"upstream": "main", "model": "accumulate", "version": "1"},
    }
    models = {"sums": {"variants": variants, "shadow": {"again": {"share": 1}}}}
    async with serve(triton, tmp_path, models) as running, channel_to(running.listen) as channel:
        request = infer("sums", [[5]], "INT32")
        request.parameters["sequence_id"].int64_param = 7
        request.parameters["sequence_start"].bool_param = True
        request.parameters["sequence_end"].bool_param = True
        assert (await call(channel, request)).code is OK
        assert sum(shadows(running)["again"].results.values()) == 0
        assert running._shadows.table["sums"][0].in_flight == 0


async def test_calls_fall_back_to_a_variant_only_once_its_answers_have_agreed(
    triton: LocalTriton, tmp_path: Path
) -> None:
    async with played() as broken:
        broken.behaviour = hangs
        variants = {
            "broken": {"upstream": "away", "model": "add_one_a", "attempt_timeout": "100ms"},
            **ADDERS,
        }
        parity = {"copies": 3, "agreement": 1}
        rules = [{"name": "broken", "match": {"metadata": {"x-broken": "1"}}, "variant": "broken"}]
        model = {
            "variants": variants,
            "split": {"one": 1},
            "rules": rules,
            "fallback": ["other", "same"],
            "shadow": {"same": {"share": 1, "parity": parity}, "other": {"share": 1, "parity": parity}},
        }
        upstreams = {"main": triton.grpc_address, "away": broken.address}
        file = write(tmp_path / "gateway.yaml", config(upstreams, {"adder": model}))
        async with gateway(file) as running, channel_to(running.listen) as channel:
            refused = await call(channel, infer("adder"), metadata=[("x-broken", "1")])
            assert refused.code is grpc.StatusCode.UNAVAILABLE
            for _ in range(3):
                assert (await call(channel, infer("adder"))).code is OK
            await done(running, 6)
            answer = await call(channel, infer("adder"), metadata=[("x-broken", "1")])
            assert (answer.code, answer.trailers["gateway-variant"]) == (OK, "same")  # and not "other", which differs
            metrics = (await http(running.admin_address, "/metrics"))[1]
            assert 'gateway_variant_parity{model="adder",variant="same"} 1.0' in metrics
            assert 'gateway_variant_parity{model="adder",variant="other"} 0.0' in metrics
