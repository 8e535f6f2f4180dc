"""A run that begins with the weights of another one, as when a model is trained day after day.

What the two have in common is taken over; the rest keeps its fresh initial weights and is named. A table
is taken over row by row: of a vocabulary by value, else by row number. The scaling of dense columns
is the earlier run's, since the network was trained on columns scaled like that, and a vocabulary keeps
the earlier run's values as far as its table has room.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from c2al.config import Config, SparseFeature
from c2al.data.statistics import Statistics, packed_rows
from c2al.errors import ConfigError
from c2al.state import read_state, write_state

FORMAT, VERSION = "c2al.start", 1
_MODEL_FREE = ("dropout", "auxiliary_hidden")
"""Fields of `model` that may differ: they leave the meaning of every other weight as it is."""

Ints = npt.NDArray[np.int64]
RowsOf = Callable[[int, int], Ints]
"""(first, end) of a table's rows -> the earlier table's row of each, or -1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """What a run is asked to begin with."""

    run: Path
    """Folder of the earlier run, which is only read."""
    optimizer: bool = False
    """Whether its optimizer state is taken over, too. The learning rates follow the new run's schedule in any case."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
    """What a run began with (start.json)."""

    run: str
    """Absolute path of the earlier run's folder."""
    checkpoint: str
    """Name of the checkpoint's folder."""
    manifest_sha256: str
    """Of the checkpoint's complete.json, which holds the checksums of all its files."""
    optimizer: bool

    @property
    def path(self) -> Path:
        """Folder of the checkpoint."""
        return Path(self.run) / "checkpoints" / self.checkpoint

    def write(self, path: Path) -> None:
        write_state(path, self, format=FORMAT, version=VERSION)

    @staticmethod
    def read(path: Path) -> "Started":
        """Raises StateError naming the file and what is wrong with it."""
        return read_state(path, Started, format=FORMAT, version=VERSION)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Earlier:
    """The earlier run, as far as the new one needs it."""

    config: Config
    statistics: Statistics
    cohorts: tuple[str, ...]
    """Names of its auxiliary cohorts."""


def refuse_another_model(earlier: Config, now: Config) -> None:
    """Raises ConfigError naming every field that gives the network's weights another meaning.

    Weights of one network can have the shapes of another's.
    """
    changed = []
    for field in dataclasses.fields(now.model):
        before, after = getattr(earlier.model, field.name), getattr(now.model, field.name)
        if field.name not in _MODEL_FREE and before != after:
            changed.append(f"model.{field.name} = {after!r}, but {before!r} in the run of --start-from")
    if not now.data.tables.keys() & earlier.data.tables.keys() and inputs_of(earlier) != inputs_of(now):
        changed.append("data.sparse: no table is one of the run of --start-from, so nothing could be taken over")
    if changed:
        raise ConfigError(changed)


def continued(earlier: Earlier, config: Config, fitted: Statistics) -> Statistics:
    """The statistics of a run that goes on from `earlier`; `fitted` are those of its own training split.

    A dense column keeps the earlier moments. A vocabulary holds the values of the new training split and,
    as far as its table has room, those of the earlier run, the smaller first. A row that was admitted stays
    admitted.
    """
    before = earlier.statistics
    dense = {f.column: f for f in earlier.config.data.dense}
    moments = {
        f.column: before.moments[f.column]
        for f in config.data.dense
        if f.column in fitted.moments and f.column in before.moments and dense.get(f.column) == f
    }
    vocabularies, admitted = dict(fitted.vocabularies), dict(fitted.admitted)
    for name, (feature, *_) in config.data.tables.items():
        if why_fresh(earlier, config, fitted, name):
            continue
        if name in vocabularies:
            new = vocabularies[name]
            old = sorted(set(before.vocabularies[name]) - set(new))
            kept = old[: feature.num_embeddings - 1 - len(new)]
            vocabularies[name] = tuple(sorted((*new, *kept)))
        elif name in admitted and (old_R := before.admitted_rows(name)) is not None:
            new_R = fitted.admitted_rows(name)
            assert new_R is not None
            both_R = new_R.copy()
            shared = min(len(old_R), len(new_R))
            both_R[:shared] |= old_R[:shared]
            admitted[name] = packed_rows(both_R)
    return dataclasses.replace(fitted, moments=fitted.moments | moments, vocabularies=vocabularies, admitted=admitted)


def inputs_of(config: Config) -> list[str]:
    """What the network above the tables takes in, in order."""
    return [*(f.column for f in config.data.dense), *(f.key for f in config.data.sparse)]


def why_fresh(earlier: Earlier, config: Config, statistics: Statistics, name: str) -> str:
    """Why nothing of the table can be taken over; empty: it can."""
    if name not in earlier.config.data.tables:
        return "the earlier run has none of that name"
    features = config.data.tables[name]
    before, now = earlier.config.data.tables[name][0], features[0]
    dims = [f.dim or c.model.embedding_dim for f, c in ((before, earlier.config), (now, config))]
    if before.encoding != now.encoding:
        return f"encoding '{before.encoding}' before, '{now.encoding}' now"
    if dims[0] != dims[1]:
        return f"{dims[0]} columns before, {dims[1]} now"
    if before.edges != now.edges:
        return "other edges, so its buckets are others"
    if now.encoding == "hash" and before.num_embeddings != now.num_embeddings:
        return f"ids were hashed to {before.num_embeddings} rows and are to {now.num_embeddings}"
    for feature in features:
        kinds = earlier.statistics.kinds.get(feature.column), statistics.kinds.get(feature.column)
        if None not in kinds and kinds[0] != kinds[1]:
            return f"column '{feature.column}' held {kinds[0]} before and holds {kinds[1]} now"
    return ""


def row_map(earlier: Earlier, config: Config, statistics: Statistics, name: str) -> tuple[RowsOf, str]:
    """Where each row of the table lay in the earlier run, and what there is to say of it."""
    before, now = earlier.config.data.tables[name][0], config.data.tables[name][0]
    if now.encoding == "vocabulary":
        old, new = earlier.statistics.vocabularies[name], statistics.vocabularies[name]
        return _by_value(old, new, name)
    shared = min(_numbered(before), _numbered(now))

    def rows_of(first: int, end: int) -> Ints:
        row_R = np.arange(first, end, dtype=np.int64)
        old_R = np.where(row_R < shared, row_R, -1)
        if before.counts_rows and now.counts_rows:
            old_R[row_R == now.rows - 1] = before.rows - 1
        return old_R

    note = ""
    if _numbered(before) != _numbered(now):
        note = f"{_numbered(before)} rows before, {_numbered(now)} now; the first {shared} are taken over"
    return rows_of, note


def _numbered(feature: SparseFeature) -> int:
    """Rows of the table without the one that rare values share."""
    return feature.rows - feature.counts_rows


def _by_value(old: Sequence[int | str], new: Sequence[int | str], name: str) -> tuple[RowsOf, str]:
    """The same of a vocabulary; row 0 is the unknown in both."""
    found_V = np.full(len(new), -1, dtype=np.int64)
    if old and new and type(old[0]) is type(new[0]):
        index = pc.index_in(pa.array(new), value_set=pa.array(old))
        found_V = pc.fill_null(index, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    known_R = np.concatenate([[0], np.where(found_V >= 0, found_V + 1, -1)])
    kept = int((found_V >= 0).sum())

    def rows_of(first: int, end: int) -> Ints:
        inside = known_R[first:end]
        return np.concatenate([inside, np.full(end - first - len(inside), -1, dtype=np.int64)])

    lost = len(old) - kept
    note = f"{kept} of {len(new)} values are taken over, the rest is new"
    return rows_of, note + (f"; {lost} values of the earlier run had no room" if lost else "")
