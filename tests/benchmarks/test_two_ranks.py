"""benchmarks/two_ranks.py: one round on a tiny shape, with the ratios of the same round."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "two_ranks.py"


@pytest.mark.slow
def test_a_round_of_one_and_two_ranks(tmp_path):
    words = ["--shape", "tiny", "--rounds", "1", "--steps", "8", "--compile", "off", "--contenders", "one", "two"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--output", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "ranks.csv").open() as file:
        one, two = csv.DictReader(file)
    assert (one["contender"], two["contender"]) == ("one", "two")
    assert float(one["over_one"]) == 1.0
    ratio = float(two["samples_per_second"]) / float(one["samples_per_second"])
    assert abs(float(two["over_one"]) - ratio) < 0.01
