"""What users install: a wheel in an environment of its own, and a package they cannot write into."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def without_privileges() -> list[str]:
    """Root may write where the permissions say no, unless it gives that capability up."""
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.getuid() == 0 else []


@pytest.mark.parametrize("home", ["read-only", "writable", "read-only, as is NUMBA_CACHE_DIR"])
def test_kernels_compile_where_the_package_is_read_only(tmp_path, home):
    site = tmp_path / "site"
    shutil.copytree(ROOT / "c2al", site / "c2al", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "home").mkdir()
    for folder, _, _ in os.walk(site):
        os.chmod(folder, 0o555)
    if home != "writable":
        (tmp_path / "home").chmod(0o555)
    code = (
        "import os, pyarrow, c2al.discovery.histogram, c2al.discovery.digits, c2al.distributed.table_update\n"
        "from c2al.discovery.users import user_groups\n"
        "assert len(user_groups(pyarrow.array([1, 2]), 'user')) == 2\n"
        "assert not os.access(os.path.dirname(c2al.__file__), os.W_OK)\n"
        "print(c2al.__file__, os.environ.get('NUMBA_CACHE_DIR', ''))\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    env |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(site), "TMPDIR": str(tmp_path)}
    if "NUMBA_CACHE_DIR" in home:
        env["NUMBA_CACHE_DIR"] = str(tmp_path / "home" / "numba")
    done = subprocess.run(
        [*without_privileges(), sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    where, _, cache = done.stdout.strip().partition(" ")
    assert where.startswith(str(site))
    assert bool(cache) == (home != "writable")
    assert not cache or not Path(cache).exists(), "the folder of the process is deleted with it"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that setuptools leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("c2al", "launch", "requirements", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, str(folder / "source")], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def pins(name: str) -> set[str]:
    """What requirements/`name`.txt asks for, with versions."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    found = {line for line in lines if line and not line.startswith("#")}
    assert all("==" in line for line in found), found
    return found


def test_the_wheel_holds_the_package_its_data_and_its_dependencies(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [n for n in names if n.endswith("METADATA")]
        wanted = [
            line.removeprefix("Requires-Dist: ")
            for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist: ")
        ]
    assert {n.split("/")[0] for n in names} == {"c2al", metadata.split("/")[0]}
    source = {p.relative_to(ROOT).as_posix() for s in ("*.py", "*.toml", "py.typed") for p in ROOT.glob(f"c2al/**/{s}")}
    assert source == {n for n in names if n.startswith("c2al/")}
    assert len([n for n in names if n.endswith(".toml")]) >= 4
    assert pins("base") == {w for w in wanted if "extra" not in w}
    for extra, file in (("cuda", "torchrec-cuda"), ("methods", "methods"), ("benchmark", "benchmark")):
        assert {w.partition(";")[0].strip() for w in wanted if f'extra == "{extra}"' in w} == pins(file), extra


def test_the_wheel_runs_in_an_environment_of_its_own(wheel, tmp_path):
    """Its dependencies are borrowed from this environment; test_docker.py installs them."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    borrowed = [p for p in sys.path if p.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    code = "import sys, c2al.__main__ as m; print(m.__file__); sys.exit(m.main(sys.argv[1:]))"
    words = ["synth", "--rows", "200", "--output", "data"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", code, *words],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    done = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-m", "c2al", "train", "--help"],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "train.optimizer.dense_lr" in done.stdout
