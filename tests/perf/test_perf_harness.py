"""The arithmetic of the load tests: medians, ratios by round, bars, tables. What they measure is no test's business."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from perf import gateways
from perf.__main__ import some_of
from perf.bars import lines
from perf.children import Child, NotStarted, Ports
from perf.instructions import read, table
from perf.load import Found, LoadFailed, believe, late, slope
from perf.merging import most
from perf.null import quoted, requests_in
from perf.report import Memory, Run, markdown
from perf.summary import DIRECT, ENVOY, GATEWAY, KSERVE, MERGING, NULL, SYSTEMS, Sample, Spread, of, ratio, spread


def sample(system: str, number: int, rate: float, *, scenario: str = "tiny-16", cpu: float = 50.0) -> Sample:
    return Sample(scenario, system, number, rate, p50=1000.0, p99=2000.0, cpu=cpu)


def test_a_median_comes_with_its_extremes() -> None:
    assert spread([3.0, 1.0, 9.0]) == Spread(3.0, 1.0, 9.0, 3)
    assert spread([1.0, 2.0]) == Spread(1.5, 1.0, 2.0, 2)
    assert spread([]) is None


def test_figures_of_other_scenarios_and_systems_do_not_mix() -> None:
    samples = [sample(GATEWAY, 0, 10.0), sample(ENVOY, 0, 99.0), sample(GATEWAY, 0, 77.0, scenario="tiny-1")]
    assert of(samples, "tiny-16", GATEWAY, "rate") == Spread(10.0, 10.0, 10.0, 1)


def test_a_ratio_is_taken_within_each_round() -> None:
    """A machine that is ten times slower for one round changes no ratio."""
    samples = [sample(GATEWAY, n, 120.0 / slow) for n, slow in enumerate((1, 10, 1))]
    samples += [sample(ENVOY, n, 100.0 / slow) for n, slow in enumerate((1, 10, 1))]
    found = ratio(samples, "tiny-16", "rate", GATEWAY, ENVOY)
    assert found is not None
    assert (found.low, found.middle, found.high) == pytest.approx((1.2, 1.2, 1.2))


def test_a_round_that_one_side_lacks_counts_for_nothing() -> None:
    samples = [sample(GATEWAY, 0, 50.0), sample(GATEWAY, 1, 300.0), sample(ENVOY, 1, 100.0)]
    assert ratio(samples, "tiny-16", "rate", GATEWAY, ENVOY) == Spread(3.0, 3.0, 3.0, 1)
    assert ratio(samples, "tiny-16", "rate", GATEWAY, KSERVE) is None


@pytest.mark.parametrize(
    ("rate", "met"),
    [pytest.param(120.0, "aim", id="aim"), pytest.param(100.0, "must", id="must"), pytest.param(99.0, "no", id="not")],
)
def test_a_bar_says_whether_must_or_aim_is_met(rate: float, met: str) -> None:
    samples = [sample(GATEWAY, 0, rate), sample(ENVOY, 0, 100.0)]
    line = next(each for each in lines(samples) if each.what == "throughput ÷ Envoy · tiny-16")
    assert (line.met, line.must, line.aim) == (met, "≥ 1", "≥ 1.2")


def test_a_bar_may_be_the_other_systems_cost_over_ours() -> None:
    samples = [
        sample(GATEWAY, 0, 1.0, scenario="picture", cpu=100.0),
        sample(KSERVE, 0, 1.0, scenario="picture", cpu=350.0),
    ]
    (line,) = lines(samples)
    assert (line.measured, line.met) == ("3.50 (3.50–3.50)", "must")


def test_the_merging_gateways_cpu_counts_with_tritons() -> None:
    samples = [
        Sample("tiny-16", MERGING, 0, 1.0, p50=1.0, p99=1.0, cpu=50.0, triton_cpu=70.0),
        Sample("tiny-16", DIRECT, 0, 1.0, p50=1.0, p99=1.0, cpu=0.0, triton_cpu=200.0),
    ]
    line = next(each for each in lines(samples) if "CPU" in each.what)
    assert (line.must, line.measured, line.met) == ("≤ 0.8", "0.60 (0.60–0.60)", "must")


def test_one_caller_of_the_merging_gateway_is_held_against_the_one_that_does_not_merge() -> None:
    samples = [sample(MERGING, 0, 98.0, scenario="single"), sample(GATEWAY, 0, 100.0, scenario="single")]
    assert [(each.must, each.measured[:4], each.met) for each in lines(samples)] == [
        ("≥ 0.97", "0.98", "must"),
        ("≤ 1.03", "1.00", "aim"),
    ]


def test_the_open_loops_rate_goes_by_the_most_that_direct_calls_reach() -> None:
    samples = [sample(DIRECT, n, rate) for n, rate in enumerate((100.0, 300.0, 110.0))]
    samples += [sample(DIRECT, 0, 90.0, scenario="tiny-64"), sample(ENVOY, 0, 999.0)]
    assert most(samples) == 110.0
    assert most(samples[-1:]) is None


@pytest.mark.parametrize(
    ("log", "share"),
    [
        pytest.param("Throughput: 4 infer/sec", 0.0, id="under-1-per-cent-it-says-nothing"),
        pytest.param("the desired request rate. 12.40% of the requests were delayed. ", 0.124, id="it-says-how-many"),
    ],
)
def test_requests_that_left_late_are_counted(log: str, share: float) -> None:
    assert late(log) == pytest.approx(share)


@pytest.mark.parametrize(
    ("served", "delayed", "problem"),
    [
        pytest.param(1000, 0.0, None, id="as-many-rows-as-answers"),
        pytest.param(1400, 0.25, None, id="rows-before-and-after-the-windows"),
        pytest.param(899, 0.0, "only 899 rows", id="answers-that-triton-never-gave"),
        pytest.param(1000, 0.26, "26% of the requests left late", id="a-rate-that-was-not-sent"),
    ],
)
def test_a_result_that_cannot_be_is_refused(served: int, delayed: float, problem: str | None) -> None:
    found = Found(rate=500.0, p50=1.0, p99=1.0, served=served, client_seconds=1.0, late=delayed)
    if problem is None:
        believe(found, 2.0)
    else:
        with pytest.raises(LoadFailed, match=problem):
            believe(found, 2.0)


def test_every_system_can_be_named_in_a_list() -> None:
    assert some_of(SYSTEMS)(",".join(SYSTEMS)) == SYSTEMS


def test_a_name_that_is_unknown_is_told_with_those_that_are_known() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no 'Envoi', but direct, Envoy"):
        some_of(SYSTEMS)("direct,Envoi")


def test_bars_without_samples_are_left_out() -> None:
    assert lines([]) == []


def test_the_report_has_the_machine_every_scenario_and_what_failed() -> None:
    run = Run({"CPU": "2 cores"}, {"rounds": "1"}, [sample(GATEWAY, 0, 1234.0)])
    run.memory.append(Memory("1000 idle connections", GATEWAY, 90 << 20, 104 << 20))
    run.failures.append("HAProxy: gone")
    text = markdown(run, {"tiny-16": "Tiny tensors, 16 clients"})
    for part in (
        "- CPU: 2 cores",
        "## Tiny tensors, 16 clients",
        "1,234 (1,234–1,234)",
        "| 90 | 104 |",
        "- HAProxy: gone",
    ):
        assert part in text


def test_a_rate_is_taken_where_the_count_rises() -> None:
    """What comes before the first answer and after the last one is no part of it."""
    seen = [(0.0, 5), (1.0, 5), (2.0, 7), (3.0, 9), (4.0, 11), (5.0, 11)]
    assert slope(seen) == pytest.approx(2.0)
    assert slope(seen[:3]) is None


def test_every_figure_is_also_given_as_a_share_of_the_null_servers() -> None:
    samples = [sample(GATEWAY, 0, 150.0), sample(NULL, 0, 600.0, cpu=10.0)]
    told = markdown(Run({}, {}, samples), {})
    head, shares = told.split(f"The same ÷ the {NULL}'s:")
    assert "| null server | 600" in head
    assert "| gateway | 0.25 (0.25–0.25) | 1.00 (1.00–1.00) | 1.00 (1.00–1.00) | 5.00 (5.00–5.00) |" in shares
    assert "The same ÷" not in markdown(Run({}, {}, samples[:1]), {})


def test_what_the_null_server_has_answered_is_what_nginx_counts() -> None:
    status = (
        "Active connections: 3 \nserver accepts handled requests\n 12 11 4711 \nReading: 0 Writing: 3 Waiting: 0 \n"
    )
    assert requests_in(status) == 4711
    with pytest.raises(ValueError, match="no status"):
        requests_in("404 Not Found")


def test_an_answer_of_any_bytes_can_stand_in_nginxs_config() -> None:
    assert quoted(b'\0\x0a"\\') == b'\0\x0a\\"\\\\'


def test_only_the_merging_gateway_merges() -> None:
    for merge in (True, False):
        public = gateways.config(8001, merge=merge)["models"]
        assert {name for name, model in public.items() if "merge" in model} == (
            {gateways.TINY, gateways.IMAGENET} if merge else set()
        )


def test_every_public_model_is_split_and_sticky() -> None:
    config = gateways.config(8001, routes=10, variants=5)
    split = [model for model in config["models"].values() if "split" in model]
    assert len(split) == 10
    assert all(model["sticky"] for model in split)
    assert len(config["models"][gateways.TINY]["variants"]) == 5


def test_a_child_is_measured_while_it_runs_and_gone_afterwards(tmp_path: Path) -> None:
    port = Ports().take()
    serve = f"import socket, time; sum(range(10**7)); s = socket.create_server(('127.0.0.1', {port})); time.sleep(60)"
    with Child([sys.executable, "-c", serve], port, tmp_path / "log") as child:
        assert child.cpu_seconds() > 0
        assert child.resident_bytes() > 1 << 20
    assert child.process.poll() is not None


def test_a_child_that_ends_early_shows_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(NotStarted, match="no such model"), Child(command, Ports().take(), tmp_path / "log"):
        pass


def test_what_a_function_costs_is_told_from_what_it_calls() -> None:
    """In callgrind's file a line after `calls=` has the cost of all of these calls; a name stands there once."""
    told = """\
fn=(1) PyObject_Vectorcall
0 30
cfn=(2) CPyDef_call___Call___begin
calls=10 0
0 5000
fn=(2)
0 1000
cfn=(3) PyDict_GetItem
calls=40 0
0 4000
fn=(3)
0 4000
"""
    costs = read(told.splitlines())
    assert costs.own == {"PyObject_Vectorcall": 30, "CPyDef_call___Call___begin": 1000, "PyDict_GetItem": 4000}
    first, _, slowest, *_ = table(costs, 3)
    assert first == "10 calls, 503 instructions each"
    assert slowest.split() == ["4.00", "400", "400", "PyDict_GetItem"]
