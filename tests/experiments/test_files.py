"""`inference-gateway experiment analyse`: files in, a verdict or a clear error out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from gateway.cli import main
from gateway.experimentation.files import BadFile, plan_of, read_exposures, read_outcomes

PLAN = """\
experiments:
  spring:
    arms: {old: 50, new: 50}
    outcomes:
      bought: {kind: binary, better: higher}
      latency: {kind: duration, better: lower}
    primary: bought
    guardrails: {latency: {worse_by: 10%}}
    smallest_effect: 5%
    units: 2000
"""
EXPOSURES = "unit,arm,at\nu1,old,2026-03-01T10:00:00Z\nu2,new,1772359260\nu3,new,2026-03-01 10:02:00.5\n"
OUTCOMES = "unit,name,value,at,report_id\nu1,bought,1,2026-03-01T10:05:00+00:00,r1\nu2,latency,0.25,1772359999.25,r2\n"

CELLS = st.sampled_from(
    ["u1", "old", "new", "1e9", "2026-01-01", "bought", "1", "0.5", "", "nan", '"', "-", "1e999", "\0"]
) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)

Analyse = Callable[..., tuple[int, str, str]]


@pytest.fixture
def analyse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Analyse:
    """Run the command over these texts; exit code, output and errors."""

    def run(
        *flags: str, exposures: str = EXPOSURES, outcomes: str = OUTCOMES, plan: str = PLAN
    ) -> tuple[int, str, str]:
        for name, text in (("e.csv", exposures), ("o.csv", outcomes), ("plan.yaml", plan)):
            (tmp_path / name).write_text(text)
        files = [
            f"--{flag}={tmp_path / name}"
            for flag, name in (("exposures", "e.csv"), ("outcomes", "o.csv"), ("config", "plan.yaml"))
        ]
        code = main(["experiment", "analyse", *files, *flags])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def many(
    count: int, rates: tuple[float, float], seed: int = 1
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    rng = np.random.default_rng(seed)
    exposures, outcomes = [], []
    for place in range(count):
        arm, at = int(rng.integers(0, 2)), 1.7e9 + place
        exposures.append({"unit": f"u{place}", "arm": ("old", "new")[arm], "at": at})
        if rng.random() < rates[arm]:
            outcomes.append({"unit": f"u{place}", "name": "bought", "value": 1.0, "at": at + 0.5})
        outcomes.append({"unit": f"u{place}", "name": "latency", "value": rng.lognormal(-3, 0.5), "at": at + 0.5})
    return exposures, outcomes


def as_csv(rows: list[dict[str, object]]) -> str:
    return "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]) + "\n"


def test_a_verdict_reads_like_an_answer(analyse: Analyse) -> None:
    exposures, outcomes = many(3_000, (0.2, 0.3))
    code, said, _ = analyse(exposures=as_csv(exposures), outcomes=as_csv(outcomes))
    assert code == 0
    assert said.startswith("spring, after 3000 units: 'new' is better.")
    assert "guardrail held: latency" in said
    assert "Move traffic to 'new'." in said


def test_json_has_the_same_for_machines_and_every_look(analyse: Analyse) -> None:
    exposures, outcomes = many(1_000, (0.2, 0.4))
    code, said, _ = analyse("--json", "--each=250", exposures=as_csv(exposures), outcomes=as_csv(outcomes))
    report = json.loads(said)
    assert code == 0
    assert (report["answer"], report["arm"], report["primary"][0]["judgement"]) == ("treatment", "new", "better")
    assert [look["units"] for look in report["looks"]] == [250, 500, 750, 1000]
    _, without, _ = analyse("--json", exposures=as_csv(exposures), outcomes=as_csv(outcomes))
    assert "looks" not in json.loads(without)


def test_looks_are_lines(analyse: Analyse) -> None:
    exposures, outcomes = many(400, (0.2, 0.4))
    _, said, _ = analyse("--each=100", exposures=as_csv(exposures), outcomes=as_csv(outcomes))
    assert [line.split()[0] for line in said.splitlines()[:4]] == ["100", "200", "300", "400"]


def test_parquet_says_what_csv_says(analyse: Analyse, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exposures, outcomes = many(500, (0.2, 0.4))
    _, as_text, _ = analyse("--json", exposures=as_csv(exposures), outcomes=as_csv(outcomes))
    files = []
    for name, rows in (("exposures", exposures), ("outcomes", outcomes)):
        table = pyarrow.Table.from_pylist(rows)
        moments = pyarrow.array(np.array([row["at"] for row in rows]) * 1e9, pyarrow.float64()).cast(pyarrow.int64())
        table = table.set_column(table.schema.get_field_index("at"), "at", moments.cast(pyarrow.timestamp("ns", "UTC")))
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        files += [f"--{name}", str(tmp_path / f"{name}.parquet")]
    assert main(["experiment", "analyse", *files, "--config", str(tmp_path / "plan.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(as_text)


def test_what_does_not_count_is_said(analyse: Analyse) -> None:
    exposures = EXPOSURES.replace("unit,arm,at", "unit,arm,at,forced").replace("\nu", "\nu").replace("Z\n", "Z,\n")
    exposures = "unit,arm,at,forced\nu1,old,1e9,\nu2,new,1e9,false\nu3,new,1e9,true\nu4,old,1e9,0\nu4,new,1e9,0\n"
    outcomes = (
        "unit,name,value,at,report_id\nu1,bought,1,1e9,r\nu1,bought,1,1e9,r\nu9,bought,1,1e9,\n"
        "u3,bought,1,1e9,\nu2,clicked,7,1e9,\nu2,bought,0,9e8,\n"
    )
    code, said, _ = analyse("--json", exposures=exposures, outcomes=outcomes)
    account = json.loads(said)["account"]
    assert code == 0
    assert {key: account[key] for key in account if account[key]} == {
        "exposures": 5,
        "repeated_exposures": 1,
        "units": 2,
        "forced_units": 1,
        "units_in_two_arms": 1,
        "outcomes": 6,
        "repeated_reports": 1,
        "without_exposure": 1,
        "of_excluded_units": 1,
        "of_other_names": 1,
        "before_exposure": 1,
    }


def test_records_of_other_experiments_are_left_alone(analyse: Analyse) -> None:
    exposures = "experiment,unit,arm,at\nspring,u1,old,1e9\nautumn,u2,blue,yesterday\n"
    code, said, _ = analyse("--json", exposures=exposures)
    assert (code, json.loads(said)["account"]["exposures"]) == (0, 1)


FAULTS = {
    "no column": ("e", "arm", "variant", "has no column 'arm'; its columns: unit, variant, at"),
    "column twice": ("e", "unit,arm,at", "unit,arm,at,at", "e.csv: has column 'at' twice"),
    "unknown arm": (
        "e",
        "u2,new",
        "u2,newer",
        "e.csv:3: arm 'newer' is not in the plan; known: old, new (did you mean 'new'?)",
    ),
    "no unit": ("e", "u2,new", ",new", "e.csv:3: 'unit' is empty"),
    "cells": ("e", "u2,new,", "u2,", "e.csv:3: has 2 cells, the header 3"),
    "no time": ("e", "1772359260", "noon", "e.csv:3: 'at' is 'noon'; ISO 8601"),
    "not a time": ("e", "1772359260", "nan", "e.csv:3: 'at' is 'nan'"),
    "negative time": ("e", "1772359260", "-1", "e.csv:3: 'at' is '-1', before 1970"),
    "future": ("e", "1772359260", "2126-01-01", "which is in the future"),
    "milliseconds": ("e", "1772359260", "1772359260000", "not milliseconds"),
    "not a number": ("o", "0.25", "fast", "o.csv:3: 'value' is 'fast'; a number"),
    "digits with lines": ("o", "0.25", "1_000", "'value' is '1_000'; a number"),
    "before all time": ("e", "1772359260", "0001-01-01T00:00:00+23:59", "e.csv:3: 'at' is '0001-01-01T00:00:00+23:59'"),
    "infinite": ("o", "0.25", "inf", "o.csv:3: 'value' is 'inf'; a finite number"),
    "negative duration": ("o", "0.25", "-0.25", "a duration in seconds"),
    "not binary": ("o", "bought,1,", "bought,0.5,", "o.csv:2: 'value' is '0.5'; 0 or 1"),
    "of nobody": ("o", "u1,bought", ",bought", "o.csv:2: has neither 'unit' nor 'request_id'"),
    "not CSV": ("o", "u1,bought", '"u1,bought', "o.csv: is not CSV"),
    "empty": ("e", EXPOSURES, "", "has no column 'unit', 'arm', 'at'; its columns: none"),
    "no rows": ("e", EXPOSURES.partition("\n")[2], "", "no unit counts: there is none"),
}


@pytest.mark.parametrize(("file", "old", "new", "said"), FAULTS.values(), ids=FAULTS)
def test_a_bad_file_is_refused_with_its_line(analyse: Analyse, file: str, old: str, new: str, said: str) -> None:
    texts = {"exposures": EXPOSURES, "outcomes": OUTCOMES}
    name = "exposures" if file == "e" else "outcomes"
    assert old in texts[name]
    texts[name] = texts[name].replace(old, new, 1)
    code, output, errors = analyse(**texts)
    assert (code, output) == (2, "")
    assert said in errors


@pytest.mark.parametrize("zone", ["", "T00:00:00+02:00"])
def test_outcomes_by_day_beside_exposures_by_time_are_refused(analyse: Analyse, zone: str) -> None:
    """What became of a unit on its first day would be dated before it came."""
    outcomes = f"unit,name,value,at\nu1,bought,1,2026-03-01{zone}\nu2,latency,0.25,2026-03-02{zone}\n"
    code, _, error = analyse(outcomes=outcomes)
    assert code == 2
    assert "would count as its past" in error
    by_day = "unit,arm,at\nu1,old,2026-03-01\nu2,new,2026-03-01\n"
    assert analyse(exposures=by_day, outcomes=outcomes)[0] == 0


def test_all_faults_are_told_at_once_up_to_a_bound(analyse: Analyse) -> None:
    rows = "".join(f"u{place},neither,1e9\n" for place in range(100))
    code, _, errors = analyse(exposures=f"unit,arm,at\n{rows}")
    assert code == 2
    assert len(errors.splitlines()) == 21


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "e.parquet").write_text(EXPOSURES)
    (tmp_path / "e.csv").write_bytes(b"\xff\xfe")
    for name, said in (
        ("e.parquet", "is not Parquet"),
        ("e.csv", "is not UTF-8"),
        ("no.csv", "No such file"),
        (".", "cannot be read"),
    ):
        flags = ["--exposures", str(tmp_path / name), "--outcomes", str(tmp_path / name)]
        assert main(["experiment", "analyse", *flags, "--config", str(tmp_path / "plan.yaml")]) == 2
        assert said in capsys.readouterr().err


def test_of_several_experiments_one_must_be_named(analyse: Analyse) -> None:
    two = PLAN + PLAN.partition("\n")[2].replace("spring", "autumn")
    code, _, errors = analyse(plan=two)
    assert (code, "name one by --name: spring, autumn" in errors) == (2, True)
    assert analyse("--name=spring", plan=two)[0] == 0
    assert "no experiment 'sprig'" in analyse("--name=sprig", plan=two)[2]


def test_nothing_of_it_is_loaded_for_help_and_its_absence_is_said() -> None:
    heavy = "{'scipy', 'pyarrow', 'numpy'} & {name.partition('.')[0] for name in sys.modules}"
    program = (
        f"import sys; from gateway.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint({heavy})"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "set()"


def test_without_scipy_it_says_what_to_install(analyse: Analyse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    code, _, errors = analyse()
    assert (code, "pip install 'inference-gateway[experiments]'" in errors) == (1, True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(CELLS, min_size=1, max_size=5), max_size=6), st.booleans())
def test_whatever_is_in_a_file_becomes_records_or_a_refusal(
    tmp_path: Path, rows: list[list[str]], is_headed: bool
) -> None:
    """No other error, and no endless work."""
    (tmp_path / "plan.yaml").write_text(PLAN)
    plan = plan_of(str(tmp_path / "plan.yaml"), None)
    file = tmp_path / "any.csv"
    header = "unit,arm,at,name,value\n" if is_headed else ""
    file.write_text(header + "".join(",".join(row) + "\n" for row in rows), encoding="utf-8", newline="")
    for read in (read_exposures, read_outcomes):
        with suppress(BadFile):
            read(plan, str(file), 1.8e9)


# --- Arms whose shares changed on the way

BANDIT = PLAN.replace("    guardrails: {latency: {worse_by: 10%}}\n", "").replace(
    "    units: 2000\n", "    units: 2000\n    window: 1s\n    bandit: {epoch: 1m}\n"
)


def moved(count: int, *, is_named: bool = False) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Two epochs. In the second one nine tenths have 'new', and all buy more; no arm is better."""
    rng = np.random.default_rng(2)
    exposures, outcomes = [], []
    for place in range(count):
        number = int(place >= count // 2)
        share = (0.5, 0.9)[number]
        arm, at = int(rng.random() < share), 1.7e9 + place
        own = {"propensity": round(share if arm else 1.0 - share, 6)}
        both = {"propensity_old": 1.0 - share, "propensity_new": share}
        row = {"unit": f"u{place}", "arm": ("old", "new")[arm], "at": at}
        exposures.append(row | (both if is_named else own))
        if rng.random() < (0.2, 0.6)[number]:
            outcomes.append({"unit": f"u{place}", "name": "bought", "value": 1.0, "at": at + 0.5})
    return exposures, outcomes


@pytest.mark.parametrize("plan", [PLAN, BANDIT], ids=["any plan", "a bandit's plan"])
@pytest.mark.parametrize("is_named", [False, True], ids=["propensity", "propensity_ARM"])
def test_propensities_are_what_units_count_by(analyse: Analyse, plan: str, is_named: bool) -> None:
    exposures, outcomes = moved(4_000, is_named=is_named)
    bare = [{key: row[key] for key in ("unit", "arm", "at")} for row in exposures]
    if plan == PLAN:  # without them shares look wrong, and so would the effect
        code, said, _ = analyse("--json", exposures=as_csv(bare), outcomes=as_csv(outcomes), plan=plan)
        assert (code, json.loads(said)["answer"]) == (0, "invalid")
        assert json.loads(said)["primary"][0]["low"] > 0.0
    code, said, _ = analyse("--json", exposures=as_csv(exposures), outcomes=as_csv(outcomes), plan=plan)
    report = json.loads(said)
    assert (code, report["answer"], report["sample_ratio"]["is_mismatched"]) == (0, "undecided", False)
    assert [epoch["shares"] for epoch in report["epochs"]] == [{"old": 0.5, "new": 0.5}, {"old": 0.1, "new": 0.9}]
    assert report["primary"][0]["method"].startswith("inverse propensity")
    assert abs(report["primary"][0]["difference"]) < 0.05


def test_a_third_arm_takes_the_propensities_of_all_arms(analyse: Analyse) -> None:
    plan = BANDIT.replace("{old: 50, new: 50}", "{old: 1, new: 1, other: 1}")
    exposures, outcomes = moved(400)
    code, _, errors = analyse(exposures=as_csv(exposures), outcomes=as_csv(outcomes), plan=plan)
    wanted = "'propensity' is not enough for 3 arms; 'propensity_old', 'propensity_new', 'propensity_other'"
    assert (code, wanted in errors) == (2, True), errors
    exposures, outcomes = moved(400, is_named=True)
    thirds = [
        row | {"propensity_old": 0.3, "propensity_new": 0.3, "propensity_other": 0.4 + off}
        for off, rows in ((0.0, exposures[:-1]), (0.1, exposures[-1:]))
        for row in rows
    ]
    code, _, errors = analyse(exposures=as_csv(thirds), outcomes=as_csv(outcomes), plan=plan)
    assert (code, "e.csv:401: the propensities have the sum 1.1; 1" in errors) == (2, True), errors
    code, said, _ = analyse(exposures=as_csv(thirds[:-1]), outcomes=as_csv(outcomes), plan=plan)
    assert (code, "MISMATCH" in said) == (0, True)  # nobody came to the third


@pytest.mark.parametrize("cell", ["0", "1", "1.5", "-0.1", "nan", "", "often"])
def test_a_propensity_is_a_probability(analyse: Analyse, cell: str) -> None:
    exposures, outcomes = moved(10)
    exposures[3]["propensity"] = cell
    code, _, errors = analyse(exposures=as_csv(exposures), outcomes=as_csv(outcomes), plan=BANDIT)
    assert (code, "e.csv:5: 'propensity' is" in errors) == (2, True), errors


def test_a_bandits_units_need_their_propensity(analyse: Analyse) -> None:
    exposures, outcomes = many(100, (0.2, 0.3))
    code, _, errors = analyse(exposures=as_csv(exposures), outcomes=as_csv(outcomes), plan=BANDIT)
    assert (code, "has no column 'propensity', without which" in errors) == (2, True), errors
