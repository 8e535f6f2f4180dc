"""The layers of docs/architecture.md, and how long a file may be.

Imports go downward only. The lower layers import where only torch is installed.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "c2al": 1,
    "c2al._caches": 0,
    "c2al.errors": 0,
    "c2al.text": 0,
    "c2al.typed": 0,
    "c2al.files": 1,
    "c2al.state": 2,
    "c2al.config": 3,
    "c2al.configs": 0,
    "c2al.bins": 4,
    "c2al.compiled": 4,
    "c2al.ne": 4,
    "c2al.ops": 4,
    "c2al.nn": 5,
    "c2al.data": 6,
    "c2al.distributed": 6,
    "c2al.discovery": 7,
    "c2al.training": 7,
    "c2al.model": 8,
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


def imported_by(node: ast.AST) -> set[str]:
    """Modules that an import statement names; none for another node."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    assert node.level == 0, f"relative import of {node.module}"
    names = {f"{node.module}.{alias.name}" for alias in node.names}
    return names if node.module == "c2al" else {str(node.module)}


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set().union(*(imported_by(node) for node in ast.walk(tree)))
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


HEAVY = ["torchrec", "fbgemm_gpu", "pyarrow", "scipy", "pandas", "matplotlib", "torchmetrics", "torchx"]
TORCH_ONLY = [m for m, _ in modules() if LAYERS[part(m)] <= TORCH_ONLY_LAYER]
ENTRIES = ["c2al.ops.fm_attention", *(m for m in TORCH_ONLY if part(m) != "c2al.ops")]
"""Of the ops, the public one; it loads a kernel only when one is chosen."""


@pytest.mark.parametrize(
    ("blocked", "wanted"),
    [([*HEAVY, "numba", "triton"], ENTRIES), (HEAVY, TORCH_ONLY)],
    ids=["torch alone", "torch and the kernels' compilers"],
)
def test_lower_layers_import_with(blocked, wanted):
    code = (
        "import sys, importlib\n"
        f"for name in {blocked}: sys.modules[name] = None\n"  # as if not installed
        f"for module in {wanted}: importlib.import_module(module)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_collecting_the_tests_of_the_lower_layers_imports_no_torchrec(pytestconfig):
    """They run on a GPU machine that has torch only."""
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


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_ground_imports_the_standard_library_only(layer):
    for name, path in modules():
        if LAYERS[part(name)] == layer:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                roots = {imported.split(".")[0] for imported in imported_by(node)}
                assert roots <= sys.stdlib_module_names | {"c2al"}, (name, roots)


MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60


def test_no_file_and_no_function_is_too_long_to_read():
    long = []
    for _, path in modules():
        text = path.read_text(encoding="utf-8")
        where = str(path.relative_to(ROOT))
        if (lines := text.count("\n")) > MOST_LINES:
            long.append(f"{where}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{where}: {node.name} has {lines} lines")
    assert not long, "\n".join(long)


def test_no_function_imports_pyarrow():
    """Such an import hides that a module belongs to a layer that has pyarrow."""
    hidden = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for _, path in modules()
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if "pyarrow" in {name.split(".")[0] for name in imported_by(node)}
    ]
    assert not hidden


def test_text_is_read_and_written_as_utf8_whatever_the_locale():
    wrong = []
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and follows_the_locale(node):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "without encoding='utf-8':\n" + "\n".join(wrong)


def follows_the_locale(node: ast.Call) -> bool:
    """Whether this reads or writes text without naming an encoding."""
    owner = getattr(node.func, "value", None)
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if "encoding" in {k.arg for k in node.keywords} or getattr(owner, "id", "") == "os":
        return False
    if name == "open":
        words = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
        return not any(re.fullmatch("[rwax]b[+]?", str(word)) for word in words)
    return (name, len(node.args)) in {("read_text", 0), ("write_text", 1)}
