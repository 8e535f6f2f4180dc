"""benchmarks/scaling.py: every point finds what it reads, and what does not stay flat is said."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package

import scaling

SIZES = Namespace(rows=[1000, 2000, 4000], discover_rows=[8000], tables=[8, 64], ranks=[1, 2], segments=[10, 100])


def test_every_point_reads_outputs_of_earlier_ones(tmp_path):
    made: set[str] = set()
    for point in scaling.points(SIZES):
        work = scaling.Work(tmp_path, point, 4000)
        read = [w.removesuffix("/cohorts.json") for w in work.command() if w.startswith(f"{tmp_path}/rows-")]
        read = [w for w in read if not w.endswith(".toml") and "/data/" not in w and w != str(work.output)]
        if point.rows == 8000:
            assert read == [f"{tmp_path}/rows-8000/linked"]
        else:
            assert set(read) <= made, point
            assert bool(read) == (point.stage != "train")
        made.add(str(work.output))
    assert len(made) == 12 + 2 + 3 + 2 + 1


def test_a_command_is_measured_with_its_children():
    child = "bytearray(range(1, 2)) * (600 << 20)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{child}'])"
    assert 600 < scaling.measure([sys.executable, "-c", code])["peak_mib"] < 900
    with pytest.raises(SystemExit, match="ended with 3:\nno luck"):
        scaling.measure([sys.executable, "-c", "import sys; print('no luck'); sys.exit(3)"])


def test_growth_is_said_and_a_budget_too(capsys):
    peaks = {"train": (100.0, 105.0), "score": (100.0, 150.0), "discover": (100.0, 101.0), "evaluate": (100.0, 900.0)}
    runs = {
        scaling.Point(stage, rows): [{"wall_s": 1.0, "cpu_s": cpu, "peak_mib": peak}]
        for stage, pair in peaks.items()
        for rows, cpu, peak in zip((10**6, 10**7), (1.0, 10.0), pair, strict=True)
    }
    scaling.report(runs)
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "->" in line}
    assert "peak x 1.05: flat; 1.00 us per row" in said["train"]
    assert "peak x 1.50: not flat, 5.6 MiB per million rows; " in said["score"]
    assert "not flat, 88.9 MiB per million rows, within its 1,024 MiB for rows; " in said["evaluate"]
