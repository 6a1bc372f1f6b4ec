"""What `models optimise` tries, how it reads perf_analyzer's figures, and what it chooses by them."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from gateway.models.tuning import (
    Choice,
    Figures,
    NoFigures,
    Setting,
    batches,
    choose,
    config_text,
    middle,
    read_figures,
    settings,
    table,
)

ONE, SEVERAL_THREADS, SEVERAL_INSTANCES = Setting(1, 1), Setting(1, 2), Setting(2, 1)

# As perf_analyzer 2.60 writes it.
CSV = """Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,\
Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency
2,140.4,35,1021,7012,201,5910,44,2,19110,70020,99000,121750
"""


def test_figures_are_read_from_the_csv_of_perf_analyzer() -> None:
    assert read_figures(CSV) == Figures(140.4, 19.11, 121.75)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("", "no line of figures"),
        (CSV.splitlines()[0], "no line of figures"),
        (CSV.replace("p99 latency", "p98 latency"), "no column 'p99 latency'"),
        (CSV.replace("140.4", ""), "no number"),
        (CSV.replace("140.4", "nan"), "no request was answered"),
        (CSV.replace("140.4", "0"), "no request was answered"),
        (CSV.rsplit(",", 1)[0], "no number"),
    ],
)
def test_a_csv_without_figures_is_refused(table: str, told: str) -> None:
    with pytest.raises(NoFigures, match=told):
        read_figures(table)


@given(st.integers(1, 256))
def test_no_setting_uses_more_threads_than_there_are_cores(cores: int) -> None:
    tried = settings(cores)
    assert all(setting.instances * setting.threads <= cores for setting in tried)
    assert {ONE, Setting(cores, 1), Setting(1, cores)} <= set(tried)
    assert len(set(tried)) == len(tried) <= 50


@pytest.mark.parametrize(("most", "tried"), [(0, [1]), (1, [1]), (3, [1, 3]), (4, [1, 4]), (16, [1, 4, 16])])
def test_no_batch_is_larger_than_the_model_takes(most: int, tried: list[int]) -> None:
    assert batches(most) == tried


def figures(rate: float, p99: float = 10.0) -> Figures:
    return Figures(rate, p99 / 2, p99)


def test_the_highest_rate_is_chosen() -> None:
    choice = choose({(ONE, 1): figures(100), (SEVERAL_THREADS, 1): figures(150), (SEVERAL_INSTANCES, 1): figures(190)})
    assert choice.setting == SEVERAL_INSTANCES
    assert "190 rows/s, 27% more than the next setting" in choice.why[0]


def test_of_settings_that_are_alike_the_shorter_p99_decides_and_the_reason_names_the_other() -> None:
    choice = choose({(SEVERAL_INSTANCES, 1): figures(200, 30), (SEVERAL_THREADS, 1): figures(195, 12)})
    assert choice.setting == SEVERAL_THREADS
    assert "alike: 2 instances of 1 thread (30.0 ms)" in choice.why[0]


def test_of_settings_that_are_alike_in_all_the_least_is_chosen() -> None:
    assert choose({(SEVERAL_INSTANCES, 1): figures(100), (ONE, 1): figures(99)}).setting == ONE


def test_what_is_too_slow_for_the_limit_does_not_count() -> None:
    measured = {(ONE, 1): figures(100, 8), (SEVERAL_INSTANCES, 1): figures(190, 40)}
    assert choose(measured, most_ms=10).setting == ONE
    unheard = choose(measured, most_ms=5)
    assert unheard.setting == SEVERAL_INSTANCES
    assert "no setting keeps the p99 under 5 ms" in unheard.why[0]


@pytest.mark.parametrize(
    ("rates", "preferred"),
    [
        ({1: 100, 4: 105, 16: 108}, ()),
        ({1: 100, 4: 130, 16: 180}, (4, 16)),
        ({1: 100, 4: 150, 16: 90}, (4,)),
        ({1: 100}, ()),
    ],
)
def test_batches_are_preferred_where_they_gain_enough(rates: dict[int, float], preferred: tuple[int, ...]) -> None:
    assert choose({(ONE, batch): figures(rate) for batch, rate in rates.items()}).preferred == preferred


def test_rounds_are_told_by_their_median() -> None:
    assert middle([figures(100, 9), figures(900, 90), figures(120, 7)]) == figures(120, 9)


def test_the_config_that_is_printed_is_one_that_triton_reads() -> None:
    text = config_text(Choice(SEVERAL_INSTANCES, (4, 16), ()), batched=True)
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.instance_group[0].count == 2
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
    bare = text_format.Parse(config_text(Choice(ONE, (), ()), batched=False), model_config_pb2.ModelConfig())
    assert not bare.HasField("dynamic_batching")


def test_the_table_has_a_line_for_each_measurement_in_order() -> None:
    lines = table({(SEVERAL_INSTANCES, 1): figures(190), (ONE, 4): figures(80), (ONE, 1): figures(100)})
    assert [line.split()[:3] for line in lines[1:]] == [["1", "1", "1"], ["1", "1", "4"], ["2", "1", "1"]]
    assert len({len(line) for line in lines}) == 1
