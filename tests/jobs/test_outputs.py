"""An output that cannot be made: every job ends with exit code 2 and a message that names it, and leaves nothing."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from c2al.__main__ import JOBS, main
from c2al.config import replace, save_config
from impressions import splits, write_cohorts


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, list[str]]:
    """Job -> its words but for --output; a run and its scores are there."""
    folder = tmp_path_factory.mktemp("inputs")
    config = replace(splits(folder / "data", rows=1024), **{"train.max_steps": 2, "discover.threads": 1})
    save_config(config, folder / "c.toml")
    c = ["--config", str(folder / "c.toml")]
    run, scores, test = str(folder / "run"), str(folder / "scores"), config.data.test[0]
    assert main(["train", *c, "--output", run]) == 0
    assert main(["score", "--run", run, "--data", test, "--output", scores]) == 0
    artifact = str(folder / "artifact")
    assert main(["export", "--run", run, "--data", test, "--output", artifact, "--variants", "float"]) == 0
    ratings = folder / "ml-1m"
    ratings.mkdir()
    lines = {
        "ratings.dat": [
            f"{u}::{i}::{1 + (u + i) % 5}::{978300000 + 1000 * (u * 20 + i)}"
            for u in range(1, 21)
            for i in range(1, 21)
        ],
        "users.dat": [f"{u}::F::1::10::48067" for u in range(1, 21)],
        "movies.dat": [f"{i}::Film {i} (1995)::Drama" for i in range(1, 21)],
    }
    for name, rows in lines.items():
        (ratings / name).write_text("\n".join(rows) + "\n", encoding="latin-1")
    return {
        "train": ["train", *c],
        "score": ["score", "--run", run, "--data", test],
        "discover": ["discover", *c, "--scores", scores],
        "evaluate": ["evaluate", *c, "--scores", scores, "--cohorts", str(write_cohorts(folder / "cohorts.json"))],
        "describe": ["describe", *c],
        "export": ["export", "--run", run, "--data", test],
        "predict": ["predict", "--artifact", artifact, "--data", test],
        "serve-check": ["serve-check", "--artifact", artifact, "--data", test, "--rounds", "1"],
        "experiment": ["experiment", *c],
        "demo": ["demo"],
        "synth": ["synth", "--rows", "200"],
        "ingest": ["ingest", "movielens1m", "--input", str(ratings)],
    }


@pytest.fixture(params=["is a file", "in a file", "in a file of the system"])
def output(request, tmp_path) -> Path:
    (tmp_path / "it's a file").write_text("precious", encoding="utf-8")
    return {
        "is a file": tmp_path / "it's a file",
        "in a file": tmp_path / "it's a file" / "output",
        "in a file of the system": Path("/proc/it's c2al"),
    }[request.param]


@pytest.mark.parametrize("job", JOBS)
def test_an_output_that_cannot_be_made_is_refused_by_name(job, inputs, output, tmp_path, capsys):
    assert main([*inputs[job], "--output", str(output)]) == 2
    assert str(output) in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["it's a file"]
    assert (tmp_path / "it's a file").read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("job", JOBS)
def test_a_disk_that_is_full_is_said_and_nothing_is_left_half_written(job, inputs, tmp_path):
    """A bound on the size of files stands for the disk: writing beyond it fails as on a full one."""
    output = tmp_path / "result-1"
    command = [sys.executable, "-m", "c2al", *inputs[job], "--output", str(output)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_DISABLE_JIT": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512)),
    )
    assert done.returncode == 2, done.stderr
    assert output.name in done.stderr
    assert "Traceback" not in done.stderr
    finished = {"synth", "ingest", "score", "export", "predict", "serve-check"}
    assert job not in finished or not any(tmp_path.iterdir())
