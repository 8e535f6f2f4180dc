"""`c2al experiment` from Parquet to the report, on a small set with planted cohorts and on real impressions."""

import json
import shutil
from pathlib import Path

import pytest

from c2al.__main__ import main
from c2al.config import load_config, replace, save_config
from c2al.distributed.process import process_group
from c2al.errors import ConfigError
from c2al.evaluation.evaluate import evaluate, paired
from c2al.experiment.run import experiment
from c2al.training.score import score
from c2al.training.trainer import train
from impressions import splits

ROOT = Path(__file__).parents[2]
KUAIRAND = ROOT.parent / "shared" / "data" / "kuairand_pure"


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished experiment of two seeds."""
    folder = tmp_path_factory.mktemp("experiment")
    config = replace(
        splits(folder),
        **{"train.epochs": 3, "experiment.seeds": (0, 1), "discover.min_rows": 100, "train.eval_every": 16},
    )
    save_config(config, folder / "c.toml")
    assert main(["experiment", "--config", str(folder / "c.toml"), "--output", str(folder / "out")]) == 0
    return folder


def test_it_ends_with_a_report_and_every_number_behind_it(done):
    out = done / "out"
    evaluation = json.loads((out / "evaluation" / "evaluation.json").read_text())
    names = [(s["axis"], s["name"]) for s in evaluation["segments"]]
    assert names[:3] == [("overall", "overall"), ("cohort", "head"), ("cohort", "tail")]
    overall = {"ne_diff": evaluation["segments"][0]["differences"][0]["estimates"]["ne"]}
    assert len(overall["ne_diff"]["per_seed"]) == 2
    low, high = overall["ne_diff"]["interval"]
    assert low <= overall["ne_diff"]["value"] <= high
    chosen = json.loads((out / "cohorts" / "cohorts.json").read_text())["chosen"]
    assert {chosen["head"]["axis"], chosen["tail"]["axis"]} == {"surface"}, "the planted axis"
    html = (out / "report.html").read_text()
    assert f"{abs(overall['ne_diff']['value']):.3%}" in html
    assert "<svg" in html
    assert "<script" not in html
    assert "http://" not in html.replace("http://www.w3.org", ""), "self-contained"
    proof = json.loads((out / "seed_0" / "c2al" / "serving" / "proof.json").read_text())
    assert proof["rows_compared"] == 2048


def test_run_again_it_repeats_no_stage_and_gives_the_same_report(done, capsys):
    out = done / "out"
    before = (out / "report.html").read_bytes()
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    shutil.rmtree(out / "evaluation")
    (out / "report.html").unlink()
    assert main(["experiment", "--config", str(done / "c.toml"), "--output", str(out)]) == 0
    assert (out / "report.html").read_bytes() == before
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")} == stamps
    assert "NE_diff" in capsys.readouterr().out


def test_another_config_in_the_same_folder_is_refused(done, capsys):
    words = ["experiment", "--config", str(done / "c.toml"), "--output", str(done / "out"), "--seed", "5"]
    assert main(words) == 2
    assert "holds an experiment of another config" in capsys.readouterr().err


def test_what_is_no_experiment_is_refused_before_any_work(tmp_path):
    config = replace(splits(tmp_path), **{"train.auxiliary_lambda": 0.5, "data.test": (), "axes": ()})
    with process_group(config.dist) as world, pytest.raises(ConfigError) as caught:
        experiment(config, tmp_path / "out", world, "by hand")
    for field in ("train.auxiliary_lambda", "data.test", "axes"):
        assert field in str(caught.value)
    assert not (tmp_path / "out").exists()


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
