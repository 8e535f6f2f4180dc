"""`c2al experiment` from Parquet to the report, on a small set with planted cohorts and on real impressions."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2al.__main__ import main
from c2al.config import Arm, Axis, Config, load_config, replace, save_config
from c2al.data.cohorts import CohortSpec, Condition, read_cohorts, write_cohorts
from c2al.distributed.process import process_group
from c2al.errors import ConfigError, DataError
from c2al.evaluation.evaluate import evaluate, paired
from c2al.evaluation.result import read_evaluation
from c2al.experiment.choose import _count, cohorts_of
from c2al.experiment.run import experiment
from c2al.report.record import Record, read_record
from c2al.training.score import score
from c2al.training.trainer import Trainer, train
from impressions import splits, write_impressions
from ranks import run_ranks

ROOT = Path(__file__).parents[2]
KUAIRAND = ROOT.parent / "shared" / "data" / "kuairand_pure"
LAMBDA = "train.auxiliary_lambda"
SLOWER = {"train.optimizer.dense_lr": 0.0005}
OF_ALL_ARMS = ("label", "weight", "user_id", "row_id", "time")
"""Columns that evaluation pairs rows by, or that say what is predicted."""
ARMS = (
    Arm(name="c2al", cohorts="chosen", select={LAMBDA: [0.1, 0.5]}),
    Arm(name="placebo", cohorts="shuffled"),
    Arm(name="random_pair", cohorts="random"),
    Arm(name="head_only", cohorts="one"),
)


def small(folder: Path, arms: tuple[Arm, ...] = (), **settings: object) -> Config:
    """Two epochs on planted cohorts, every step's loss logged; in folder/c.toml."""
    own = {"train.epochs": 2, "train.log_every": 1, "discover.min_rows": 100, "experiment.seeds": (0, 1)}
    config = dataclasses.replace(replace(splits(folder), **{**own, **settings}), arms=arms)
    save_config(config, folder / "c.toml")
    return config


def words(folder: Path, *more: str) -> list[str]:
    return ["experiment", "--config", str(folder / "c.toml"), "--output", str(folder / "out"), *more]


def trained(out: Path) -> dict[str, int]:
    """Every file that training wrote, with when it was written."""
    files = [p for p in (out / "trainings").rglob("*") if p.name in ("result.json", "part-00000.parquet")]
    return {str(p): p.stat().st_mtime_ns for p in files}


def trained_folders(out: Path) -> list[Path]:
    """result.json of every training that has ended."""
    return list((out / "trainings").rglob("result.json"))


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished experiment of two seeds."""
    folder = tmp_path_factory.mktemp("experiment")
    small(folder, arms=ARMS)
    assert main(words(folder)) == 0
    return folder


def test_it_ends_with_a_report_and_every_number_behind_it(done):
    out = done / "out"
    evaluation = json.loads((out / "evaluation" / "evaluation.json").read_text())
    names = [(s["axis"], s["name"]) for s in evaluation["segments"]]
    assert names[:3] == [("overall", "overall"), ("cohort", "head"), ("cohort", "tail")]
    ne_diff = evaluation["segments"][0]["differences"][0]["estimates"]["ne"]
    assert len(ne_diff["per_seed"]) == 2
    low, high = ne_diff["interval"]
    assert low <= ne_diff["value"] <= high
    chosen = json.loads((out / read_record(out).discovery / "cohorts.json").read_text())["chosen"]
    assert {chosen["head"]["axis"], chosen["tail"]["axis"]} == {"surface"}, "the planted axis"
    html = (out / "report.html").read_text()
    assert f"{abs(ne_diff['value']):.3%}" in html
    assert "<svg" in html
    assert "<script" not in html
    assert "http://" not in html.replace("http://www.w3.org", ""), "self-contained"
    proof = json.loads((out / "serving" / "proof.json").read_text())
    assert proof["rows_compared"] == 2048


def test_a_result_says_how_many_steps_were_done(done):
    results = list((done / "out" / "trainings").glob("*/seed_*/result.json"))
    assert results
    for path in results:
        records = (path.parent / "run" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(path.read_text())["steps"] == json.loads(records[-1])["step"] > 0


def test_the_report_shows_every_kind_of_record_that_training_wrote(done):
    """Read from what training writes, not from records that a test made up."""
    record = read_record(done / "out")
    run = done / "out" / record.arms[0].folders(record.seeds)[0] / "run"
    kinds = {json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    titles = {
        "gramian": "Gradients of the tasks</h3>",
        "y": "Distribution of Y in the FM attention</h3>",
        "units": "Dead units</h3>",
        "weights": "Change of the weights</h3>",
    }
    assert kinds == {"train", "validation", *titles}
    html = (done / "out" / "report.html").read_text()
    for title in titles.values():
        _, found, rest = html.partition(title)
        assert found, title
        assert "<td" in rest.partition("<h3>")[0], "a table with rows"


def test_all_arms_of_a_seed_start_from_the_same_weights_and_read_the_same_batches(done):
    """The primary task before the first update: logits to the bit, the loss to the rounding of its float32 mean, which
    one and several tasks sum in another order."""
    record = read_record(done / "out")
    for seed in (0, 1):
        first, losses = {}, []
        for arm in (record.baseline, *record.arms):
            for trial in arm.trials:
                path = done / "out" / "trainings" / trial.name / f"seed_{seed}" / "run" / "metrics.jsonl"
                line = json.loads(path.read_text().splitlines()[0])
                assert line["step"] == 1
                first[trial.name] = line["window"]["primary"]["all"]["ne"]
                losses.append(line["loss"]["primary"])
        assert len(first) == 6
        assert len(set(first.values())) == 1, first
        assert losses == pytest.approx([losses[0]] * 6, rel=2**-23)


def test_a_grid_keeps_the_lowest_mean_validation_ne(done):
    c2al = read_record(done / "out").arms[0]
    assert [t.settings for t in c2al.trials] == [{LAMBDA: 0.1}, {LAMBDA: 0.5}]
    means = [np.mean(t.validation_ne) for t in c2al.trials]
    assert c2al.selected == int(np.argmin(means))
    for trial in c2al.trials:
        for seed, ne in zip((0, 1), trial.validation_ne, strict=True):
            log = done / "out" / "trainings" / trial.name / f"seed_{seed}" / "run" / "metrics.jsonl"
            last = [r for r in map(json.loads, log.read_text().splitlines()) if r["kind"] == "validation"][-1]
            assert ne == last["primary"]["all"]["ne"]


def test_statistics_are_fitted_once(done):
    kept = {p.read_bytes() for p in (done / "out" / "trainings").rglob("statistics.json")}
    assert len(kept) == 1


def test_it_says_what_it_is_at(tmp_path, capsys):
    """Each training once, with its number; then what a grid kept. A run again says nothing of what is done."""
    small(tmp_path, (Arm(name="tuned", select={LAMBDA: [0.1, 0.5]}),), **{"experiment.seeds": (0, 3)})
    assert main(words(tmp_path)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("experiment: ")]
    assert said[:2] == [f"experiment: baseline, seed {s} (training {i} of 6)" for i, s in ((1, 0), (2, 3))]
    trained = [line for line in said if "(training" in line]
    assert [line.rpartition("(")[2] for line in trained] == [f"training {i} of 6)" for i in range(1, 7)]
    assert f"experiment: tuned, {LAMBDA} = 0.5, seed 3 (training " in "\n".join(trained)
    assert "experiment: discovery of cohorts on the validation split" in said
    kept = [line for line in said if "is kept, of 2 settings (mean validation NE 0." in line]
    assert len(kept) == 1
    assert len(set(said)) == len(said)
    assert main(words(tmp_path)) == 0
    assert "(training" not in capsys.readouterr().err


def test_run_again_it_repeats_no_stage_and_gives_the_same_report(done, capsys):
    out = done / "out"
    before = (out / "report.html").read_bytes()
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    shutil.rmtree(out / "evaluation")
    (out / "report.html").unlink()
    assert main(words(done)) == 0
    after = (out / "report.html").read_bytes()
    # The command line is that of this process in both.
    assert after == before
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")} == stamps
    printed = capsys.readouterr().out
    assert "NE_diff" in printed
    assert "c2al against placebo" in printed
    assert "\nsurface " not in printed, "overall and cohorts only"


@pytest.mark.parametrize(
    "change",
    [
        ("--discover.min_rows", "90"),
        ("--evaluate.replicates", "40"),
        ("--axes", "[{name = 'surface', column = 'surface'}]"),
        ("--evaluate.items", "item_id"),
    ],
)
def test_changed_discovery_or_evaluation_trains_nothing_again(done, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(done / "out", copy / "out", copy_function=shutil.copy2)
    shutil.copy(done / "c.toml", copy / "c.toml")
    before = {k: v for k, v in trained(copy / "out").items() if "result.json" in k}
    record = read_record(copy / "out")
    assert main(words(copy, *change)) == 0
    after = {k: v for k, v in trained(copy / "out").items() if "result.json" in k}
    assert {k: after[k] for k in before} == before
    assert read_record(copy / "out").baseline.trials == record.baseline.trials


def test_an_item_column_that_is_no_axis_gives_the_interval_over_users_and_items(done, tmp_path, capsys):
    shutil.copytree(done / "out", tmp_path / "out", copy_function=shutil.copy2)
    shutil.copy(done / "c.toml", tmp_path / "c.toml")
    assert main(words(tmp_path, "--evaluate.items", "item_id")) == 0
    evaluation = read_evaluation(tmp_path / "out" / "evaluation" / "evaluation.json")
    assert evaluation.items == "item_id"
    assert all(d.items_interval is not None for d in evaluation.segments[0].differences)
    low, high = evaluation.overall.difference("c2al", "baseline").items_interval
    shown = f"{low:+.3%} to {high:+.3%}".replace("-", "\N{MINUS SIGN}")
    assert shown in (tmp_path / "out" / "report.html").read_text()
    assert f"[{low:+.3%}, {high:+.3%}]" in capsys.readouterr().out
    cells = (tmp_path / "out" / "evaluation" / "evaluation.csv").read_text()
    assert repr(low) in cells


def test_a_run_again_that_fails_leaves_the_old_report_with_all_that_it_was_made_of(done, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(done / "out", out, copy_function=shutil.copy2)
    shutil.copy(done / "c.toml", tmp_path / "c.toml")
    files = [p for p in out.iterdir() if p.is_file()] + [
        *(out / "evaluation").iterdir(),
        *(out / "serving").rglob("*.*"),
    ]
    before = {p: p.read_bytes() for p in files}

    def fails(*_: object, **__: object) -> None:
        raise DataError("no evaluation today")

    with monkeypatch.context() as patched:
        patched.setattr("c2al.experiment.run.evaluate", fails)
        assert main(words(tmp_path, "--evaluate.confidence", "0.9")) == 2
    assert "no evaluation today" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in before} == before
    assert main(words(tmp_path, "--evaluate.confidence", "0.9")) == 0
    assert load_config(out / "config.toml").evaluate.confidence == 0.9


def again_on_two_ranks(folder: str) -> None:
    assert main(words(Path(folder))) == 0


def test_two_ranks_on_a_finished_folder_leave_its_serving_folder(done, tmp_path):
    shutil.copytree(done / "out", tmp_path / "out", copy_function=shutil.copy2)
    shutil.copy(done / "c.toml", tmp_path / "c.toml")
    serving = read_record(done / "out").serving
    assert serving
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "serving").rglob("*")}
    assert before
    run_ranks(again_on_two_ranks, 2, str(tmp_path))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "serving").rglob("*")} == before
    assert read_record(tmp_path / "out").serving == serving


def test_changed_arms_train_the_new_ones_only_and_go_on_with_what_was_interrupted(done, tmp_path):
    shutil.copytree(done / "out", tmp_path / "out", copy_function=shutil.copy2)
    arms = (*ARMS[:2], Arm(name="faster", cohorts="none", overrides={"train.optimizer.dense_lr": 0.003}))
    save_config(dataclasses.replace(load_config(done / "c.toml"), arms=arms), tmp_path / "c.toml")
    before = {p for p in trained(tmp_path / "out") if "/baseline" not in p}
    # As if the earlier command had been stopped before the baselines were judged.
    for baseline in (tmp_path / "out" / "trainings").glob("baseline-*/seed_*"):
        (baseline / "result.json").unlink()
        for scores in baseline.glob("scores_*"):
            shutil.rmtree(scores)
    weights = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("trainings/*/seed_*/run/checkpoints/*/*")}
    assert main(words(tmp_path)) == 0
    assert {p: p.stat().st_mtime_ns for p in weights} == weights
    new = {p for p in trained(tmp_path / "out") if "/baseline" not in p} - before
    assert new
    assert {Path(p).relative_to(tmp_path / "out" / "trainings").parts[0].partition("-")[0] for p in new} == {"faster"}
    assert [a.name for a in read_record(tmp_path / "out").arms] == ["c2al", "placebo", "faster"]


def test_another_config_in_the_same_folder_is_refused(done, capsys):
    assert main(words(done, "--seed", "5")) == 2
    assert "holds an experiment of another config" in capsys.readouterr().err


def test_other_training_data_under_the_same_path_are_refused_by_name(done, tmp_path, capsys):
    for name in ("train", "validation", "test"):
        shutil.copytree(done / name, tmp_path / name)
    small(tmp_path, arms=(Arm(name="c2al"),))
    (tmp_path / "out").mkdir()
    assert main(words(tmp_path, "--experiment.seeds", "[0]", "--train.max_steps", "2", "--train.epochs", "1")) == 0
    write_impressions(tmp_path / "train", seed=0, label=np.zeros(4096, np.int8))
    assert main(words(tmp_path, "--experiment.seeds", "[0]", "--train.max_steps", "2", "--train.epochs", "1")) == 2
    said = capsys.readouterr().err
    assert "data.train" in said
    assert "part-0.parquet" in said


@pytest.mark.parametrize("name", ["config.toml", "inputs.json"])
def test_trainings_without_the_record_of_what_they_were_trained_on_are_refused(done, tmp_path, capsys, name):
    shutil.copytree(done, tmp_path / "x")
    (tmp_path / "x" / "out" / name).unlink()
    assert main(words(tmp_path / "x")) == 2
    assert f"{name}: " in capsys.readouterr().err


def test_what_is_no_experiment_is_refused_before_any_work(tmp_path):
    config = replace(splits(tmp_path), **{LAMBDA: 0.5, "data.test": (), "axes": ()})
    with process_group(config.dist) as world, pytest.raises(ConfigError) as caught:
        experiment(config, tmp_path / "out", world, "by hand")
    for field in (LAMBDA, "data.test", "axes"):
        assert field in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        (Arm(name="a", overrides={LAMBDA: 0.0}), "arm 'a': without effect on its cohorts"),
        (Arm(name="a", select={LAMBDA: [0.0, 0.3]}), "arm 'a': without effect on its cohorts"),
        (Arm(name="a", cohorts="none", overrides={"train.group_dro": 0.1}), "arm 'a': its settings need cohorts"),
        (Arm(name="a", cohorts="none", select={LAMBDA: [0.3]}), "arm 'a': its settings need cohorts"),
        (Arm(name="a", overrides={"train.lambdas.hed": 0.3}), "arm 'a': train.lambdas.hed: cohorts = 'chosen' chose"),
        (Arm(name="a", cohorts="one", select={"train.lambdas.tail": [0.1]}), "arm 'a': train.lambdas.tail: "),
        (Arm(name="a", cohorts="none"), "overrides: needed by cohorts = 'none'"),
        (Arm(name="a", keep="tail"), "keep: is 'tail', but cohorts = 'chosen'"),
        (Arm(name="a", cohorts="least", draw=1), "draw: is 1, but cohorts = 'least'"),
        *((Arm(name="a", overrides={f"data.{c}": "age"}), f"'data.{c}': data.{c} is the same") for c in OF_ALL_ARMS),
    ],
)
def test_an_arm_whose_settings_and_cohorts_do_not_match_is_refused_before_any_work(tmp_path, capsys, arm, said):
    small(tmp_path, (Arm(name="fine"), Arm(name="weighted", overrides={LAMBDA: 0.0, "train.cohort_weight": 2.0}), arm))
    assert main(words(tmp_path)) == 2
    assert said in (err := capsys.readouterr().err)
    assert err.count("arm '") <= 1
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"axes": "[{name = 'a', column = 'surfcae'}]"}, "surfcae"),
        ({"data.time": "nowhere"}, "nowhere"),
        ({"evaluate.items": "item"}, "needed is an integer or a string (evaluate.items); did you mean 'item_id'?"),
        ({"evaluate.items": "age"}, "column 'age' has type double, needed is an integer or a string (evaluate.items)"),
        ({"evaluate.items": "user_id"}, "evaluate.items: 'user_id' is data.user_id"),
        ({"evaluate.items": "label"}, "evaluate.items: 'label' is data.label"),
        ({"evaluate.items": "prediction"}, "the column 'prediction' of the impressions would hide"),
    ],
)
def test_a_column_that_no_stage_could_use_is_refused_before_the_first_step(tmp_path, capsys, wrong, said):
    save_config(splits(tmp_path), tmp_path / "c.toml")
    assert main(words(tmp_path, *(f"--{key}={value}" for key, value in wrong.items()))) == 2
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("metrics.jsonl"))


def test_a_file_of_cohorts_that_no_arm_could_use_is_refused_before_the_baselines_train(done, tmp_path, capsys):
    chosen = done / "out" / read_record(done / "out").discovery / "cohorts.json"
    for name, content, said in (
        ("missing", None, "no such file"),
        ("empty", "", "empty.json"),
        ("half", chosen.read_text()[:200], "half.json"),
        ("foreign", chosen.read_text().replace("c2al.cohorts", "c2al.other"), "foreign.json"),
        ("column", chosen.read_text().replace('"surface"', '"surfcae"'), "no column 'surfcae'"),
    ):
        file = tmp_path / f"{name}.json"
        if content is not None:
            file.write_text(content)
        small(tmp_path, arms=(Arm(name="given", cohorts="file", file=str(file)),))
        assert main(words(tmp_path)) == 2, name
        err = capsys.readouterr().err
        assert said in err
        assert "arm 'given'" in err or name == "column"
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("axis", "columns", "said"),
    [
        ("kind = 'categorical'", {"a": 0.5}, "axis 'x': column 'a' is double; a categorical axis needs integers"),
        ("kind = 'categorical'", {"a": [[1]]}, "a categorical axis needs integers"),
        ("kind = 'percentiles', percentiles = [0, 50, 100]", {"a": "s"}, "percentiles and edges need a number"),
        ("kind = 'categorical'", {"a": 1, "test": "one"}, "column 'a' holds strings, but integers in"),
    ],
)
def test_an_axis_that_no_column_fits_is_refused_before_the_first_step(tmp_path, capsys, axis, columns, said):
    config = splits(tmp_path)
    for seed, (split, rows) in enumerate({"train": 4096, "validation": 2048, "test": 2048}.items()):
        value = columns.get(split, columns["a"])
        values = pa.array(value * rows) if isinstance(value, list) else pa.array([value] * rows)
        write_impressions(tmp_path / split, rows, seed, a=values)
    save_config(config, tmp_path / "c.toml")
    assert main(words(tmp_path, "--axes", f"[{{name = 'x', column = 'a', {axis}}}]")) == 2
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("metrics.jsonl"))


def test_an_arm_that_cannot_train_is_a_finding_and_the_others_go_on(tmp_path, capsys):
    """Its cohorts have no training row, as with a category that is new, or its loss is not finite."""
    there = (CohortSpec(axis="s", name="feed", conditions=(Condition(column="surface", equals="feed"),), label="head"),)
    new = (dataclasses.replace(there[0], conditions=(Condition(column="surface", equals="new"),)),)
    for name, cohorts in (("there", there), ("new", new)):
        write_cohorts(tmp_path / f"{name}.json", cohorts, "by hand")
    arms = (
        Arm(name="new", cohorts="file", file=str(tmp_path / "new.json")),
        Arm(name="wild", cohorts="none", overrides={"train.optimizer.dense_lr": 1e18}),
        Arm(name="good", cohorts="file", file=str(tmp_path / "there.json")),
    )
    small(tmp_path, arms, **{"experiment.seeds": (0,), "train.epochs": 1})
    assert main(words(tmp_path)) == 0
    found = {a.name: a for a in read_record(tmp_path / "out").arms}
    assert "has no rows in data.train" in found["new"].finding
    assert "not finite" in found["wild"].finding
    assert found["good"].selected == 0
    assert "Not trained: new." in capsys.readouterr().out


def test_a_grid_that_nothing_can_be_chosen_from_is_an_error(tmp_path, capsys):
    config = small(tmp_path, (Arm(name="c", cohorts="none", select={"train.ema": [0.5, 0.9]}),))
    write_impressions(tmp_path / "validation", 2048, 1, label=np.zeros(2048, np.int8))
    assert main(words(tmp_path, "--experiment.seeds", "[0]", "--train.epochs", "1")) == 2
    assert "data.validation: NE is undefined there for every setting of c" in capsys.readouterr().err
    assert config.experiment.seeds == (0, 1)


def test_test_rows_that_no_model_can_score_are_found_before_the_arms_train(tmp_path, capsys):
    small(tmp_path, (Arm(name="c", cohorts="none", overrides=SLOWER),), **{"experiment.seeds": (0,)})
    users = pa.array([None, *range(2047)], pa.int64())
    write_impressions(tmp_path / "test", 2048, 2, user_id=users)
    assert main(words(tmp_path)) == 2
    assert "column 'user_id' is null" in capsys.readouterr().err
    assert {p.parent.parent.name.partition("-")[0] for p in trained_folders(tmp_path / "out")} == {"baseline"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_last_step_of_a_training_ends_the_experiment(tmp_path, monkeypatch, capsys, number):
    """It is too late to stop that training, which is whole; the next one must not begin."""
    small(
        tmp_path,
        arms=(Arm(name="slower", cohorts="none", overrides=SLOWER),),
        **{"experiment.seeds": (0, 1), "train.epochs": 1},
    )
    evaluate_as_it_is = Trainer._evaluate

    def evaluate_under_a_signal(trainer: Trainer) -> None:
        if trainer.step == trainer.total:
            os.kill(os.getpid(), number)
        evaluate_as_it_is(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_evaluate", evaluate_under_a_signal)
        assert main(words(tmp_path)) == 128 + number
    assert "interrupted" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "trainings").glob("*/seed_*"))) == 1
    assert main(words(tmp_path)) == 0
    assert "already finished" in capsys.readouterr().err


def test_an_experiment_that_was_moved_is_the_same_experiment(done, tmp_path):
    """Two hosts may see one folder under two paths: nothing is discovered again, no number or name changes."""
    shutil.copytree(done / "out", tmp_path / "elsewhere" / "out", copy_function=shutil.copy2)
    shutil.copy(done / "c.toml", tmp_path / "elsewhere" / "c.toml")
    before = sorted(p.name for p in (done / "out").glob("cohorts-*"))
    assert main(words(tmp_path / "elsewhere")) == 0
    moved = tmp_path / "elsewhere" / "out"
    assert sorted(p.name for p in moved.glob("cohorts-*")) == before
    assert (moved / "experiment.json").read_bytes() == (done / "out" / "experiment.json").read_bytes()


FINDINGS = {
    "no pair that noise allows": ("--discover.min_rows", "100000"),
    "cuts that do not fit the scored rows": (
        "--axes",
        "[{name = 'few', column = 'item_id', kind = 'percentiles', percentiles = [0, 10.7, 100]}]",
        "--discover.cut_tolerance",
        "0.0001",
    ),
}


@pytest.mark.parametrize("change", FINDINGS.values(), ids=FINDINGS.keys())
def test_without_cohorts_an_arm_ends_with_a_finding_and_the_experiment_goes_on(tmp_path, capsys, change):
    plain = Arm(name="slower", cohorts="none", overrides=SLOWER)
    small(tmp_path, arms=(Arm(name="c2al"), plain), **{"experiment.seeds": (0,), "train.epochs": 1})
    assert main(words(tmp_path, *change)) == 0
    c2al, slower = read_record(tmp_path / "out").arms
    assert c2al.selected is None
    assert c2al.finding
    assert slower.selected == 0
    assert f"Not trained: c2al. {c2al.finding[0].upper()}{c2al.finding[1:]}" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()
    assert not (tmp_path / "out" / "serving").exists()


def test_test_labels_play_no_part_in_what_is_selected(tmp_path):
    """The same experiment, with every test label turned round."""
    kept: list[Record] = []
    for name in ("as_is", "turned"):
        config = small(
            tmp_path / name,
            arms=(Arm(name="c2al", select={LAMBDA: [0.1, 0.5]}),),
            **{"train.epochs": 1, "experiment.select": {"train.optimizer.dense_lr": [0.001, 0.02]}},
        )
        if name == "turned":
            (path,) = (tmp_path / name / "test").glob("*.parquet")
            table = pq.read_table(path)
            turned = pa.array(1 - table["label"].to_numpy(), table["label"].type)
            pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", turned), path)
        with process_group(config.dist) as world:
            experiment(config, tmp_path / name / "out", world, "by hand")
        kept.append(read_record(tmp_path / name / "out"))
    one, other = kept
    for a, b in zip((one.baseline, *one.arms), (other.baseline, *other.arms), strict=True):
        assert a.selected == b.selected
        assert [t.validation_ne for t in a.trials] == [t.validation_ne for t in b.trials]


def test_a_placebo_has_the_sizes_of_its_pair_in_users_that_are_the_same_everywhere(done):
    config, record = load_config(done / "c.toml"), read_record(done / "out")
    pair, fake = (
        read_cohorts(done / "out" / "trainings" / a.trials[0].name / "cohorts.json").chosen() for a in record.arms[:2]
    )
    rows_K, size = _count(pair, config, 0)
    _, fake_size = _count(fake, config, 0)
    for wanted, got in zip(size, fake_size, strict=True):
        assert abs(wanted - got) <= 2 * rows_K.max(), "to within a bucket at either end"
    members: dict[int, set[str]] = {}
    for split in ("train", "validation", "test"):
        table = pq.read_table(done / split)
        labels = np.where(fake[0].membership(table), "head", np.where(fake[1].membership(table), "tail", "none"))
        assert not (fake[0].membership(table) & fake[1].membership(table)).any()
        for user, label in zip(table["user_id"].to_pylist(), labels, strict=True):
            members.setdefault(user, set()).add(label)
    assert all(len(found) == 1 for found in members.values()), "a user is on one side in every split"
    assert {label for found in members.values() for label in found} == {"head", "tail", "none"}


def test_a_random_pair_is_drawn_from_the_seed(done):
    config, folder = load_config(done / "c.toml"), done / "out" / read_record(done / "out").discovery
    drawn = [cohorts_of(Arm(name="a", cohorts="random", draw=i), config, folder) for i in (0, 0, *range(1, 9))]
    assert drawn[0] == drawn[1]
    assert len({tuple(c.conditions for c in pair) for pair in drawn}) > 1
    chosen = read_cohorts(folder / "cohorts.json").chosen()
    assert all({c.conditions for c in pair} != {c.conditions for c in chosen} for pair in drawn)


AXES = (
    Axis(name="surface", column="surface"),
    Axis(name="items", column="item_id", kind="edges", edges=(4.0, 7.0)),
)
ON_AXES = {
    "surfaces": Arm(name="surfaces", axis="surface"),
    "items": Arm(name="items", axis="items"),
    "surfaces_placebo": Arm(name="surfaces_placebo", axis="surface", cohorts="shuffled"),
    "items_placebo": Arm(name="items_placebo", axis="items", cohorts="shuffled"),
    "items_random": Arm(name="items_random", axis="items", cohorts="random"),
    "items_least": Arm(name="items_least", axis="items", cohorts="least"),
}


@pytest.fixture(scope="module")
def on_axes(tmp_path_factory) -> Path:
    """One seed, arms on two axes."""
    folder = tmp_path_factory.mktemp("axes")
    config = small(folder, arms=tuple(ON_AXES.values()), **{"experiment.seeds": (0,)})
    save_config(dataclasses.replace(config, axes=AXES), folder / "c.toml")
    assert main(words(folder)) == 0
    return folder


def test_an_arm_takes_its_cohorts_from_its_own_axis(on_axes):
    record = read_record(on_axes / "out")
    pairs = {
        arm.name: read_cohorts(on_axes / "out" / "trainings" / arm.trials[0].name / "cohorts.json").chosen()
        for arm in record.arms
    }
    found = {name: {cohort.axis for cohort in pair} for name, pair in pairs.items()}
    placebo = {"placebo"}
    assert found["surfaces"] == {"surface"}
    assert found["items"] == found["items_random"] == found["items_least"] == {"items"}
    assert found["surfaces_placebo"] == found["items_placebo"] == placebo
    for name, arm in ON_AXES.items():
        if arm.cohorts == "shuffled":
            assert [f"as many as {c.name}" for c in pairs[arm.axis.removesuffix("s") + "s"]] == [
                c.name for c in pairs[name]
            ], "the sizes of its own axis's pair"
    for name in ("items_random", "items_least"):
        assert {c.conditions for c in pairs[name]} != {c.conditions for c in pairs["items"]}


def test_arms_that_come_to_the_same_cohorts_in_other_words_are_named(on_axes, tmp_path, capsys):
    """Three arms draw from the two pairs that are left of three, so two of them meet."""
    shutil.copytree(on_axes, tmp_path / "x")
    config = load_config(tmp_path / "x" / "c.toml")
    arms = (*config.arms, Arm(name="items_again", axis="items", cohorts="random", draw=1))
    save_config(dataclasses.replace(config, arms=arms), tmp_path / "x" / "c.toml")
    assert main(words(tmp_path / "x")) == 0
    record = read_record(tmp_path / "x" / "out")
    pairs = {arm.name: arm.cohorts for arm in record.arms}
    names = ["items_random", "items_least", "items_again"]
    first = {name: next(n for n in names if pairs[n] == pairs[name]) for name in names}
    met = {name: earlier for name, earlier in first.items() if name != earlier}
    assert met
    said = capsys.readouterr().err
    page = (tmp_path / "x" / "out" / "report.html").read_text().replace("<wbr>", "")
    assert said.count("has the same cohorts as") == page.count("(the same as those of ") == len(met)
    for name, earlier in met.items():
        assert f"experiment: arm '{name}' has the same cohorts as arm '{earlier}'\n" in said
        assert f"(the same as those of {earlier})" in page


def test_the_choice_on_an_axis_is_corrected_for_the_pairs_of_that_axis_and_scans_nothing_again(on_axes):
    out = on_axes / "out"
    rules = {}
    for folder in out.glob("cohorts-*"):
        rule = json.loads((folder / "cohorts.json").read_text())["rule"]
        rules[tuple(rule["axes"])] = rule["tested_pairs"]
    assert rules == {(): 6, ("surface",): 3, ("items",): 3}
    assert len(list((out / "trainings").rglob("scores_validation-*"))) == 1


def test_the_report_speaks_of_the_main_arms_axis_and_compares_within_axes(on_axes):
    record = read_record(on_axes / "out")
    evaluation = json.loads((on_axes / "out" / "evaluation" / "evaluation.json").read_text())
    details = [s["detail"] for s in evaluation["segments"] if s["axis"] == "cohort"]
    assert [f"{role}: {detail}" for role, detail in zip(("head", "tail"), details, strict=True)] == list(
        record.arms[0].cohorts
    )
    assert record.placebo is not None
    assert record.placebo.name == "surfaces_placebo"
    against = {(d["arm"], d["against"]) for d in evaluation["segments"][0]["differences"]}
    assert against == {(name, "baseline") for name in ON_AXES} | {
        ("surfaces", "surfaces_placebo"),
        *((name, "items_placebo") for name in ("items", "items_random", "items_least")),
    }


def test_the_tables_of_a_page_hold_the_numbers_of_the_evaluation(on_axes):
    """benchmarks/experiment_page.py, which makes the tables of pages under docs/results."""
    command = [sys.executable, str(ROOT / "benchmarks" / "experiment_page.py"), str(on_axes / "out"), "--axes", "items"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    page = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    evaluation = json.loads((on_axes / "out" / "evaluation" / "evaluation.json").read_text())
    overall = evaluation["segments"][0]
    for d in overall["differences"]:
        low, high = d["judgement"]["corrected_interval"]
        row = f"| {d['arm']} | {d['against']} | {d['estimates']['ne']['value']:+.3%} | [{low:+.3%}, {high:+.3%}] |"
        assert row in page
    assert f"| ne | {overall['arms']['baseline']['ne']['value']:.5f} |" in page
    assert "| items = [4, 7) |" in page
    assert "\n| age = " not in page


def test_an_axis_without_a_pair_ends_its_own_arm_only(tmp_path, capsys):
    arms = (Arm(name="few", axis="age"), Arm(name="surfaces", axis="surface"))
    small(tmp_path, arms=arms, **{"experiment.seeds": (0,), "discover.min_rows": 300})
    axes = "[{name = 'surface', column = 'surface'}, {name = 'age', column = 'age', kind = 'edges', edges = [0]}]"
    assert main(words(tmp_path, "--axes", axes)) == 0
    few, surfaces = read_record(tmp_path / "out").arms
    assert few.selected is None
    assert surfaces.selected == 0
    assert f"Not trained: few. {few.finding[0].upper()}{few.finding[1:]}" in capsys.readouterr().out


UNUSABLE = {
    "unknown": ("axis = 'surfcae'", "arm 'a': unknown axis 'surfcae'; did you mean 'surface'"),
    "without cohorts": ("axis = 'age', cohorts = 'none'", "is 'age', but cohorts = 'none'"),
    "of a file": ("axis = 'age', cohorts = 'file', file = 'c.json'", "is 'age', but cohorts = 'file'"),
}


@pytest.mark.parametrize(("arm", "said"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_axis_that_an_arm_cannot_use_is_refused_by_file_field_and_value(tmp_path, capsys, arm, said):
    small(tmp_path)
    path = tmp_path / "c.toml"
    path.write_text(path.read_text().replace("arms = []", f"arms = [{{name = 'a', {arm}}}]"))
    assert main(words(tmp_path)) == 2
    assert f"{path}: arms[0].axis: {said}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "c2al", *words(Path("."), *more)]
    log = (folder / f"log{len(list(folder.glob('log*')))}").open("w")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)


def relative(folder: Path) -> None:
    """An experiment whose command and configuration name no folder, so that two of them can be compared."""
    arms = (Arm(name="c2al"), Arm(name="placebo", cohorts="shuffled"))
    config = small(folder, arms=arms, **{"train.epochs": 1})
    data = dataclasses.replace(config.data, **{s: (s,) for s in ("train", "validation", "test")})
    config = dataclasses.replace(config, data=data)
    save_config(config, folder / "c.toml")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> bytes:
    """The report of an experiment that one process made from beginning to end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    relative(folder)
    assert start(folder).wait(300) == 0
    return (folder / "out" / "report.html").read_bytes()


def test_killed_twice_it_ends_with_the_same_report(tmp_path, undisturbed):
    """In another folder, from scratch, with the same command: so this also shows that a seed fixes the report."""
    relative(tmp_path)
    for stage in ("trainings/baseline-*/seed_1/run/metrics.jsonl", "trainings/placebo-*/seed_0/run/metrics.jsonl"):
        process = start(tmp_path)
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline and not list((tmp_path / "out").glob(stage)):
            time.sleep(0.02)
        assert process.poll() is None, "it was to be killed in the middle"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out" / "report.html").exists()
    assert start(tmp_path).wait(300) == 0
    assert (tmp_path / "out" / "report.html").read_bytes() == undisturbed


def test_two_processes_on_one_folder_train_everything_once(tmp_path, undisturbed):
    relative(tmp_path)
    processes = [start(tmp_path, "--seeds", seed) for seed in ("0", "1")]
    assert [p.wait(400) for p in processes] == [0, 0]
    logs = "".join(p.read_text() for p in tmp_path.glob("log*"))
    assert logs.count("validation NE") == 6, "three arms, two seeds, each trained by one of the two"
    body = (tmp_path / "out" / "report.html").read_text().partition("<h2>Reproduction</h2>")[0]
    assert body == undisturbed.decode().partition("<h2>Reproduction</h2>")[0]


@pytest.mark.parametrize(
    ("flag", "said"), [("--arms", "no arm is named 'nobody'"), ("--seeds", "'nobody' is not a seed")]
)
def test_a_share_that_is_not_there_is_refused(tmp_path, capsys, flag, said):
    small(tmp_path)
    assert main(words(tmp_path, flag, "nobody")) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not KUAIRAND.exists(), reason=f"the real impressions are not at {KUAIRAND}")
def test_baseline_on_real_impressions(tmp_path):
    """Below 0.872, what an untuned two-layer stack of one epoch has; one-hot logistic regression has 0.882."""
    assert main(["ingest", "kuairand", "--input", str(KUAIRAND), "--output", str(tmp_path / "data")]) == 0
    paths = {f"data.{s}": (str(tmp_path / "data" / s),) for s in ("train", "validation", "test")}
    config = replace(load_config(ROOT / "c2al" / "configs" / "kuairand.toml"), **paths, **{"evaluate.replicates": 50})
    with process_group(config.dist) as world:
        train(config, tmp_path / "run", world)
        score(tmp_path / "run", config.data.test, tmp_path / "scores", world)
    result = evaluate(
        paired([(tmp_path / "scores",)]), None, (), config.evaluate, 0, tmp_path / "evaluation", config.data
    )
    ne = result.segments[0].arms["scores"]["ne"].value
    assert result.rows == 29_434
    assert ne is not None
    assert ne < 0.872
