"""The passes of `c2al discover` over Parquet, shared by ranks and threads.

A pass is a set of row groups. Rank r of W takes the r-th of every W that are left, its threads take
them one by one; counts are integer sums, so nothing depends on who counted what.
"""

import dataclasses
import functools
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from c2al.config import Axis, DiscoverConfig
from c2al.data.arrow_types import is_text
from c2al.data.cohort_codes import numeric
from c2al.data.source import File
from c2al.discovery.accumulate import BlockScanner
from c2al.discovery.accumulators import Accumulators
from c2al.discovery.axes import fixed_cuts, plain_axes
from c2al.discovery.cuts import PercentileCuts
from c2al.discovery.histogram import Counts, key_order
from c2al.discovery.record import ScanRecord
from c2al.discovery.row_groups import RowGroups
from c2al.discovery.saved import Unit
from c2al.discovery.unfinished import Checkpoint, Unfinished
from c2al.distributed.process import World
from c2al.errors import CheckpointError, DataError


def scan(files: Sequence[File], record: ScanRecord, folder: Path, world: World) -> Accumulators:
    """Counts all rows of `files` over all ranks; the same result on every rank.

    `record` says what is counted and how. `folder`, shared by the ranks, keeps the checkpoints; the
    caller removes it once the result is saved.

    Raises, on every rank, DataError naming file, row group, row and column, CohortError naming the
    axis, CheckpointError if `folder` holds the checkpoint of another scan, or a damaged one.
    """
    axes, config, columns = record.axes, record.settings, record.columns
    read = [columns.prediction, columns.label, *(a.column for a in plain_axes(axes))]
    read = list(dict.fromkeys([*read, columns.user] if config.jackknife else read))
    world.together(lambda: _check_columns(files, read))
    unfinished = Unfinished(folder, record)
    before = world.once(unfinished.saved)
    found = world.once(unfinished.cuts)
    if found is None and before:
        raise CheckpointError(f"{before[0]}: there is no cuts.json beside it; remove {folder} to count anew")
    cuts = found
    if cuts is None:
        given = {**fixed_cuts(axes), **record.earlier_cuts}
        open_axes = [a for a in axes if a.kind == "percentiles" and a.name not in given]
        cuts = {**given, **_percentile_cuts(files, open_axes, config, world)}
        world.once(lambda: unfinished.save_cuts(cuts))

    def count() -> Accumulators:
        empty = Accumulators.empty(axes, cuts, columns, jackknife=config.jackknife, files=record.files)
        kept, finished = _counted_before(unfinished, before, empty, world)
        left = [u for u in _units(files) if u not in finished][world.rank :: world.size]
        own = Checkpoint(empty, folder, len(before), world.rank)
        texts = [a.column for a in plain_axes(axes) if a.kind == "categorical"]
        worker = functools.partial(_CountWorker, own, config)
        RowGroups(files, left, read, texts).feed(worker, config.threads, "count", world.rank == 0, world.watched)
        return kept.plus(own.total.counts)

    return _reduce(world.together(count), world)


def _counted_before(
    unfinished: Unfinished, saved: Sequence[Path], empty: Accumulators, world: World
) -> tuple[Accumulators, set[Unit]]:
    """(this rank's share of the saved counts, all row groups that the saved counts hold)."""
    kept, finished = empty, set[Unit]()
    for i, path in enumerate(saved):
        earlier, units = unfinished.load(path, empty)
        if not finished.isdisjoint(units):
            raise CheckpointError(f"{path}: damaged: it holds row groups that an earlier one holds")
        finished.update(units)
        if i % world.size == world.rank:
            kept = kept.plus(earlier.counts)
    return kept, finished


class _CountWorker:
    """Counts row groups, and adds them to the rank's checkpoint every now and then."""

    def __init__(self, checkpoint: Checkpoint, config: DiscoverConfig):
        empty = checkpoint.total
        self._scanner = BlockScanner(
            empty.axes, empty.cuts, empty.columns, cap=config.max_cohorts, jackknife=config.jackknife
        )
        self._checkpoint, self._seconds = checkpoint, config.checkpoint_seconds
        self._units: list[Unit] = []
        self._saved = time.monotonic()

    def block(self, block: pa.RecordBatch, first_row: int) -> None:
        self._scanner.add(block, first_row)

    def finished(self, unit: Unit) -> None:
        self._units.append(unit)
        if time.monotonic() - self._saved >= self._seconds:
            self.close()

    def close(self) -> None:
        if self._units:
            self._checkpoint.add(self._scanner.take(), self._units)
        self._units, self._saved = [], time.monotonic()


class _CutWorker:
    """Counts the radix histograms of the percentile axes; `totals` is shared under `lock`."""

    def __init__(
        self,
        cuts: Sequence[PercentileCuts],
        columns: Sequence[str],
        totals: Sequence[npt.NDArray[np.int64]],
        lock: threading.Lock,
    ):
        self._cuts, self._columns, self._totals, self._lock = cuts, columns, totals, lock
        self._own = [c.histogram() for c in cuts]

    def block(self, block: pa.RecordBatch, first_row: int) -> None:
        for cut, column, histogram in zip(self._cuts, self._columns, self._own, strict=True):
            cut.count(numeric(block.column(column), column, cut.axis), histogram)

    def finished(self, unit: Unit) -> None:
        pass

    def close(self) -> None:
        with self._lock:
            for total, own in zip(self._totals, self._own, strict=True):
                total += own


def _percentile_cuts(
    files: Sequence[File], axes: Sequence[Axis], config: DiscoverConfig, world: World
) -> dict[str, tuple[float, ...]]:
    """Exact cuts of the percentile axes over all rows: two passes over their columns alone."""
    if not axes:
        return {}
    cuts = [PercentileCuts(a.name, a.percentiles) for a in axes]
    columns = [a.column for a in axes]
    units = _units(files)[world.rank :: world.size]

    def counted(name: str) -> list[npt.NDArray[np.int64]]:
        totals, lock = [c.histogram() for c in cuts], threading.Lock()

        def work() -> None:
            read = list(dict.fromkeys(columns))
            worker = functools.partial(_CutWorker, cuts, columns, totals, lock)
            RowGroups(files, units, read).feed(worker, config.threads, name, world.rank == 0, world.watched)

        world.together(work)
        return [world.all_sum(torch.from_numpy(t)).numpy() for t in totals]

    for cut, total in zip(cuts, counted("cuts, pass 1 of 2"), strict=True):
        cut.narrow(total)
    totals = counted("cuts, pass 2 of 2")
    return {a.name: cut.finish(total, config.cut_tolerance) for a, cut, total in zip(axes, cuts, totals, strict=True)}


def _reduce(own: Accumulators, world: World) -> Accumulators:
    """Sum over the ranks: the cohorts of all are agreed upon, then one all-reduce adds the counts."""
    if world.size == 1:
        return own
    every = [world.broadcast([c.keys for c in own.counts], source=r) for r in range(world.size)]
    keys = [tuple(sorted(set().union(*of_target), key=key_order)) for of_target in zip(*every, strict=True)]
    spread = [c.spread(k) for c, k in zip(own.counts, keys, strict=True)]
    flat = np.concatenate([array.reshape(-1) for c in spread for array in (c.fine_CS22, c.group_CGK)])
    world.all_sum(torch.from_numpy(flat))
    counts = []
    for c in spread:
        fine, group, flat = np.split(flat, np.cumsum([c.fine_CS22.size, c.group_CGK.size]))
        counts.append(Counts(c.keys, fine.reshape(c.fine_CS22.shape), group.reshape(c.group_CGK.shape)))
    return dataclasses.replace(own, counts=tuple(counts))


def _units(files: Sequence[File]) -> list[Unit]:
    return [(f, g) for f, file in enumerate(files) for g in range(len(file.row_group_rows))]


def _check_columns(files: Sequence[File], columns: Sequence[str]) -> None:
    """Every file has the columns, and text is text, a number a number, in all of them."""
    kinds: dict[str, tuple[str, str]] = {}
    for file in files:
        for column in columns:
            there = file.schema.names.count(column)
            if there != 1:
                what = "is missing" if not there else f"is there {there} times"
                raise DataError(f"{file.name}: column '{column}' {what}, there are {file.schema.names}")
            kind = _kind(file.schema.field(column).type)
            first, name = kinds.setdefault(column, (kind, file.name))
            if kind != first:
                raise DataError(f"{file.name}: column '{column}' holds {kind}, but {first} in {name}")


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    families = {
        "text": (is_text,),
        "bools": (pa.types.is_boolean,),
        "integers": (pa.types.is_integer,),
        "floats": (pa.types.is_floating,),
    }
    return next((name for name, tests in families.items() if any(t(kind) for t in tests)), str(kind))
