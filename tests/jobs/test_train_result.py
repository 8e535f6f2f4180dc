"""Which weights are a run's result: the best with early stopping, the moving average with train.ema."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from c2al.__main__ import main
from c2al.config import Config, EarlyStoppingConfig, parse_config, replace, save_config
from c2al.distributed.checkpoint import load_unsharded
from c2al.distributed.checkpoint.parts import StoredParts
from c2al.distributed.process import process_group
from c2al.errors import ConfigError
from c2al.serving.export import export
from c2al.training.early_stopping import Waiting
from c2al.training.score import score
from c2al.training.trainer import train
from impressions import tree
from ranks import run_ranks

STOPPING = {
    "train.epochs": 8,
    "train.eval_every": 4,
    "train.early_stopping.patience": 3,
    "train.optimizer.dense_lr": 0.03,
    "train.optimizer.sparse_lr": 0.3,
}
"""Rates at which the small set is soon overfitted."""


def records(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def normalised_entropy(prediction: np.ndarray, label: np.ndarray) -> float:
    """Eq. 13 of the C2AL paper."""
    p, q = prediction.astype(np.float64), label.mean()
    loss = -np.where(label == 1, np.log(p), np.log1p(-p)).mean()
    return loss / -(q * np.log(q) + (1 - q) * np.log(1 - q))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def assert_equal_checkpoints(a: Path, b: Path) -> None:
    left, right = StoredParts(a), StoredParts(b)
    assert left.manifest.extra == right.manifest.extra
    assert left.manifest.optimizer == right.manifest.optimizer
    keys = json.loads((a / "tensors.json").read_text())["tensors"].keys()
    assert keys == json.loads((b / "tensors.json").read_text())["tensors"].keys()
    for key in keys:
        assert torch.equal(left.whole(key), right.whole(key)), key


def test_patience_counts_evaluations_without_a_better_ne():
    config, waiting = EarlyStoppingConfig(patience=2, min_delta=0.1), Waiting()
    seen = []
    for step, ne in enumerate([None, 1.0, 0.95, 0.85, None, 0.76, 0.7]):
        waiting = waiting.after(config, ne, step)
        seen.append((waiting.best, waiting.since, waiting.over(config)))
    assert seen == [
        (None, 1, False),
        (1.0, 0, False),
        (1.0, 1, False),  # 0.05 better is not better enough
        (0.85, 0, False),
        (0.85, 1, False),
        (0.85, 2, True),  # nor is 0.09
        (0.7, 0, False),
    ]
    assert not Waiting(since=9).over(EarlyStoppingConfig())


@pytest.fixture(scope="module")
def stopped(config, world, tmp_path_factory) -> Path:
    """A run with early stopping and a moving average."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    train(replace(config, **STOPPING, **{"train.ema": 0.9}), run, world)
    return run


def test_training_ends_when_patience_does_and_the_best_weights_are_the_result(config, world, stopped, tmp_path, capsys):
    evaluations = [(r["primary"]["all"]["ne"], r["step"]) for r in records(stopped, "validation")]
    best, step = min(evaluations)
    assert 0 < step < evaluations[-1][1] == step + 3 * 4 < 8 * 16
    assert len(records(stopped, "y")) == 1, "what is due at the end is done at this end, too"
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (stopped / "checkpoints").rglob("*"))
    assert train(replace(config, **STOPPING, **{"train.ema": 0.9}), stopped, world) == best
    assert "already finished" in capsys.readouterr().err
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in (stopped / "checkpoints").rglob("*"))
    score(stopped, config.data.validation, tmp_path / "scores", world)
    assert re.search(rf"step-{step:08d}, the best checkpoint", capsys.readouterr().err)
    scores = pq.read_table(tmp_path / "scores")
    ne = normalised_entropy(np.asarray(scores["prediction"]), np.asarray(scores["label"]))
    assert ne == pytest.approx(best, rel=1e-5), "the very weights that the best evaluation judged"
    proof = export(stopped, config.data.test, tmp_path / "artifact", world)
    assert proof.checkpoint == f"step-{step:08d}"


def test_a_resumed_run_stops_where_the_uninterrupted_one_does(config, world, stopped, tmp_path):
    config = replace(config, **STOPPING, **{"train.ema": 0.9})
    last = records(stopped, "validation")[-1]["step"]
    for steps in (8, last - 4):
        train(replace(config, **{"train.max_steps": steps}), tmp_path / "run", world)
    train(config, tmp_path / "run", world)
    ends = [[(r["step"], r["primary"]) for r in records(r_, "validation")] for r_ in (stopped, tmp_path / "run")]
    assert ends[0] == ends[1]
    assert_equal_checkpoints(checkpoint(stopped, last), checkpoint(tmp_path / "run", last))


def on_two_ranks(config: Config, run: Path) -> float | None:
    with process_group(config.dist) as world:
        return train(config, run, world)


def test_two_ranks_stop_together(config, stopped, tmp_path):
    config = replace(config, **STOPPING, **{"train.ema": 0.9})
    left, right = run_ranks(on_two_ranks, 2, config, tmp_path / "run")
    assert left == right == min(r["primary"]["all"]["ne"] for r in records(tmp_path / "run", "validation"))
    ends = [records(run, "validation")[-1]["step"] for run in (stopped, tmp_path / "run")]
    assert ends[1] < 8 * 16
    # The two differ in the last digits, so the best step could differ; the first evaluation cannot.
    first = [records(run, "validation")[0]["primary"]["all"]["ne"] for run in (stopped, tmp_path / "run")]
    assert first[0] == pytest.approx(first[1], abs=1e-5)


def test_killed_between_saving_and_evaluating_a_step(config, world, stopped, tmp_path):
    config = replace(config, **STOPPING, **{"train.ema": 0.9, "train.checkpoint.every_steps": 4})
    run, last = tmp_path / "run", records(stopped, "validation")[-1]["step"]
    train(replace(config, **{"train.max_steps": 8}), run, world)
    # What lies there when step 8 is saved and its evaluation is not.
    marker = checkpoint(run, 8) / "complete.json"
    content, earlier = (json.loads((checkpoint(run, step) / "complete.json").read_text()) for step in (8, 4))
    content["ne"] = None
    content["extra"] |= {name: earlier["extra"][name] for name in ("waiting", "ne")}
    marker.write_text(json.dumps(content))
    train(config, run, world)
    assert_equal_checkpoints(checkpoint(stopped, last), checkpoint(run, last))


def test_the_average_is_what_evaluation_scoring_and_export_use(config, world, tmp_path):
    steps = 6
    config = replace(config, **{"train.ema": 0.8, "train.max_steps": steps, "train.checkpoint.every_steps": 1})
    config = replace(config, **{"train.checkpoint.keep_last": steps})
    ne = train(config, tmp_path / "run", world)
    train(replace(config, **{"train.ema": 0.0}), tmp_path / "plain", world)
    name, average = "model.over.heads.primary.0.weight", None
    for step in range(1, steps + 1):
        raw = StoredParts(checkpoint(tmp_path / "run", step))
        assert torch.equal(
            raw.whole(f"model/{name}"), StoredParts(checkpoint(tmp_path / "plain", step)).whole(f"model/{name}")
        ), "training itself does not see the average"
        # Step 1 starts from the initial weights, which no checkpoint holds.
        decay = min(0.8, step / (9 + step))
        now = raw.whole(f"ema/{name}")
        if average is not None:
            expected = average + (1 - decay) * (raw.whole(f"model/{name}") - average)
            torch.testing.assert_close(now, expected, rtol=1e-6, atol=1e-8)
        average = now
    newest = checkpoint(tmp_path / "run", steps)
    assert torch.equal(load_unsharded(newest)[name], average)
    assert not torch.equal(average, raw.whole(f"model/{name}"))
    score(tmp_path / "run", config.data.validation, tmp_path / "scores", world)
    scores = pq.read_table(tmp_path / "scores")
    judged = normalised_entropy(np.asarray(scores["prediction"]), np.asarray(scores["label"]))
    assert judged == pytest.approx(ne, rel=1e-5)
    export(tmp_path / "run", config.data.test, tmp_path / "artifact", world)
    served = torch.export.load(tmp_path / "artifact" / "model.pt2").state_dict
    assert torch.equal(served[name], average)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"early_stopping": {"patience": 2}}, "train.eval_every: must be a positive multiple of accumulate"),
        ({"early_stopping": {"patience": 2}, "eval_every": 3, "accumulate": 2}, "train.eval_every: must be a positive"),
        (
            {"early_stopping": {"patience": 2}, "eval_every": 4, "checkpoint": {"keep_best": 0}},
            "train.checkpoint.keep_best: must be at least 1",
        ),
        ({"early_stopping": {"patience": -1}}, "train.early_stopping.patience: must not be negative"),
        ({"early_stopping": {"min_delta": 0.1}}, "without effect: patience is 0"),
        ({"ema": 1.0}, r"train.ema: must lie in \[0, 1\), is 1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, section, message):
    content = tree(tmp_path)
    content["train"] |= section
    with pytest.raises(ConfigError, match=message):
        parse_config(content)


def test_early_stopping_needs_a_validation_split(tmp_path):
    content = tree(tmp_path)
    content["data"]["validation"] = []
    content["train"] |= {"early_stopping": {"patience": 2}, "eval_every": 4}
    with pytest.raises(ConfigError, match="names no files"):
        parse_config(content)


def test_another_patience_is_another_run(config, world, stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path / "run")
    save_config(replace(config, **STOPPING, **{"train.ema": 0.9}), tmp_path / "c.toml")
    words = ["train", "--config", str(tmp_path / "c.toml"), "--output", str(tmp_path / "run")]
    assert main([*words, "--train.early_stopping.patience", "5"]) == 2
    assert "train.early_stopping.patience = 3, not 5" in capsys.readouterr().err
