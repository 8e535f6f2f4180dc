"""What a training run reads: checked before its first step, and compared when it is resumed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from c2al.config import Config
from c2al.data.cohorts import CohortSpec, read_cohorts
from c2al.data.identity import FileIdentity, differences
from c2al.data.schema import check_columns
from c2al.data.source import File, open_dataset
from c2al.distributed.process import World
from c2al.errors import CohortError, DataError
from c2al.state import read_state, write_state

FORMAT = "c2al.training_inputs"
VERSION = 1
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run began with, and therefore what it can go on with (inputs.json)."""

    train: tuple[FileIdentity, ...]
    """Files of the training split. The other splits may change between two starts of a run."""
    statistics_sha256: str
    """Of statistics.json, which was fitted to these files."""

    def write(self, path: Path) -> None:
        write_state(path, self, format=FORMAT, version=VERSION)

    @staticmethod
    def read(path: Path) -> "Inputs":
        """Raises StateError naming the file and what is wrong with it."""
        return read_state(path, Inputs, format=FORMAT, version=VERSION)

    def changes(self, train: Sequence[FileIdentity]) -> list[str]:
        """What differs in the training files now, one sentence per file."""
        return differences(self.train, train)


def check_inputs(config: Config, cohorts: Sequence[CohortSpec] = ()) -> None:
    """Checks all splits that the config names, by their footers alone.

    Every file must be there and be Parquet, and every column that any job will need must be in it with
    the right type: features, label, weight, row id, user id, time, the columns of the axes and, where
    the run trains or validates, those of the cohorts.

    Raises DataError naming the split, the file, the column and its type.
    """
    axes = [axis.column for axis in config.axes]
    always = [config.data.row_id, config.data.user_id, config.data.time, *axes]
    conditions = [column for spec in cohorts for column in spec.columns]
    everything: list[File] = []
    for split in SPLITS:
        if paths := getattr(config.data, split):
            carried = always if split == "test" else [*always, *conditions]
            try:
                files = open_dataset(paths)
                check_columns(files, config.data, tuple(dict.fromkeys(c for c in carried if c)))
            except DataError as e:
                raise DataError(f"data.{split}: {e}") from e
            everything += files
    check_columns(everything, config.data)  # one kind of every column in all splits


def refuse_empty_cohorts(path: Path, config: Config, world: World) -> None:
    """Raises CohortError for a cohort without positives in the training split: its prediction head would
    learn nothing but its bias.

    All ranks share the scan, which ends as soon as both cohorts have shown a positive.
    """
    cohorts = dict(zip(("head", "tail"), read_cohorts(path).chosen(), strict=True))
    files = world.together(lambda: open_dataset(config.data.train))
    groups = [(file, i) for file in files for i, rows in enumerate(file.row_group_rows) if rows]
    rows, positives = dict.fromkeys(cohorts, 0), dict.fromkeys(cohorts, 0)
    specs = list(cohorts.values())
    for start in range(0, len(groups), world.size):
        found = world.share(groups[start : start + world.size], lambda g: _members(*g, specs, config))
        for of_group in found:
            for name, (members, positive) in zip(cohorts, of_group, strict=True):
                rows[name] += members
                positives[name] += positive
        if all(positives.values()):
            return
    raise CohortError(
        "\n".join(
            f"{path}: the {name} cohort {cohort.axis} = {cohort.name} has "
            + (f"{rows[name]} rows but no positives" if rows[name] else "no rows")
            + f" in data.train ({', '.join(config.data.train)})"
            for name, cohort in cohorts.items()
            if not positives[name]
        )
    )


def _members(file: File, group: int, cohorts: Sequence[CohortSpec], config: Config) -> list[tuple[int, int]]:
    """(rows, positive rows) of each cohort in one row group."""
    columns = {column for cohort in cohorts for column in cohort.columns} | {config.data.label}
    table = file.read(group, sorted(columns))
    positive_R = np.asarray(table[config.data.label]) == 1
    members = [cohort.membership(table) for cohort in cohorts]
    return [(int(member_R.sum()), int((member_R & positive_R).sum())) for member_R in members]
