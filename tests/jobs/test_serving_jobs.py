"""`score` and `export` on a trained run, baseline and C2AL."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from c2al.config import replace
from c2al.data.parquet import BatchReader
from c2al.data.statistics import Statistics
from c2al.distributed.checkpoint import load_unsharded
from c2al.errors import ConfigError
from c2al.serving.export import export
from c2al.training.score import score
from c2al.training.trainer import train
from impressions import write_cohorts


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory) -> Path:
    return write_cohorts(tmp_path_factory.mktemp("cohorts") / "cohorts.json")


@pytest.fixture(scope="module")
def runs(config, world, cohorts, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    train(config, folder / "baseline", world)
    c2al = replace(config, **{"train.lambda_head": 0.3, "train.lambda_tail": 0.2})
    train(c2al, folder / "c2al", world, cohorts)
    return {"baseline": folder / "baseline", "c2al": folder / "c2al"}


def newest(run: Path) -> dict[str, torch.Tensor]:
    return load_unsharded(max((run / "checkpoints").glob("step*")))


def test_scores_are_the_inputs_rows_in_order(config, world, runs, tmp_path):
    rows = score(runs["c2al"], config.data.test, tmp_path / "scores", world)
    table = pq.read_table(tmp_path / "scores")
    source = pq.read_table(config.data.test[0])
    assert rows == table.num_rows == source.num_rows
    assert json.loads((tmp_path / "scores" / "_complete.json").read_text()) == {"rows": rows, "parts": 1}
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
    assert proof["rows_compared"] == 2048
    baseline = {name.removeprefix("model.") for name in newest(runs["baseline"])}
    assert set(proof["parameters"]) == baseline
    assert json.loads((tmp_path / "artifact" / "proof.json").read_text()) == proof
    score(runs[arm], config.data.test, tmp_path / "scores", world)

    # The artifact alone, fed by hand, must give what the sharded training model gave.
    module = torch.export.load(tmp_path / "artifact" / "model.pt2").module()
    reader = BatchReader(
        config.data.test,
        config.data,
        Statistics.from_json((tmp_path / "artifact" / "statistics.json").read_text()),
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
    assert all(".heads.head." in name or ".heads.tail." in name for name in extra)
    assert any(not torch.equal(c2al[name], baseline[name]) for name in baseline), (
        "the auxiliary losses reach the encoder"
    )
