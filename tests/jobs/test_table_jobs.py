"""Shared, weighted, projected and admitted tables through every job: train, score, export, resume, several ranks."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from c2al.config import Config, parse_config, replace
from c2al.distributed.checkpoint import load_unsharded
from c2al.distributed.process import process_group
from c2al.serving.export import export
from c2al.serving.predict import Predictor
from c2al.training.score import score
from c2al.training.trainer import train
from impressions import tree, write_impressions
from ranks import run_ranks


def impressions(folder: Path, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    seen = [rng.integers(0, 50, n).tolist() for n in rng.integers(0, 4, rows)]
    shares = [rng.random(len(bag)).tolist() for bag in seen]
    write_impressions(folder, rows, seed, seen=pa.array(seen, pa.list_(pa.int64())), shares=pa.array(shares))


@pytest.fixture(scope="module")
def rich(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("rich")
    for seed, (split, rows) in enumerate({"train": 4096, "validation": 1024, "test": 1024}.items()):
        impressions(folder / split, rows, seed)
    content = tree(folder)
    item = {"num_embeddings": 40, "encoding": "vocabulary", "min_count": 20, "dim": 4, "table": "thing"}
    content["data"]["sparse"] = [
        {"column": "user_id", "num_embeddings": 100, "min_count": 10, "init": "normal", "init_scale": 0.05},
        {"column": "item_id", **item},
        {"column": "surface", "num_embeddings": 8, "encoding": "vocabulary"},
        {"column": "tags", "num_embeddings": 16, "max_length": 4, "pooling": "mean", "dim": 12},
        {"column": "seen", "max_length": 3, "weights": "shares", **item},
    ]
    content["dist"]["tables"] = [
        {"name": "thing", "sharding": ["row_wise"]},
        {"name": "tags", "sharding": ["row_wise"]},
    ]
    return parse_config(content)


def newest(run: Path) -> dict[str, torch.Tensor]:
    return load_unsharded(max((run / "checkpoints").glob("step*")))


def test_every_job_takes_them(rich, world, tmp_path):
    ne = train(rich, tmp_path / "run", world)
    assert ne is not None
    assert ne < 1
    weights = newest(tmp_path / "run")
    shapes = {n.split(".")[-2]: list(w.shape) for n, w in weights.items() if "embedding_bags" in n}
    assert shapes == {"user_id": [101, 8], "surface": [8, 8], "tags": [16, 12], "thing": [40, 4]}
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())["tables"]
    assert plan["thing"]["sharding"] == "row_wise"
    score(tmp_path / "run", rich.data.test, tmp_path / "scores", world)
    proof = export(tmp_path / "run", rich.data.test, tmp_path / "artifact", world)
    assert proof.rows_compared == 1024
    served = Predictor(tmp_path / "artifact").predict(pq.read_table(rich.data.test[0]))
    assert np.array_equal(served, pq.read_table(tmp_path / "scores")["prediction"])
    # The weights say something: without them the predictions are others.
    prediction = np.asarray(pq.read_table(tmp_path / "scores")["prediction"])
    ones = tmp_path / "ones"
    ones.mkdir()
    table = pq.read_table(rich.data.test[0])
    bags = table["seen"].to_pylist()
    even = pa.array([[0.5] * len(bag) for bag in bags], pa.list_(pa.float64()))
    pq.write_table(table.set_column(table.column_names.index("shares"), "shares", even), ones / "a.parquet")
    score(tmp_path / "run", [str(ones)], tmp_path / "others", world)
    other = np.asarray(pq.read_table(tmp_path / "others")["prediction"])
    filled = np.array([len(bag) > 0 for bag in bags])
    assert np.array_equal(prediction[~filled], other[~filled])
    assert (prediction[filled] != other[filled]).mean() > 0.9


def test_they_resume_exactly(rich, world, tmp_path):
    rich = replace(rich, **{"train.ema": 0.9})
    train(rich, tmp_path / "whole", world)
    train(replace(rich, **{"train.max_steps": 7}), tmp_path / "parts", world)
    train(rich, tmp_path / "parts", world)
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert all(torch.equal(whole[n], parts[n]) for n in whole)


def on_two_ranks(config: Config, run: Path) -> float | None:
    with process_group(config.dist) as world:
        return train(config, run, world)


def test_two_ranks_train_what_one_does(rich, world, tmp_path):
    rich = replace(rich, **{"train.log_every": 1})
    one = train(rich, tmp_path / "one", world)
    two = run_ranks(on_two_ranks, 2, rich, tmp_path / "two")[0]
    assert one == pytest.approx(two, abs=1e-5)
    statistics, losses = [], []
    for run in ("one", "two"):
        statistics.append((tmp_path / run / "statistics.json").read_text())
        records = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        losses.append([r["loss"]["primary"] for r in records if r["kind"] == "train"])
    assert statistics[0] == statistics[1]
    assert len(losses[0]) == 16
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
