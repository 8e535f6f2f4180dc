"""The folder of an experiment: what it records of itself, and its trainings.

config.toml command.txt versions.json     how to do it again
inputs.json                               content identity of the three splits
trainings/                                see c2al.experiment.plan
cohorts/                                  discovery on the first seed's baseline
experiment.json                           arms, trials, what was selected, findings
evaluation/  report.html                  written by whichever process ends last
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from pathlib import Path

from c2al.config import Config, load_config, redacted_config, save_config
from c2al.data.identity import FileIdentity, differences, identify
from c2al.data.source import open_dataset
from c2al.errors import ConfigError, LockedError
from c2al.files import only_writer, write_atomically
from c2al.state import read_state, write_state
from c2al.text import redacted

SPLITS = ("train", "validation", "test")
PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "triton", "numpy", "numba", "pyarrow", "scipy", "c2al")
FREE = ("axes", "arms", "discover", "evaluate", "experiment")
"""Sections that may change between two commands on one folder: no finished training depends on them alone."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Content identity of the impressions of every split."""

    train: tuple[FileIdentity, ...]
    validation: tuple[FileIdentity, ...]
    test: tuple[FileIdentity, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """What one training came to."""

    validation_ne: float | None
    """At the last step; None where it is undefined."""
    steps: int
    seconds: float
    """Of training, without what an interrupted command had done before."""


def start(config: Config, output: Path, command: str) -> None:
    """Records in a new folder how to do it again; an experiment that is there must be the same one.

    Raises ConfigError when the folder holds an experiment that this one cannot go on with: other
    training settings, or other impressions under the same paths. Raises ConfigError or StateError naming the file
    that is missing or damaged beside finished trainings, since nothing else says what they were trained on.
    """
    known = output / "config.toml"
    now = Inputs(**{split: identify(open_dataset(getattr(config.data, split))) for split in SPLITS})
    if known.exists() or (output / "trainings").exists():
        _refuse_other_settings(load_config(known), redacted_config(config), output)
        _refuse_other_inputs(read_state(output / "inputs.json", Inputs, format="c2al.inputs", version=1), now, output)
    else:
        describe_itself(config, output, command)
    write_state(output / "inputs.json", now, format="c2al.inputs", version=1)


def describe_itself(config: Config, output: Path, command: str) -> None:
    """Writes what a report says of the experiment itself: its configuration, command and versions."""
    save_config(config, output / "config.toml")
    write_atomically(output / "command.txt", redacted(command) + "\n")
    versions = {"python": platform.python_version(), "machine": f"{platform.machine()} {platform.system()}"}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    write_atomically(output / "versions.json", json.dumps(versions, indent=2) + "\n")


def _refuse_other_settings(before: Config, now: Config, output: Path) -> None:
    changed = [
        f.name
        for f in dataclasses.fields(Config)
        if f.name not in FREE and getattr(before, f.name) != getattr(now, f.name)
    ]
    if changed:
        raise ConfigError(
            f"{output}: holds an experiment of another config (section {', '.join(changed)} differs from "
            f"{output / 'config.toml'}); give another --output"
        )


def _refuse_other_inputs(before: Inputs, now: Inputs, output: Path) -> None:
    changed = [
        f"data.{split}: {line}" for split in SPLITS for line in differences(getattr(before, split), getattr(now, split))
    ]
    if changed:
        raise ConfigError([f"{output}: holds an experiment on other impressions; give another --output", *changed])


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Whether this process may work in `folder`: False while another process does."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(only_writer(folder))
        except LockedError:
            yield False
            return
        yield True


def read_result(folder: Path) -> Result | None:
    """The result of a training, None before it is done."""
    path = folder / "result.json"
    return read_state(path, Result, format="c2al.training_result", version=1) if path.exists() else None


def write_result(folder: Path, result: Result) -> None:
    write_state(folder / "result.json", result, format="c2al.training_result", version=1)
