"""`score` and `export` on a trained run, baseline and C2AL."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from c2al.__main__ import main
from c2al.config import load_config, parse_config, replace, save_config
from c2al.data.parquet import BatchReader
from c2al.data.scores_folder import check_marker
from c2al.distributed.checkpoint import load_unsharded
from c2al.errors import ConfigError, DataError, OutputError
from c2al.files import only_writer
from c2al.serving.artifact import read_artifact
from c2al.serving.export import export
from c2al.training.score import score
from c2al.training.trainer import train
from impressions import write_cohorts, write_impressions


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory) -> Path:
    return write_cohorts(tmp_path_factory.mktemp("cohorts") / "cohorts.json")


@pytest.fixture(scope="module")
def runs(config, world, cohorts, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    train(config, folder / "baseline", world)
    c2al = replace(config, **{"train.lambdas": {"head": 0.3, "tail": 0.2}})
    train(c2al, folder / "c2al", world, cohorts)
    return {"baseline": folder / "baseline", "c2al": folder / "c2al"}


def newest(run: Path) -> dict[str, torch.Tensor]:
    return load_unsharded(max((run / "checkpoints").glob("step*")))


def test_scores_are_the_inputs_rows_in_order(config, world, runs, tmp_path):
    rows = score(runs["c2al"], config.data.test, tmp_path / "scores", world)
    table = pq.read_table(tmp_path / "scores")
    source = pq.read_table(config.data.test[0])
    assert rows == table.num_rows == source.num_rows
    marker = check_marker(tmp_path / "scores")
    assert marker is not None
    assert (marker.rows, [p.name for p in marker.parts]) == (rows, ["part-00000.parquet"])
    for name in ("row_id", "user_id", "surface", "age"):
        assert table[name].equals(source[name]), name
    assert np.array_equal(table["label"], source["label"])
    assert np.all(np.asarray(table["weight"]) == 1)
    prediction = np.asarray(table["prediction"])
    assert ((prediction > 0) & (prediction < 1)).all()
    assert prediction.std() > 0.01
    with pytest.raises(ConfigError, match="exists; give another --output"):
        score(runs["c2al"], config.data.test, tmp_path / "scores", world)


@pytest.mark.parametrize("arm", ["baseline", "c2al"])
def test_the_artifact_is_the_primary_head_and_nothing_else(config, world, runs, tmp_path, arm):
    proof = export(runs[arm], config.data.test, tmp_path / "artifact", world)
    assert proof.rows_compared == 2048
    baseline = {name.removeprefix("model.") for name in newest(runs["baseline"])}
    assert set(proof.parameters) == baseline
    artifact = read_artifact(tmp_path / "artifact")
    assert artifact.proof == proof
    assert [c.label for c in artifact.metadata.cohorts] == (["head", "tail"] if arm == "c2al" else [])
    assert parse_config(tomllib.loads(artifact.metadata.config)).model == config.model
    score(runs[arm], config.data.test, tmp_path / "scores", world)

    # The artifact alone, fed by hand, must give what the sharded training model gave.
    module = torch.export.load(tmp_path / "artifact" / "model.pt2").module()
    reader = BatchReader(
        config.data.test,
        config.data,
        artifact.schema.statistics,
        batch_size=100,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=False,
        shards=1,
    )
    with torch.no_grad():
        served = torch.cat([module(b.dense_BF, b.sparse.values(), b.sparse.lengths())[: b.rows] for b in reader])
    expected = torch.from_numpy(np.asarray(pq.read_table(tmp_path / "scores")["prediction"]))
    torch.testing.assert_close(served, expected, rtol=1e-5, atol=1e-6)  # other batch sizes, other summation


def test_auxiliary_heads_train_and_the_rest_starts_alike(config, runs):
    c2al, baseline = newest(runs["c2al"]), newest(runs["baseline"])
    extra = c2al.keys() - baseline.keys()
    assert extra
    assert all(".heads.auxiliary." in name for name in extra)
    assert any(not torch.equal(c2al[name], baseline[name]) for name in baseline), (
        "the auxiliary losses reach the encoder"
    )


def run_score(run: Path, output: Path, *words: str) -> int:
    config = load_config(run / "config.toml")
    return main(["score", "--run", str(run), "--data", *config.data.test, "--output", str(output), *words])


def test_overrides_reach_score(runs, tmp_path):
    assert (
        run_score(
            runs["baseline"], tmp_path / "a", "--batch-size", "100", "--axes", '[{name = "i", column = "item_id"}]'
        )
        == 0
    )
    assert {"item_id", "prediction"} <= set(pq.read_schema(tmp_path / "a" / "part-00000.parquet").names)
    assert "surface" not in pq.read_schema(tmp_path / "a" / "part-00000.parquet").names
    assert run_score(runs["baseline"], tmp_path / "b") == 0
    a, b = (np.asarray(pq.read_table(tmp_path / name)["prediction"]) for name in "ab")
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # other batch sizes, other summation


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.layers", "3"], "model.layers: the model was trained with 2, it cannot be scored with 3"),
        (["--data.sparse", "[]"], "data.sparse: at least one sparse feature is needed"),
        (["--data.sparse", '[{column = "user_id", num_embeddings = 7}]'], "data.sparse: the model was trained with"),
        (["--batch-size", "-5"], "--batch-size: must be at least 1, is -5"),
        (["--batch-size", "0"], "--batch-size: must be at least 1, is 0"),
        (["--axes", '[{name = "w", column = "weight"}]'], "the column 'weight' of the impressions would hide"),
        (["--axes", '[{name = "w", column = "place"}]'], "no column 'place'"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(runs, tmp_path, capsys, words, message):
    assert run_score(runs["baseline"], tmp_path / "scores", *words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_planned_for_two_ranks_is_scored_on_one(runs, world, config, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    tables = {f.key: {"sharding": "table_wise", "ranks": [i % 2]} for i, f in enumerate(config.data.sparse)}
    plan.write_text(json.dumps({"tables": tables}))
    run = shutil.copytree(runs["baseline"], tmp_path / "run")
    save_config(replace(config, **{"dist.plan": str(plan)}), run / "config.toml")
    score(run, config.data.test, tmp_path / "a", world)
    score(runs["baseline"], config.data.test, tmp_path / "b", world)
    a, b = (pq.read_table(tmp_path / name)["prediction"] for name in "ab")
    assert a.equals(b)


def test_a_run_is_read_without_being_written(runs, world, config, tmp_path):
    run = shutil.copytree(runs["baseline"], tmp_path / "run")
    unfinished = run / "checkpoints" / ".unfinished-step-00000099"
    unfinished.mkdir()
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    with only_writer(run):  # as if it were training
        before[run / ".lock"] = (run / ".lock").stat().st_mtime_ns
        before[run] = run.stat().st_mtime_ns
        score(run, config.data.test, tmp_path / "scores", world)
        assert {p: p.stat().st_mtime_ns for p in (run, *run.rglob("*"))} == before


def test_a_second_writer_of_scores_is_refused_by_name(runs, world, config, tmp_path):
    partial = tmp_path / ".scores.partial"
    with only_writer(partial):
        (partial / "part-00000.parquet").write_text("half")
        with pytest.raises(OutputError, match=r"scores.partial: is being written by process \d+ on "):
            score(runs["baseline"], config.data.test, tmp_path / "scores", world)
        assert (partial / "part-00000.parquet").exists()
    score(runs["baseline"], config.data.test, tmp_path / "scores", world)  # takes over what a dead writer left
    assert [p.name for p in tmp_path.iterdir()] == ["scores"]
    assert check_marker(tmp_path / "scores") is not None


def with_40th(value: object, others: object) -> list[object]:
    return [others] * 40 + [value] + [others] * 23


BAD_ROWS = {
    "a prediction that is not finite": ({"age": with_40th(3e38, 30.0)}, "row group 2, row 8: the prediction is"),
    "a user id that is null": ({"user_id": with_40th(None, 7)}, "row group 2, row 8: column 'user_id' is null"),
    "a row id that is null": ({"row_id": with_40th(None, 7)}, "row group 2, row 8: column 'row_id' is null"),
    "labels that are not there": ({"label": None}, "no column 'label' (data.label); score needs labelled impressions"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_rows_that_later_jobs_would_refuse_are_refused_by_score(case, runs, world, tmp_path):
    columns, message = BAD_ROWS[case]
    folder = write_impressions(tmp_path / "data", 64, 3, **columns)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        score(runs["baseline"], [str(folder)], tmp_path / "scores", world)
    assert "part-3.parquet" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_an_axis_on_the_label_or_the_weight_keeps_its_name(runs, world, config, tmp_path):
    axes = [{"name": "l", "column": "label"}]
    score(runs["baseline"], config.data.test, tmp_path / "s", world, config=replace(config, axes=axes))
    assert pq.read_schema(tmp_path / "s" / "part-00000.parquet").names.count("label") == 1
