"""Examples run as they are shown."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent


def test_the_library_example_trains_and_scores(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "library.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("after one step: [0.")
    assert last.endswith(f"rows scored into {tmp_path / 'scores'}")
    table = pq.read_table(tmp_path / "scores")
    assert table.num_rows > 1000
    assert set(table.column_names) >= {"row_id", "user_id", "label", "prediction"}


def test_the_library_example_without_a_folder_says_what_it_needs():
    command = [sys.executable, str(ROOT / "examples" / "library.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "usage: python examples/library.py FOLDER\n")
