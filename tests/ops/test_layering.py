"""The kernel layers run where only torch is installed."""

import subprocess
import sys

SCRIPT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torchrec", "fbgemm_gpu", "pyarrow", "pandas", "numba", "scipy"}:
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, Refuse())
import c2al.ops.fm_attention, c2al.nn.dhen, c2al.nn.prediction_heads, c2al.nn.dense, c2al.nn.objective
"""


def run(*command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ops_nn_and_objective_import_with_torch_alone():
    run("-c", SCRIPT)


def test_collecting_these_tests_imports_no_torchrec(pytestconfig):
    check = """
import sys, pytest
code = pytest.main(["--collect-only", "-q", "-m", "gpu or not gpu", "tests/ops", "tests/nn"])
loaded = {m.split(".")[0] for m in sys.modules} & {"torchrec", "fbgemm_gpu", "pyarrow"}
sys.exit(code or f"imported {loaded}" if code or loaded else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
