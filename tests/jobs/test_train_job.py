"""`train` in this process: determinism, resume, what stops it and what it leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from c2al.__main__ import main
from c2al.config import Config, parse_config, replace, save_config
from c2al.distributed.checkpoint import load_unsharded
from c2al.errors import CheckpointError, ConfigError, InterruptError, TrainingError
from c2al.training.trainer import Trainer, train
from impressions import tree, write_cohorts, write_impressions


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").glob("step*"))
    return load_unsharded(newest)


def assert_equal_weights(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def records(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def test_training_learns_and_writes_its_folder(config, world, tmp_path):
    config = replace(config, **{"train.epochs": 3})
    ne = train(config, tmp_path / "run", world)
    assert ne is not None
    assert ne < 0.99, "learns more than the base rate"
    assert [r["step"] for r in records(tmp_path / "run", "train")] == list(range(4, 49, 4))
    last = records(tmp_path / "run", "train")[-1]
    assert last["lifetime"]["primary"]["all"]["weight"] == 3 * 4096, "every row once an epoch"
    assert last["seconds"]["total"] > 0
    assert records(tmp_path / "run", "validation")[-1]["primary"]["all"]["ne"] == ne
    (y,) = records(tmp_path / "run", "y")
    assert any(layer.get("near_zero") is not None for layer in y.values() if isinstance(layer, dict))
    assert {"data", "forward", "backward", "optimizer", "other"} <= last["seconds"].keys()
    assert last["input_dist_overlapped"] is None, "one process on the CPU distributes nothing"
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_profiler_trace_on_request(config, world, tmp_path):
    train(replace(config, **{"train.profile_steps": 2}), tmp_path / "run", world)
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert "## forward" in trace.read_text()


def test_resumed_equals_uninterrupted(config, world, tmp_path):
    config = replace(config, **{"train.epochs": 2, "model.dropout": 0.1, "train.optimizer.warmup_steps": 5})
    train(config, tmp_path / "whole", world)
    for stop in (7, 20):  # inside the first epoch, inside the second
        train(replace(config, **{"train.max_steps": stop}), tmp_path / "parts", world)
    train(config, tmp_path / "parts", world)
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")
    assert [r["step"] for r in records(tmp_path / "parts", "validation")] == [7, 20, 32]
    for kind in ("train", "validation"):
        whole, parts = (records(tmp_path / run, kind)[-1] for run in ("whole", "parts"))
        for table in ("primary",) if kind == "validation" else ("lifetime", "loss"):
            assert parts[table] == whole[table], "a resumed run counts what the uninterrupted one counts"


def test_an_interruption_loses_no_record(config, world, tmp_path, monkeypatch):
    """Told to stop at a step that is to be evaluated: its window is logged at once, and it is evaluated later."""
    config = replace(config, **{"train.max_steps": 12, "train.log_every": 8, "train.eval_every": 5})
    train(config, tmp_path / "whole", world)
    advance = Trainer.advance

    def told_to_stop(trainer, batches) -> None:
        advance(trainer, batches)
        if trainer.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "advance", told_to_stop)
    with pytest.raises(InterruptError):
        train(config, tmp_path / "parts", world)
    monkeypatch.setattr(Trainer, "advance", advance)
    train(config, tmp_path / "parts", world)
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (records(tmp_path / run, "validation") for run in ("whole", "parts"))
    assert [r["step"] for r in parts] == [5, 10, 12]
    assert [r["primary"] for r in parts] == [r["primary"] for r in whole]
    logged = {run: records(tmp_path / run, "train") for run in ("whole", "parts")}
    assert [r["step"] for r in logged["parts"]] == [5, 8, 12]
    seen = {run: sum(r["window"]["primary"]["all"]["weight"] for r in found) for run, found in logged.items()}
    assert seen["parts"] == seen["whole"]


@pytest.fixture(scope="module")
def evaluated(config, world, tmp_path_factory) -> tuple[Path, Config, float]:
    """A whole run of 16 steps that does everything at every fourth, its configuration and its NE."""
    every = {"train.eval_every": 4, "train.y_every": 4, "train.log_every": 4, "train.checkpoint.every_steps": 4}
    config = replace(config, **{"train.max_steps": 16}, **every)
    run = tmp_path_factory.mktemp("evaluated") / "whole"
    return run, config, train(config, run, world)


@pytest.mark.parametrize("step", [4, 16])
@pytest.mark.parametrize("where", ["_save", "_record_y", "_evaluate"])
def test_what_a_step_still_owes_is_done_by_the_next_process(evaluated, world, tmp_path, monkeypatch, step, where):
    """The process dies after it has saved the step, after its Y, or after its evaluation; also at the last step."""
    uninterrupted, config, ne = evaluated
    done = getattr(Trainer, where)

    def then_dies(trainer, *words) -> None:
        done(trainer, *words)
        if trainer.step == step:
            trainer.checkpoints.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, where, then_dies)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", world)
    monkeypatch.setattr(Trainer, where, done)
    assert train(config, tmp_path / "parts", world) == ne
    assert_equal_weights(uninterrupted, tmp_path / "parts")
    whole, parts = (
        {(r["kind"], r["step"]): r for r in map(json.loads, lines)}
        for lines in ((run / "metrics.jsonl").read_text().splitlines() for run in (uninterrupted, tmp_path / "parts"))
    )
    assert len((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()) == len(parts), "each record once"
    assert whole.keys() == parts.keys()
    for kind in ("y", "units", "validation", "weights"):
        assert [r for k, r in whole.items() if k[0] == kind] == [parts[k] for k in whole if k[0] == kind]


def test_accumulated_steps_resume_too(config, world, tmp_path):
    config = replace(config, **{"train.epochs": 1, "train.accumulate": 3, "train.log_every": 3})
    train(config, tmp_path / "whole", world)
    train(replace(config, **{"train.max_steps": 6}), tmp_path / "parts", world)
    train(config, tmp_path / "parts", world)
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")


def command(config_path: Path, run: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "c2al", "train", "--config", str(config_path), "--output", str(run), *words]


@pytest.fixture(scope="module")
def uninterrupted(config, world, tmp_path_factory) -> Path:
    """A folder with c.toml and its run in whole/."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = replace(config, **{"train.epochs": 6, "train.checkpoint.every_steps": 5})
    save_config(config, folder / "c.toml")
    train(config, folder / "whole", world)
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_started_again_equals_uninterrupted(uninterrupted, tmp_path, number):
    shutil.copy(uninterrupted / "c.toml", tmp_path)
    process = subprocess.Popen(command(tmp_path / "c.toml", tmp_path / "run"), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("step*")):
        assert time.monotonic() < deadline, "no checkpoint appeared"
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode in (128 + number, 0), text
        assert process.returncode == 0 or "the same command goes on" in text
    else:
        assert process.returncode == -signal.SIGKILL
    done = subprocess.run(command(tmp_path / "c.toml", tmp_path / "run"), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_equal_weights(uninterrupted / "whole", tmp_path / "run")
    last = records(tmp_path / "run", "train")[-1]
    said = f"step {last['step']} of {last['step']}: {last['samples_per_second']:,.0f} samples/s, NE "
    assert said in done.stderr, "the speed is told where no terminal is"


def test_nonfinite_loss_stops_and_keeps_the_last_good_checkpoint(config, world, tmp_path):
    wild = replace(
        config,
        **{
            "train.epochs": 4,
            "train.checkpoint.every_steps": 2,
            "train.optimizer.dense_lr": 1e30,
            "train.optimizer.warmup_steps": 0,
        },
    )
    calm = replace(wild, **{"train.optimizer.dense_lr": 1e-3})
    train(replace(calm, **{"train.max_steps": 4}), tmp_path / "run", world)
    before = weights(tmp_path / "run")
    save_config(wild, tmp_path / "run" / "config.toml")
    with pytest.raises(TrainingError, match=r"the loss is not finite.*the last good checkpoint is .*step"):
        train(wild, tmp_path / "run", world)
    after = weights(tmp_path / "run")
    assert all(torch.isfinite(w).all() for w in after.values())
    assert before.keys() == after.keys()


def test_a_folder_of_another_run_is_refused(config, world, tmp_path):
    train(replace(config, **{"train.max_steps": 2}), tmp_path / "run", world)
    with pytest.raises(ConfigError, match=r"holds a run with train.batch_size = 256, not 512; give another --output"):
        train(replace(config, **{"train.batch_size": 512}), tmp_path / "run", world)
    other = replace(config, **{"model.embedding_dim": 16})
    save_config(other, tmp_path / "run" / "config.toml")
    with pytest.raises(CheckpointError):
        train(other, tmp_path / "run", world)


BAD = {
    "missing column": ({"age": None}, [], ["part-0.parquet", "age"]),
    "wrong type": ({"item_id": ["x"] * 64}, [], ["part-0.parquet", "item_id", "string"]),
    "label": ({"label": [0] * 63 + [2]}, [], ["part-0.parquet", "label", "2", "row group 3"]),
    "nan dense": ({"age": [1.0] * 20 + [np.nan] + [1.0] * 43}, [], ["part-0.parquet", "age", "nan", "row group 1"]),
    "identity out of range": ({"item_id": [0] * 10 + [64] + [0] * 53}, [], ["part-0.parquet", "item_id", "64"]),
    "unknown key": ({}, ["--train.lr", "1"], ["c.toml", "train.lr", "unknown key"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_nothing(case, tmp_path, capsys):
    changes, overrides, words = BAD[case]
    write_impressions(tmp_path / "train", 64, **changes)
    assert_refused(tmp_path, capsys, words, overrides)


def test_empty_dataset_is_refused(tmp_path, capsys):
    write_impressions(tmp_path / "train", 0)
    assert_refused(tmp_path, capsys, [str(tmp_path / "train"), "rows"])


def test_truncated_parquet_is_refused(tmp_path, capsys):
    (file,) = write_impressions(tmp_path / "train", 64).iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(tmp_path, capsys, [str(file)])


def assert_refused(folder: Path, capsys, words: list[str], overrides: Sequence[str] = ()) -> None:
    save_config(parse_config(tree(folder)), folder / "c.toml")
    arguments = ["train", "--config", str(folder / "c.toml"), "--output", str(folder / "run"), *overrides]
    assert main([*arguments, "--data.validation", "[]", "--data.test", "[]"]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word.lower() in message.lower(), message
    assert sorted(p.name for p in folder.iterdir()) == ["c.toml", "train"], "nothing is left behind"


def test_auxiliary_losses_need_cohorts(config, world, tmp_path):
    with pytest.raises(ConfigError, match="needs the cohorts; give --cohorts"):
        train(replace(config, **{"train.auxiliary_lambda": 0.1}), tmp_path / "run", world)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("label", "found"), [(1, "no rows"), (0, "64 rows but no positives")])
def test_a_cohort_that_can_teach_nothing_is_refused(tmp_path, capsys, label, found):
    surface = ["feed"] * 64 if label else ["story"] * 64
    write_impressions(tmp_path / "train", 64, surface=surface, label=np.full(64, label, np.int8))
    write_cohorts(tmp_path / "cohorts.json")
    save_config(parse_config(tree(tmp_path)), tmp_path / "c.toml")
    words = ["--cohorts", str(tmp_path / "cohorts.json"), "--train.lambdas.tail", "0.5"]
    words += ["--data.validation", "[]", "--data.test", "[]"]
    assert main(["train", "--config", str(tmp_path / "c.toml"), "--output", str(tmp_path / "run"), *words]) == 2
    message = capsys.readouterr().err
    assert f"cohorts.json: the tail cohort surface = story has {found} in data.train" in message
    assert not (tmp_path / "run").exists()


def test_undefined_ne_is_none_in_the_log(config, world, tmp_path):
    folder = write_impressions(tmp_path / "one_class", 256, 9, label=np.ones(256, np.int8))
    ne = train(replace(config, **{"data.validation": (str(folder),)}), tmp_path / "run", world)
    assert ne is None
    assert records(tmp_path / "run", "validation")[-1]["primary"]["all"]["ne"] is None
