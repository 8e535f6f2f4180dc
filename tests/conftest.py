"""Being here puts tests/ on the import path, so a test can `from ranks import run_ranks`."""

import os
from pathlib import Path

# Ranks of one machine share its cores; set before torch is imported, here and in every child process.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

LONGEST = (
    "jobs/test_experiment_job.py",
    "ops/test_triton_compile.py",
    "training/test_methods.py",
    "distributed/test_fault_drill.py",
    "ops/test_triton_interpreter.py",
    "launch/test_run.py",
    "jobs/test_train_job.py",
    "jobs/test_train_ranks.py",
    "distributed/test_parity.py",
    "distributed/test_checkpoint_matrix.py",
    "benchmarks/test_gpu_check.py",
)
"""Files that take longest. With one file per worker, a long one that comes last leaves the other workers idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
