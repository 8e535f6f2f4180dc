"""Every command of docs/cluster.md is one that its program accepts."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
from torchx.runner import get_runner

from c2al.__main__ import JOBS
from c2al.config import load_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]


def of(program: str) -> list[list[str]]:
    found = [words[1:] for words in COMMANDS if words[0] == program]
    assert found, program
    return found


def accept(job: str, words: list[str]) -> None:
    """Parses what stands after a job's name; overrides must fit the configuration that the words name."""
    assert job in JOBS
    parser = argparse.ArgumentParser(allow_abbrev=False)
    importlib.import_module(f"c2al.jobs.{job.replace('-', '_')}").add_arguments(parser)
    known, overrides = parser.parse_known_args(words)
    if overrides:
        load_config(known.config, overrides)


@pytest.mark.parametrize("words", of("c2al"), ids=" ".join)
def test_a_job_takes_the_words(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    accept(words[0], words[1:])


@pytest.mark.parametrize("words", of("torchx"), ids=" ".join)
def test_torchx_would_submit_it(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("command", choices=["run"])
    parser.add_argument("--dryrun", action="store_true")
    parser.add_argument("-s", required=True)
    parser.add_argument("-cfg", required=True)
    parser.add_argument("--workspace")
    at = next(i for i, word in enumerate(words) if word.startswith("launch/components.py:"))
    known = parser.parse_args(words[:at])
    options = dict(pair.split("=", 1) for pair in known.cfg.split(","))
    with get_runner() as runner:
        request = str(runner.dryrun_component(words[at], words[at + 1 :], known.s, options).request)
    job_words = words[words.index("--") + 1 :]
    assert job_words[0] in request
    accept(words[at].partition(":")[2], job_words)


def test_the_rest_are_programs_of_this_repository():
    rest = [words for words in COMMANDS if words[0] not in ("c2al", "torchx", "export")]
    assert [words[:2] for words in rest] == [
        ["make", "setup-cuda"],
        ["docker", "build"],
        ["python", "scripts/fault_drill.py"],
    ]
    assert "setup-cuda:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in rest[1:]:
        assert all((ROOT / word).exists() for word in words if "/" in word and not word.startswith("runs/"))
