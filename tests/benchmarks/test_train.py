"""benchmarks/train.py end to end at a tiny size: c2al from Parquet, and what stands beside it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    sizes = ["--rounds", "1", "--steps", "8", "--warm-up", "4", "--precision", "bfloat16"]
    command = [
        sys.executable,
        "benchmarks/train.py",
        "--shapes",
        "tiny",
        *sizes,
        "--contenders",
        "c2al-eager",  # compiling is tests/training/test_compilation.py's
        "plain",
        "dlrm",
    ]
    done = subprocess.run(
        [*command, "--breakdown", "--output", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_contender_has_a_row(output):
    rows = list(csv.DictReader((output / "train.csv").open()))
    assert [row["contender"] for row in rows] == ["c2al-eager", "plain", "dlrm"]
    for row in rows:
        for name in ("samples_per_second", "min", "max", "samples_per_cpu_second", "peak_mib", "over_plain"):
            assert float(row[name]) > 0, name
        assert row["machine"]
        assert row["versions"]


def test_the_parts_of_a_step_are_a_whole(output):
    parts = {r["part"]: float(r["share"]) for r in csv.DictReader((output / "train_breakdown.csv").open())}
    assert sum(parts.values()) == pytest.approx(1.0, abs=1e-2)
    for part in ("FMAttention", "Heads", "Objective", "lookup", "table update", "dense optimizer", "data wait"):
        assert parts[part] > 0, part
