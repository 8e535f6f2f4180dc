"""Every component for real, with the words a user types, on this host."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from c2al.config import replace, save_config
from impressions import splits

ROOT = Path(__file__).parents[2]


def torchx(component: str, *words: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    bin = Path(sys.executable).parent
    command = [str(bin / "torchx"), "run", "-s", "local_cwd", f"launch/components.py:{component}", *flags, "--", *words]
    env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=600)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("impressions with a space")
    config = replace(splits(folder / "data", rows=1024), **{"train.max_steps": 2})
    save_config(config, folder / "c.toml")
    return folder / "c.toml"


def test_a_run_is_trained_on_two_workers_and_scored(config, tmp_path):
    words = ["--config", str(config), "--output", str(tmp_path / "run"), "--train.max_steps", "3"]
    done = torchx("train", *words, flags=("-j", "1x2"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    words = ["--run", str(tmp_path / "run"), "--data", str(config.parent / "data" / "test"), "--output"]
    done = torchx("score", *words, str(tmp_path / "scores"))
    assert done.returncode == 0, done.stderr
    assert "512 rows scored" in done.stderr + done.stdout
    assert list((tmp_path / "scores").glob("*.parquet"))


@pytest.mark.parametrize(
    "job", ["train", "score", "discover", "evaluate", "export", "predict", "serve_check", "experiment"]
)
def test_a_component_hands_every_argument_to_its_job(job, tmp_path):
    """Each word is one that torchrun could take for an abbreviation of its own; the job's own message comes back."""
    none = str(tmp_path / "none")
    words = {
        "score": ["--run", none, "--data", none],
        "export": ["--run", none, "--data", none],
        "predict": ["--artifact", none, "--data", none],
        "serve_check": ["--artifact", none, "--data", none],
        "discover": ["--config", none, "--scores", none],
        "evaluate": ["--config", none, "--scores", none],
    }.get(job, ["--config", none])
    done = torchx(
        job,
        *words,
        "--output",
        str(tmp_path / "o"),
        flags=("--max_restarts", "0") if job not in ("evaluate", "export", "predict", "serve_check") else (),
    )
    assert done.returncode != 0
    said = [
        line for line in (done.stderr + done.stdout).splitlines() if f"c2al {job.replace('_', '-')}: {none}" in line
    ]
    assert said, done.stderr
    assert "torchrun" not in " ".join(said)
