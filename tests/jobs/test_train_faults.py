"""What must not happen to a run: each test is named for a kind of fault."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from c2al.__main__ import main
from c2al.config import replace, save_config
from c2al.distributed.checkpoint import load_unsharded
from c2al.errors import C2ALError, ConfigError, DataError, OutputError, StateError, TerminateError, TrainingError
from c2al.files import only_writer
from c2al.training.interrupt import Interrupt
from c2al.training.run_folder import start_run
from c2al.training.trainer import Trainer, train
from impressions import splits, write_impressions


def manifests(run: Path) -> dict[int, dict]:
    found = [json.loads((p / "complete.json").read_text()) for p in (run / "checkpoints").glob("step-*")]
    return {m["step"]: m for m in found}


def files(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_second_writer_is_refused_by_name(config, world, tmp_path):
    with only_writer(tmp_path / "run"), pytest.raises(OutputError, match=r"run: is being written by process \d+ on "):
        train(config, tmp_path / "run", world)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock"], "the other writer's folder is left alone"
    train(config, tmp_path / "run", world)  # the lock that a writer left behind is taken over
    assert manifests(tmp_path / "run")


LATE = {
    "a file of validation that is not there": (
        {"data.validation": ("/none/valid",)},
        {},
        "data.validation: .*valid",
    ),
    "a file of test that is not there": ({"data.test": ("/none/tset",)}, {}, "data.test: .*tset: no such file"),
    "a column that validation lacks": ({}, {"age": None}, "data.validation: .*part-1.parquet: no column 'age'"),
    "a type that validation has": ({}, {"age": ["x"] * 64}, "data.validation: .*column 'age' has type string"),
    "the column of an axis": ({"axes": ({"name": "s", "column": "srface"},)}, {}, "data.train: .*'srface'"),
    "the row id": ({"data.row_id": "rowid"}, {}, "data.train: .*no column 'rowid'"),
    "the user id": ({"data.user_id": "user"}, {}, "data.train: .*no column 'user'"),
}


@pytest.mark.parametrize("case", LATE)
def test_what_is_wrong_with_any_split_is_met_before_the_first_step(case, config, world, tmp_path):
    changes, columns, message = LATE[case]
    if columns:
        folder = write_impressions(tmp_path / "v", 64, 1, **columns)
        changes = {"data.validation": (str(folder),)}
    with pytest.raises(DataError, match=message):
        train(replace(config, **changes), tmp_path / "made" / "run", world)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_trained_weights_outlive_an_evaluation_that_fails(config, world, tmp_path, asynchronous):
    age = np.full(512, 30.0)
    age[400] = np.nan
    folder = write_impressions(tmp_path / "v", 512, 1, age=age)
    bad = replace(config, **{"data.validation": (str(folder),), "train.checkpoint.asynchronous": asynchronous})
    with pytest.raises(DataError, match=r"part-1.parquet, row group 3, row 16: column 'age' is nan"):
        train(bad, tmp_path / "run", world)
    assert {step: m["ne"] for step, m in manifests(tmp_path / "run").items()} == {16: None}
    train(config, tmp_path / "run", world)  # the mended split is read, and the run is finished


def relabelled(folder: Path) -> str:
    file = folder / "part-0.parquet"
    table = pq.read_table(file)
    label = np.asarray(table["label"]).copy()
    label[:100] = label[:100][::-1]  # as many of each, so that the footer is the same
    index = table.column_names.index("label")
    pq.write_table(table.set_column(index, "label", [label]), file, row_group_size=1024)
    return "has the same size and other content"


def shortened(folder: Path) -> str:
    write_impressions(folder, 4000)
    return "had 4,096 rows, has 4,000"


def regrouped(folder: Path) -> str:
    file = folder / "part-0.parquet"
    pq.write_table(pq.read_table(file), file, row_group_size=512)
    return "has its rows in other row groups"


def extended(folder: Path) -> str:
    write_impressions(folder, 64, 7)
    return "part-7.parquet: was not there before"


@pytest.mark.parametrize("change", [relabelled, shortened, regrouped, extended])
@pytest.mark.parametrize("steps", [4, 0])
def test_training_data_that_changed_is_named_at_a_resume(change, steps, world, tmp_path):
    config = splits(tmp_path)
    train(replace(config, **{"train.max_steps": steps}), tmp_path / "run", world)
    before = files(tmp_path / "run" / "checkpoints")
    message = change(tmp_path / "train")
    with pytest.raises(ConfigError, match=rf"holds a run on other training data: .*{message}.*; give another --output"):
        train(config, tmp_path / "run", world)
    assert files(tmp_path / "run" / "checkpoints") == before


def test_a_finished_run_says_so_and_takes_new_validation_data(world, tmp_path, capsys):
    config = splits(tmp_path)
    ne = train(config, tmp_path / "run", world)
    before = files(tmp_path / "run" / "checkpoints")
    write_impressions(tmp_path / "validation", 512, 1)
    capsys.readouterr()
    assert train(config, tmp_path / "run", world) == ne
    assert f"{tmp_path / 'run'}: already finished: 16 of 16 steps are done" in capsys.readouterr().err
    assert files(tmp_path / "run" / "checkpoints") == before


def test_statistics_belong_to_the_training_data(world, tmp_path):
    config = splits(tmp_path)
    start_run(tmp_path / "run", config, None, world)
    (tmp_path / "run" / "config.toml").unlink()  # died before its folder was whole
    write_impressions(tmp_path / "train", 4096, 0, age=np.random.default_rng(0).normal(90, 1, 4096))
    mean = start_run(tmp_path / "run", config, None, world).statistics.moments["age"].mean
    assert 89 < mean < 91
    statistics = tmp_path / "run" / "statistics.json"
    statistics.write_text(statistics.read_text().replace("feed", "food"))
    with pytest.raises(StateError, match=r"statistics.json: changed since the run began"):
        start_run(tmp_path / "run", config, None, world)


def test_checkpoints_without_their_config_are_not_taken_over(config, world, tmp_path):
    train(config, tmp_path / "run", world)
    (tmp_path / "run" / "config.toml").unlink()
    with pytest.raises(ConfigError, match=r"holds checkpoints, but no config.toml"):
        train(config, tmp_path / "run", world)


@pytest.mark.parametrize(
    ("key", "value"), [("dist.forward_comm", "fp16"), ("dist.backward_comm", "bf16"), ("train.precision", "bfloat16")]
)
def test_other_arithmetic_is_refused_at_a_resume(config, world, tmp_path, key, value):
    train(replace(config, **{"train.max_steps": 2}), tmp_path / "run", world)
    with pytest.raises(ConfigError, match=rf"holds a run with {key} = .*, not '{value}'"):
        train(replace(config, **{key: value}), tmp_path / "run", world)


def test_a_longer_schedule_with_decay_is_another_run(config, world, tmp_path):
    decay = {"train.optimizer.decay": "linear"}
    train(replace(config, **{"train.max_steps": 2}, **decay), tmp_path / "run", world)
    with pytest.raises(ConfigError, match=r"holds a run with train.max_steps = 2, not 4"):
        train(replace(config, **{"train.max_steps": 4}, **decay), tmp_path / "run", world)


def test_a_checkpoint_carries_the_ne_of_its_own_step_or_none(config, world, tmp_path):
    often = {"train.checkpoint.every_steps": 2, "train.checkpoint.keep_last": 100, "train.eval_every": 4}
    train(replace(config, **often), tmp_path / "run", world)
    found = manifests(tmp_path / "run")
    assert sorted(found) == list(range(2, 17, 2))
    assert {step for step, m in found.items() if m["ne"] is not None} == {4, 8, 12, 16}


def test_no_unchecked_step_is_saved(config, world, tmp_path):
    """A loss is looked at wherever a checkpoint is due, however far the next log line is."""
    wild = {"train.log_every": 1000, "train.checkpoint.every_steps": 1, "train.optimizer.dense_lr": 1e18}
    with pytest.raises(TrainingError, match=r"not finite.*(the last good checkpoint is .*step|no checkpoint)"):
        train(replace(config, **wild), tmp_path / "run", world)
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        assert all(torch.isfinite(w).all() for w in load_unsharded(path).values()), path


def test_one_device_is_not_waited_for_between_due_steps(config, world, tmp_path, monkeypatch):
    """Neither the check nor the flag of a signal touches the device where nothing depends on a loss."""
    quiet = replace(config, **{"train.log_every": 1000})
    trainer = Trainer(start_run(tmp_path / "run", quiet, None, world), world)
    trainer.step = 3
    looked: list[bool] = []
    monkeypatch.setattr(trainer, "_refuse_nonfinite", lambda: looked.append(True))
    monkeypatch.setattr(type(world), "all_sum", lambda *_: pytest.fail("a collective on one rank"))
    with Interrupt() as interrupt:
        trainer._check(interrupt, None)
        assert not looked
        trainer.step = trainer.total
        trainer._check(interrupt, None)
        assert looked == [True]


def test_a_launchers_sigterm_does_not_cut_off_a_rank_that_ends_already():
    """It comes when the first rank has ended, as soon as training has let go of the signals."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append("terminated"))
    try:
        for error, expected in ((TerminateError("step 3 is saved"), []), (DataError("a null"), ["terminated"])):
            with contextlib.suppress(C2ALError), Interrupt():
                raise error
            os.kill(os.getpid(), signal.SIGTERM)
            assert came == expected
            signal.signal(signal.SIGTERM, lambda *_: came.append("terminated"))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_output_that_cannot_be_made_is_named(config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    save_config(config, tmp_path / "c.toml")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        assert main(["train", "--config", str(tmp_path / "c.toml"), "--output", str(output)]) == 2
        assert str(tmp_path / "file") in capsys.readouterr().err


DAMAGED = {
    "inputs.json": ('{"format": "c2al.training_inputs", "version": 1, "train": 3}', "inputs.json: damaged"),
    "statistics.json": ("[]", "statistics.json"),
    "metrics.jsonl": ('{"step": 1}\n[]\n', "metrics.jsonl, line 2"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_state_file_is_named(config, tmp_path, capsys, world, name):
    content, message = DAMAGED[name]
    train(replace(config, **{"train.max_steps": 2}), tmp_path / "run", world)
    (tmp_path / "run" / name).write_text(content)
    save_config(config, tmp_path / "c.toml")
    assert main(["train", "--config", str(tmp_path / "c.toml"), "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_an_interrupted_start_leaves_what_was_there(config, world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(DataError):
        train(replace(config, **{"data.train": (str(tmp_path / "none"),)}), tmp_path / "run", world)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "run")
