"""Runs the Triton kernels in the interpreter, in a process that has it switched on from the start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    cases = Path(__file__).with_name("triton_interpreter_cases.py")
    command = [sys.executable, "-m", "pytest", "-x", "--durations=3", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
