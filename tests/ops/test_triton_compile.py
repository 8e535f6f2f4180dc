"""Every shipped kernel configuration compiles for sm_90 within shared memory; none that was not timed spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from c2al.ops.triton.configurations import SHARED_MEMORY, configurations

BENCHMARKED = {  # p, q, k of benchmarks/fm_attention.py, which must not fall back on a GPU
    (64, 16, 8),
    (64, 48, 16),
    (128, 128, 32),
    (128, 512, 64),
    (256, 256, 64),
    (512, 128, 32),
}


def compile_all(*arguments, timeout):
    pytest.importorskip("triton")
    script = Path(__file__).with_name("triton_compile_cases.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


SPILLED = 40
"""Bytes per thread that a configuration may spill that was the fastest of its grid on a card all the same."""


def assert_no_spill(results):
    bad = [r for r in results if r["stack"] > (SPILLED if r["timed"] else 0) or r["shared"] > SHARED_MEMORY]
    assert not bad, "\n".join(map(str, bad))


def test_shipped_configurations():
    """What was timed and every third of the rest, in one of the four variants that can be its costliest, in turn."""
    results = compile_all(timeout=600)
    assert sum(r["timed"] for r in results) > 20
    assert len(results) > 70
    assert_no_spill(results)


@pytest.mark.slow
def test_every_shipped_configuration_in_its_costliest_variants():
    results = compile_all("--costliest", timeout=1200)
    assert len(results) > 400
    assert_no_spill(results)


@pytest.mark.slow
def test_every_variant_of_every_shipped_configuration():
    assert_no_spill(compile_all("--variants", timeout=3600))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("p", "q", "k"), sorted(BENCHMARKED))
def test_benchmarked_shapes_are_covered_in_half_precision(p, q, k, direction):
    assert configurations(direction, p, q, k, "half")


def test_shapes_beyond_the_kernels_get_none():
    assert configurations("forward", 64, 64, 129, "half") == []
    assert configurations("forward", 1024, 1024, 16, "half") == []
