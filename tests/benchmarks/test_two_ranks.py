"""benchmarks/two_ranks.py: three rounds on a tiny shape, in turns; who is not at turn stands still."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "two_ranks.py"


def test_a_table_keeps_the_rows_of_other_commands(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from machine import write_table

    table, key = tmp_path / "t.csv", ("shape", "compile")
    write_table(table, [{"shape": "a", "compile": "off", "ms": 1}], key)
    write_table(table, [{"shape": "a", "compile": "on", "ms": 2}], key)
    write_table(table, [{"shape": "a", "compile": "off", "ms": 3, "blocks": 4}], key)
    assert table.read_text().splitlines() == ["shape,compile,ms,blocks", "a,on,2,", "a,off,3,4"]
    write_table(table, [{"shape": "b", "compile": "off", "ms": 1}])
    assert table.read_text().splitlines() == ["shape,compile,ms", "b,off,1"]


@pytest.mark.slow
def test_rounds_of_one_and_two_ranks_in_turns(tmp_path):
    words = ["--shape", "tiny", "--rounds", "3", "--window", "4", "--windows", "1", "--compile", "off"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--contenders", "one", "two", "apart", "--output", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "ranks.csv").open() as file:
        one, two, apart = csv.DictReader(file)
    assert [row["contender"] for row in (one, two, apart)] == ["one", "two", "apart"]
    assert float(one["over_one"]) == 1.0
    for row in (two, apart):
        assert row["rounds"] == "3"
        assert float(row["quarter"]) <= float(row["over_one"]) <= float(row["three_quarters"])
        # The middle ratio of three lies between the extremes of speeds.
        low, high = (float(row[a]) / float(one[b]) for a, b in (("min", "max"), ("max", "min")))
        assert low - 0.01 <= float(row["over_one"]) <= high + 0.01


def test_a_turn_counts_the_lines_after_the_first_and_leaves_the_job_stopped(tmp_path):
    """A job that writes a line each 0.05 s of its own running."""
    script = """
import json, pathlib, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
run.mkdir()
for step in range(10**6):
    time.sleep(0.05)
    with (run / "metrics.jsonl").open("a") as log:
        print(json.dumps({"kind": "train", "samples_per_second": 100.0 + step, "seconds": {"total": 1.0}}), file=log)
"""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "c2al.py").write_text(script)
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import os, pathlib, time
from two_ranks import training, turn
os.environ["PYTHONPATH"] = {str(tmp_path / "jobs")!r}
run = pathlib.Path({str(tmp_path / "run")!r})
with training(pathlib.Path("c.toml"), 1, run) as job:
    first = turn([job], 2)
    time.sleep(0.3)
    assert len(job.windows()) <= 1, "it went on"
    print(first, turn([job], 2))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    first, second = map(float, done.stdout.split())
    assert 101.5 <= first <= 103, "lines 1 and 2, or a line more on a busy machine"
    assert second > first + 2, "the line that it was stopped in is not counted"
