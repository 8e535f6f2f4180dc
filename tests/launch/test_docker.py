"""No Docker engine runs in the tests, so each Dockerfile's own steps are followed in a folder instead:
what COPY brings is all there is, and the RUN line that installs must be the script the Makefile runs."""

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ["cpu", "cuda"]


def instructions(device: str) -> list[tuple[str, str]]:
    lines = (ROOT / "docker" / f"Dockerfile.{device}").read_text().splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("device", IMAGES)
def test_image_is_pinned_and_not_root(device):
    steps = instructions(device)
    bases = [argument.split(" ")[0] for word, argument in steps if word == "FROM"]
    assert bases
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base) for base in bases)
    # Set after the last FROM, or it would not be the final stage's.
    assert ("USER", "c2al") in steps[[w for w, _ in steps].index("FROM", 1) :]


@pytest.mark.parametrize("device", IMAGES)
def test_it_installs_as_the_makefile_does(device):
    (install,) = [argument for word, argument in instructions(device) if word == "RUN" and "install.sh" in argument]
    assert install == f"scripts/install.sh /opt/venv/bin/python {device} base"
    assert "scripts/install.sh $(abspath $(BIN)/python)" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("device", IMAGES)
def test_what_it_copies_is_all_the_install_needs(device, tmp_path):
    """Follows the first stage's COPY steps into an empty folder under .dockerignore, and runs the install there
    with a pip that only builds and lists, since the packages are here already."""
    allowed = [p[1:] for p in (ROOT / ".dockerignore").read_text().split() if p.startswith("!")]
    for word, argument in instructions(device):
        if word != "COPY" or argument.startswith("--from"):
            continue
        *sources, target = argument.split(" ")
        for source in sources:
            assert any(fnmatch.fnmatch(source, a) or a.startswith(f"{source}/") for a in allowed), (
                f"{source} is ignored"
            )
            to = tmp_path / target / Path(source).name if target.endswith("/") else tmp_path / target
            to.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, to)
    wheel = tmp_path / "wheel"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(wheel),
            str(tmp_path),
        ],
        check=True,
        capture_output=True,
    )
    (built,) = wheel.iterdir()
    assert built.name.startswith("c2al-")
    listed = subprocess.run(
        ["sh", "-eu", "-c", f"cd {tmp_path} && sed -n 's/.*-r //p' scripts/install.sh"], capture_output=True, text=True
    )
    for requirement in listed.stdout.split():
        path = requirement.strip('"').replace("$requirements", "base").replace("$device", device)
        assert (tmp_path / path).exists(), path


@pytest.mark.slow
def test_the_cpu_install_works_in_a_new_environment(tmp_path):
    """The RUN line itself, in a venv of its own."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    for source in ("requirements", "scripts", "c2al", "launch"):
        shutil.copytree(ROOT / source, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
    for source in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / source, tmp_path)
    subprocess.run([str(tmp_path / "scripts" / "install.sh"), python, "cpu", "base"], check=True)
    done = subprocess.run([python, "-m", "c2al", "--help"], capture_output=True, text=True, cwd=tmp_path / "venv")
    assert done.returncode == 0
    assert "experiment" in done.stdout
