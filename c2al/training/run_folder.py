"""The folder of one training run: what train writes and score and export read.

config.toml        resolved config
statistics.json    training statistics and vocabularies
cohorts.json       head and tail, in a C2AL run
checkpoints/       see c2al.distributed.checkpoint
metrics.jsonl      one record a line: {"step": ..., "kind": "train" | "validation" | "y", ...}
tensorboard/       the same numbers
plan.json, plan.txt   the sharding plan
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from c2al.config import Config, load_config, save_config
from c2al.data.cohorts import CohortSpec, read_cohorts
from c2al.data.schema import check_columns
from c2al.data.source import open_dataset
from c2al.data.statistics import Statistics, fit_statistics
from c2al.distributed.process import World
from c2al.errors import CohortError, ConfigError
from c2al.files import write_atomically

# What may differ between the run that wrote a checkpoint and the one that goes on from it:
# nothing that changes the sequence of weights.
_FREE = ("dist.", "train.checkpoint.", "train.log_every", "train.eval_every", "train.y_every", "train.profile_steps")
_FREE_DATA = ("data.workers", "data.prefetch", "data.validation", "data.test")
_OTHER_JOBS = ("discover.", "evaluate.", "experiment.", "axes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder and what it was trained with."""

    path: Path
    config: Config
    statistics: Statistics
    cohorts: tuple[CohortSpec, CohortSpec] | None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def start_run(path: Path, config: Config, cohorts: Path | None, world: World) -> Run:
    """Makes the folder of a new run, or opens the one of an interrupted run of the same config.

    Rank 0 alone touches the disk. Raises ConfigError on every rank when the folder holds a run
    that this one cannot go on from, and what reading the training data raises.
    """
    return world.once(lambda: _start(path, config, cohorts))


def open_run(path: Path) -> Run:
    """Reads the folder of a run. Raises ConfigError when it is none."""
    for name in ("config.toml", "statistics.json"):
        if not (path / name).exists():
            raise ConfigError(f"{path}: not the folder of a training run (it has no {name})")
    config = load_config(path / "config.toml")
    return Run(
        path=path,
        config=config,
        statistics=Statistics.from_json((path / "statistics.json").read_bytes(), str(path / "statistics.json")),
        cohorts=read_cohorts(path / "cohorts.json").chosen() if config.train.auxiliary else None,
    )


def _start(path: Path, config: Config, cohorts: Path | None) -> Run:
    if not config.data.train:
        raise ConfigError("data.train: names no files to train on")
    if config.train.auxiliary and cohorts is None:
        raise ConfigError(
            "train.lambda_head, train.lambda_tail: auxiliary losses need the cohorts; give --cohorts cohorts.json"
        )
    if not config.train.auxiliary and cohorts is not None:
        raise ConfigError(f"{cohorts}: cohorts without effect, since train.lambda_head and train.lambda_tail are 0")
    if (path / "config.toml").exists():
        _refuse_another_run(path, config, cohorts)
    elif cohorts is not None:
        _refuse_empty_cohorts(cohorts, config)
    statistics = path / "statistics.json"
    text = (
        statistics.read_text(encoding="utf-8")
        if statistics.exists()
        else fit_statistics(config.data.train, config.data).to_json()
    )
    write_atomically(statistics, text)
    if cohorts is not None and cohorts.resolve() != (path / "cohorts.json").resolve():
        write_atomically(path / "cohorts.json", cohorts.read_text())
    save_config(config, path / "config.toml")
    return open_run(path)


def _refuse_another_run(path: Path, config: Config, cohorts: Path | None) -> None:
    old, new = (dict(_flat(dataclasses.asdict(c))) for c in (load_config(path / "config.toml"), config))
    free = _FREE + _FREE_DATA + _OTHER_JOBS
    changed = [
        f"{path}: holds a run with {key} = {old.get(key)!r}, not {new.get(key)!r}; give another --output"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(free)
    ]
    if cohorts is not None and (path / "cohorts.json").exists():
        before, now = (read_cohorts(p).chosen() for p in (path / "cohorts.json", cohorts))
        if before != now:
            changed.append(f"{path}: holds a run with other cohorts than {cohorts}; give another --output")
    if changed:
        raise ConfigError(changed)


def _refuse_empty_cohorts(path: Path, config: Config) -> None:
    """An auxiliary head whose label is never 1 would learn nothing but its bias. Reads the training
    split only until both cohorts have shown a positive."""
    missing = dict(zip(("head", "tail"), read_cohorts(path).chosen(), strict=True))
    columns = {column for cohort in missing.values() for column in cohort.columns} | {config.data.label}
    files = open_dataset(config.data.train)
    check_columns(files, config.data, tuple(columns - {config.data.label}))
    rows = dict.fromkeys(missing, 0)
    for file in files:
        for group in range(len(file.row_group_rows)):
            table = file.read(group, sorted(columns))
            positive_R = np.asarray(table[config.data.label]) == 1
            for name, cohort in list(missing.items()):
                member_R = cohort.membership(table)
                rows[name] += int(member_R.sum())
                if (member_R & positive_R).any():
                    del missing[name]
            if not missing:
                return
    raise CohortError(
        "\n".join(
            f"{path}: the {name} cohort {cohort.axis} = {cohort.name} has "
            + (f"{rows[name]} rows but no positives" if rows[name] else "no rows")
            + f" in data.train ({', '.join(config.data.train)})"
            for name, cohort in missing.items()
        )
    )


def _flat(tree: Any, path: str = "") -> Any:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


class MetricsLog:
    """metrics.jsonl and TensorBoard, written by rank 0.

    A resumed run drops the records after its checkpoint, so that each step stands there once.
    """

    def __init__(self, path: Path, step: int):
        self._file = path / "metrics.jsonl"
        kept = []
        if self._file.exists():
            lines = self._file.read_text().splitlines(keepends=True)
            # A killed run can leave half a last line.
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomically(self._file, "".join(kept))
        if step == 0:
            shutil.rmtree(path / "tensorboard", ignore_errors=True)
        self._board = SummaryWriter(str(path / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Appends a record; numbers also go to TensorBoard as kind/name."""
        with self._file.open("a") as f:
            f.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for name, value in _flat(values):
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._board.close()
