"""What a training run reads: checked before its first step, and compared when it is resumed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from c2al.config import Config
from c2al.data.cohorts import CohortSpec
from c2al.data.identity import FileIdentity, differences
from c2al.data.schema import check_columns
from c2al.data.source import File, open_dataset
from c2al.errors import DataError
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
