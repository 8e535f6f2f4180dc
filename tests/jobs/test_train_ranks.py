"""`c2al train` as users launch it on several ranks: torchrun, gloo, real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from c2al.config import DataConfig, DistConfig, replace, save_config
from c2al.data.scores_folder import check_marker
from c2al.data.source import File
from c2al.data.statistics import fit_statistics
from c2al.distributed.checkpoint import load_unsharded
from c2al.distributed.process import process_group
from impressions import splits, write_impressions
from ranks import run_ranks


def launch(config: Path, output: Path, ranks: int) -> subprocess.CompletedProcess[str]:
    """One host, `ranks` ranks, under torchrun; without it for one rank."""
    runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    job = ["-m", "c2al", "train", "--config", str(config), "--output", str(output)]
    return subprocess.run([sys.executable, *runner, *job], capture_output=True, text=True, timeout=300)


def records(run: Path, kind: str) -> list[dict]:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def test_one_and_two_ranks_agree_for_twenty_steps(tmp_path):
    config = replace(
        splits(tmp_path, rows=5000),  # 19.5 batches an epoch: the last one is padded
        **{"train.epochs": 2, "train.max_steps": 24, "train.log_every": 1, "dist.sharding": ("table_wise", "row_wise")},
    )
    save_config(config, tmp_path / "c.toml")
    for ranks in (1, 2):
        done = launch(tmp_path / "c.toml", tmp_path / f"ranks{ranks}", ranks)
        assert done.returncode == 0, done.stderr
    one, two = (records(tmp_path / f"ranks{n}", "train") for n in (1, 2))
    assert len(one) == len(two) == 24
    for a, b in zip(one, two, strict=True):
        assert b["loss"]["primary"] == pytest.approx(a["loss"]["primary"], abs=1e-5), a["step"]
    assert two[-1]["lifetime"]["primary"]["all"]["weight"] == one[-1]["lifetime"]["primary"]["all"]["weight"]
    (v1,), (v2,) = (records(tmp_path / f"ranks{n}", "validation") for n in (1, 2))
    assert v1["primary"]["all"]["weight"] == v2["primary"]["all"]["weight"] == 2500
    assert v2["primary"]["all"]["ne"] == pytest.approx(v1["primary"]["all"]["ne"], abs=1e-5)


def test_bad_data_on_one_rank_ends_both_with_its_message(tmp_path):
    config = splits(tmp_path, rows=4096)
    # One bad row, late in the data: a single rank meets it while the other waits in a collective.
    write_impressions(tmp_path / "train", 4096, 0, label=[0] * 4095 + [7])
    save_config(config, tmp_path / "c.toml")
    done = launch(tmp_path / "c.toml", tmp_path / "run", 2)
    assert done.returncode != 0
    assert "label" in done.stderr
    assert "7" in done.stderr
    assert "part-0.parquet" in done.stderr
    assert not list((tmp_path / "run").glob("checkpoints/step*"))


def test_a_nonfinite_loss_ends_every_rank_within_a_minute(tmp_path):
    config = replace(splits(tmp_path), **{"train.optimizer.dense_lr": 1e30, "train.epochs": 1000})
    save_config(config, tmp_path / "c.toml")
    start = time.monotonic()
    done = launch(tmp_path / "c.toml", tmp_path / "run", 2)
    assert done.returncode != 0
    assert done.stderr.count("the loss is not finite") >= 2, done.stderr
    assert time.monotonic() - start < 60


def children(process: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_gives_the_exit_code_that_a_shell_gives_it(tmp_path, ranks, number):
    """One rank is told; all save the same step and end alike, and the same command goes on."""
    endless = {"train.epochs": 10_000, "train.log_every": 5, "train.checkpoint.every_steps": 5}
    save_config(replace(splits(tmp_path), **endless), tmp_path / "c.toml")
    runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    job = ["-m", "c2al", "train", "--config", str(tmp_path / "c.toml"), "--output", str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, *runner, *job], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline, "no checkpoint appeared"
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
    os.kill(children(process.pid)[-1] if runner else process.pid, number)
    _, said = process.communicate(timeout=60)
    steps = re.findall(r"c2al train: .*: interrupted; step (\d+) is saved, the same command goes on", said)
    assert len(steps) == ranks, said
    assert len(set(steps)) == 1
    assert list((tmp_path / "run" / "checkpoints").glob(f"step-*{steps[0]}"))
    if runner:
        # torchrun's own code is 1 whatever its workers' are; it names that of the first.
        assert re.findall(r"exitcode +: (-?\d+)", said)[-1] == str(128 + number), said
    else:
        assert process.returncode == 128 + number


def fitted(paths: list[str], data: DataConfig) -> tuple[str, int]:
    """(statistics, row groups that this rank has read)."""
    read = []
    whole = File.read
    File.read = lambda self, *words: (read.append(words), whole(self, *words))[1]
    with process_group(DistConfig(device="cpu")) as world:
        return fit_statistics(paths, data, world.share, world.size).to_json(), len(read)


def test_ranks_share_the_scan_for_statistics_and_agree_bit_for_bit(tmp_path):
    config = splits(tmp_path, rows=1001)
    for seed in (5, 6):
        write_impressions(tmp_path / "train", 400, seed)
    (one,) = run_ranks(fitted, 1, config.data.train, config.data)
    assert one[1] == 13
    for ranks in (2, 3):
        several = run_ranks(fitted, ranks, config.data.train, config.data)
        assert {statistics for statistics, _ in several} == {one[0]}
        counts = [read for _, read in several]
        assert sum(counts) == 13
        assert max(counts) - min(counts) <= 1


def test_no_rank_saves_an_unchecked_step(tmp_path):
    wild = {"train.log_every": 1000, "train.checkpoint.every_steps": 1, "train.optimizer.dense_lr": 1e18}
    save_config(replace(splits(tmp_path), **wild), tmp_path / "c.toml")
    done = launch(tmp_path / "c.toml", tmp_path / "run", 2)
    assert done.returncode != 0
    assert done.stderr.count("not finite") >= 2, done.stderr
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        assert all(torch.isfinite(w).all() for w in load_unsharded(path).values()), path


def test_two_ranks_score_as_one(tmp_path):
    config = splits(tmp_path)
    save_config(config, tmp_path / "c.toml")
    assert launch(tmp_path / "c.toml", tmp_path / "run", 2).returncode == 0
    tables = []
    for ranks in (1, 2):
        runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        # Without the second dash torchrun takes --run for an option of its own.
        job = [*(["-m", "--", "c2al"] if runner else ["-m", "c2al"]), "score", "--run", str(tmp_path / "run")]
        words = ["--data", *config.data.test, "--output", str(tmp_path / f"scores{ranks}")]
        command = [sys.executable, *runner, *job, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        marker = check_marker(tmp_path / f"scores{ranks}")
        assert marker is not None
        assert len(marker.parts) == ranks
        tables.append(pq.read_table(tmp_path / f"scores{ranks}"))
    assert tables[0]["row_id"].equals(tables[1]["row_id"])
    np.testing.assert_allclose(tables[0]["prediction"], tables[1]["prediction"], rtol=1e-5, atol=1e-6)
