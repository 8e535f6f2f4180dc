"""scripts/gpu_check.sh, on the CPU: it is written for a machine that is at hand for minutes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FOREIGN = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torchrec", "fbgemm_gpu", "pyarrow"}:
            raise ModuleNotFoundError(f"{name} is not on the machine", name=name)
sys.meta_path.insert(0, Refuse())
"""


def check(*arguments, **environment):
    command = [str(ROOT / "scripts" / "gpu_check.sh"), *map(str, arguments)]
    given = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=900)


def test_a_dry_run_fills_every_table_where_torch_and_triton_are_alone(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FOREIGN)
    out = tmp_path / "out"
    done = check("--dry-run", out, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stdout + done.stderr
    ends = [line.split(":")[1].split()[0] for line in (out / "summary.txt").read_text().splitlines()]
    assert ends == ["passed"] * 4
    for name, column in (
        ("fm_attention_norm_cpu", "milliseconds"),
        ("gpu_step_cpu", "samples_per_second"),
        ("fm_tune", "microseconds"),
    ):
        rows = list(csv.DictReader((out / f"{name}.csv").open()))
        assert rows, name
        assert all(float(row[column]) > 0 and row["machine"] and row["versions"] for row in rows), name
    losses = {row["precision"]: set() for row in csv.DictReader((out / "gpu_step_cpu.csv").open())}
    for row in csv.DictReader((out / "gpu_step_cpu.csv").open()):
        if row["arm"] == "c2al":
            losses[row["precision"]].add(row["loss"])
    assert all(len(values) == 1 for values in losses.values())  # the same training, whatever runs FM attention


def test_a_part_that_is_not_there_is_refused_by_name(tmp_path):
    done = check("--only", "tests tunning", tmp_path / "out")
    assert done.returncode == 2
    assert "no part is named 'tunning'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_does_not_stop_the_next(tmp_path):
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho FAILED everything\nexit 3\n")
    stub.chmod(0o755)
    done = check("--dry-run", tmp_path / "out", PYTHON=str(stub))
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert done.returncode == 1
    assert [line.split(" after")[0] for line in summary[::2]] == [
        f"{part}: failed (3)" for part in ("tests", "fm_attention", "gpu_step", "tuning")
    ]
    assert summary[1::2] == ["FAILED everything"] * 4


def test_without_a_folder_it_says_how_it_is_used():
    done = check()
    assert done.returncode == 2
    assert "usage: scripts/gpu_check.sh" in done.stderr
