"""DESIGN.md's layers: imports go downward only, and L0-L2 import where only torch is installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "c2al": 0,
    "c2al.errors": 0,
    "c2al.text": 0,
    "c2al.typed": 0,
    "c2al.files": 1,
    "c2al.state": 2,
    "c2al.config": 3,
    "c2al.configs": 0,
    "c2al.bins": 4,
    "c2al.ne": 4,
    "c2al.ops": 4,
    "c2al.nn": 5,
    "c2al.data": 6,
    "c2al.distributed": 6,
    "c2al.discovery": 7,
    "c2al.training": 7,
    "c2al.evaluation": 7,
    "c2al.serving": 8,
    "c2al.report": 8,
    "c2al.experiment": 9,
    "c2al.jobs": 10,
    "c2al.__main__": 11,
}
"""Packages of one number never import each other."""
TORCH_ONLY_LAYER = 5


def part(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "c2al" else {node.module}
    return {name for name in found if name.split(".")[0] == "c2al"}


def modules() -> list[tuple[str, Path]]:
    files = sorted((ROOT / "c2al").rglob("*.py"))
    return [(".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), f) for f in files]


def test_every_module_has_a_layer_and_imports_downward_only():
    assert len(modules()) > 10
    wrong = []
    for name, path in modules():
        assert part(name) in LAYERS, f"{name} belongs to no layer"
        for imported in imports(path):
            if part(imported) == part(name) or imported == "c2al":
                continue
            if LAYERS[part(imported)] >= LAYERS[part(name)]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


TORCH_ONLY = [m for m, _ in modules() if LAYERS[part(m)] <= TORCH_ONLY_LAYER]


def test_lower_layers_import_with_torch_alone():
    blocked = ["torchrec", "fbgemm_gpu", "pyarrow", "numba", "scipy", "pandas", "matplotlib", "torchmetrics", "torchx"]
    without = [m for m in TORCH_ONLY if not m.startswith("c2al.ops.triton.") and m != "c2al.ops._avx512_kernels"]
    code = (
        "import sys, importlib\n"
        f"for name in {blocked}: sys.modules[name] = None\n"  # as if not installed
        f"for module in {without}: importlib.import_module(module)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_ground_imports_the_standard_library_only(layer):
    for name, path in modules():
        if LAYERS[part(name)] == layer:
            for node in ast.walk(ast.parse(path.read_text())):
                roots = (
                    [a.name for a in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                assert all(r.split(".")[0] in sys.stdlib_module_names | {"c2al"} for r in roots), (name, roots)
