"""SIGKILL against the job as users launch it: `torchx run` on two ranks (scripts/fault_drill.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fault_drill.py"


def drill(folder: Path, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(folder), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    logs = "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in folder.glob("*.log")) if done.returncode else ""
    assert done.returncode == 0, done.stdout + logs
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_while_a_checkpoint_is_written_does_not_matter(tmp_path, monkeypatch):
    """Seed 1 kills while writing; the run restarts by itself and ends with the undisturbed run's weights."""
    # A process that has been a rank leaves this behind; the drill still knows the workers from their launchers.
    monkeypatch.setenv("LOCAL_RANK", "0")
    out = drill(tmp_path / "drill", "--kills", "1", "--checkpoint-every", "20", "--seed", "1")
    assert "kill 1: while writing a checkpoint" in out
    assert out.endswith("steps: final weights equal bit for bit\n")


@pytest.mark.slow
def test_twenty_kills_do_not_matter(tmp_path):
    out = drill(tmp_path / "drill", "--kills", "20")
    assert "while writing a checkpoint" in out
    assert "s after the start" in out
    assert "\n20 kills, " in out
    assert out.endswith(" steps: final weights equal bit for bit\n")
