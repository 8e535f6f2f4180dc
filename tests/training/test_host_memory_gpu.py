"""Tables in host memory on a GPU, with TorchRec: run with `pytest -m gpu tests/training` after `make setup-cuda`."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from c2al.config import Config, replace
from c2al.distributed.process import process_group
from c2al.training.score import score
from c2al.training.trainer import train
from impressions import splits

pytestmark = pytest.mark.gpu


def trained_and_scored(config: Config, folder: Path) -> tuple[list[float], list[float]]:
    """Losses and validation NEs of the log, and predictions of the checkpoint."""
    with process_group(config.dist) as world:
        train(config, folder / "run", world)
        score(folder / "run", config.data.validation, folder / "scores", world)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"]["primary"] for r in records if r["kind"] == "train"]
    nes = [r["primary"]["all"]["ne"] for r in records if r["kind"] == "validation"]
    return losses + nes, pq.read_table(folder / "scores").column("prediction").to_pylist()


def test_a_table_in_host_memory_is_trained_as_one_in_device_memory(tmp_path):
    """A cache of a tenth of the rows, with evaluations and checkpoints between, then loaded to be scored."""
    steps = {"train.max_steps": 12, "train.log_every": 1, "train.eval_every": 3, "train.checkpoint.every_steps": 4}
    given = {"dist.device": "cuda", "dist.sharding": ["table_wise"], "dist.cache_load_factor": 0.1}
    config = replace(splits(tmp_path), **steps, **given, **{"train.compile": "off"})
    logged, predicted = trained_and_scored(config, tmp_path / "fused")
    cached = replace(config, **{"dist.kernels": ["fused_uvm_caching"]})
    assert trained_and_scored(cached, tmp_path / "cached") == (
        pytest.approx(logged, rel=1e-5),
        pytest.approx(predicted, rel=1e-5),
    )
    plan = json.loads((tmp_path / "cached" / "run" / "plan.json").read_text())["tables"]
    assert {table["cache_load_factor"] for table in plan.values()} == {0.1}
