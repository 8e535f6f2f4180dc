"""The passes of `c2al discover` over Parquet: threads, ranks, progress and checkpoints.

A pass is a set of row groups. Rank r of W takes the r-th of every W that are left, its threads take
them one by one; counts are integer sums, so nothing depends on who counted what. A killed scan
leaves accumulators together with the row groups they hold; the next run with the same inputs, on any
number of ranks, counts only the others.
"""

import dataclasses
import functools
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from tqdm import tqdm

from c2al.config import Axis, DiscoverConfig
from c2al.data.cohorts import numeric
from c2al.data.source import File
from c2al.discovery.accumulate import BLOCK_ROWS, Accumulators, BlockScanner, Columns, Cuts, fixed_cuts, plain_axes
from c2al.discovery.cuts import PercentileCuts
from c2al.discovery.histogram import Counts, key_order
from c2al.distributed.process import World
from c2al.errors import C2ALError, CheckpointError, DataError
from c2al.files import write_atomically

Unit = tuple[int, int]
"""(file, row group)."""


def scan(
    files: Sequence[File],
    axes: Sequence[Axis],
    config: DiscoverConfig,
    columns: Columns,
    folder: Path,
    world: World,
    earlier_cuts: Cuts,
) -> Accumulators:
    """Counts all rows of `files` over all ranks; the same result on every rank.

    `folder`, shared by the ranks, keeps the checkpoints; the caller removes it once the result is
    saved. `earlier_cuts`: of percentile axes that keep the cuts of an earlier scan.

    Raises, on every rank, DataError naming file, row group, row and column, CohortError naming the
    axis, CheckpointError if `folder` holds the checkpoint of another scan.
    """
    read = [columns.prediction, columns.label, *(a.column for a in plain_axes(axes))]
    read = list(dict.fromkeys([*read, columns.user] if config.jackknife else read))
    world.together(lambda: _check_columns(files, read))
    cuts_file = folder / "cuts.json"
    identity = _identity(files, axes, config, columns, earlier_cuts)
    before = world.once(lambda: sorted(str(p) for p in folder.glob("*.npz")))
    cuts = world.once(lambda: _load_cuts(cuts_file, identity))
    if cuts is None:
        cuts = {**fixed_cuts(axes), **earlier_cuts}
        open_axes = [a for a in axes if a.kind == "percentiles" and a.name not in cuts]
        cuts |= _percentile_cuts(files, open_axes, config, world)
        saved = json.dumps({"identity": identity, "cuts": cuts})
        world.once(lambda: write_atomically(cuts_file, saved))

    def count() -> Accumulators:
        kept = empty = Accumulators.empty(axes, cuts, config.jackknife)
        finished: set[Unit] = set()
        for i, path in enumerate(before):
            earlier, extra = Accumulators.load(path)
            _check_identity(path, extra["identity"], identity)
            finished |= {(file, row_group) for file, row_group in extra["finished"]}
            if i % world.size == world.rank:
                kept = kept.plus(earlier.counts)
        left = [u for u in _units(files) if u not in finished][world.rank :: world.size]
        own = _Counting(empty, config, columns, folder / f"{len(before):06d}-{world.rank:05d}.npz", identity)
        texts = [a.column for a in plain_axes(axes) if a.kind == "categorical"]
        _each_row_group(files, left, read, texts, config.threads, "count", own.worker, world.rank == 0)
        return kept.plus(own.total.counts)

    return _reduce(world.together(count), world)


class _Worker(Protocol):
    """What one thread does with the row groups it is given."""

    def block(self, block: pa.RecordBatch, first_row: int) -> None:
        """Takes some rows of a row group, `first_row` the first of them."""

    def finished(self, unit: Unit) -> None:
        """All rows of a row group have been taken."""

    def close(self) -> None:
        """There is no row group left."""


def _each_row_group(
    files: Sequence[File],
    units: Sequence[Unit],
    columns: Sequence[str],
    texts: Sequence[str],
    threads: int,
    name: str,
    new_worker: Callable[[], _Worker],
    report: bool,
) -> None:
    """Decodes the row groups in `threads` threads and hands them to one worker each.

    An error stops all threads; those of the data get file and row group in front.
    """
    todo, lock, stop = iter(units), threading.Lock(), threading.Event()
    decoding = working = 0.0
    began = time.perf_counter()
    total = sum(files[f].row_group_rows[g] for f, g in units)
    bar = tqdm(total=total, desc=name, unit="row", unit_scale=True, disable=None if report else True)

    def thread() -> None:
        nonlocal decoding, working
        worker = new_worker()
        while not stop.is_set():
            with lock:
                unit = next(todo, None)
            if unit is None:
                break
            file, row_group = files[unit[0]], unit[1]
            start = time.perf_counter()
            table = file.read(row_group, columns, texts)
            decoded = time.perf_counter()
            _feed(table, worker, file.where(row_group))
            rows = table.num_rows
            del table  # before the next one is decoded
            with lock:
                decoding += decoded - start
                working += time.perf_counter() - start
                bar.set_postfix_str(f"{decoding / working:.0%} of the time decoding", refresh=False)
                bar.update(rows)
            worker.finished(unit)
        worker.close()

    def guarded() -> None:
        try:
            thread()
        except BaseException:
            stop.set()
            raise

    with bar, ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(guarded) for _ in range(threads)]:
            future.result()
    if report and working:
        seconds = time.perf_counter() - began
        print(
            f"{name}: {total:,} rows in {seconds:.1f} s, {total / seconds:,.0f} rows/s a rank, "
            f"{decoding / working:.0%} of the time decoding (the limit)",
            file=sys.stderr,
        )


def _feed(table: pa.Table, worker: _Worker, where: str) -> None:
    row = 0
    try:
        for block in table.to_batches(max_chunksize=BLOCK_ROWS):
            worker.block(block, row)
            row += block.num_rows
    except C2ALError as e:
        raise type(e)(f"{where}: {e}") from e


class _Counting:
    """One rank's counts, saved together with the row groups they hold."""

    def __init__(self, empty: Accumulators, config: DiscoverConfig, columns: Columns, path: Path, identity: str):
        self.total = empty
        self.config = config
        self._units: list[Unit] = []
        self._columns, self._path, self._identity = columns, path, identity
        self._lock = threading.Lock()

    def worker(self) -> "_CountingWorker":
        cap, jackknife = self.config.max_cohorts, self.config.jackknife
        scanner = BlockScanner(self.total.axes, self.total.cuts, self._columns, cap=cap, jackknife=jackknife)
        return _CountingWorker(scanner, self)

    def add(self, counts: tuple[Counts, ...], units: Sequence[Unit]) -> None:
        """Adds finished row groups and their counts."""
        with self._lock:
            self.total = self.total.plus(counts)
            self._units += units
            self.total.save(self._path, identity=self._identity, finished=self._units)


class _CountingWorker:
    def __init__(self, scanner: BlockScanner, counting: _Counting):
        self._scanner, self._counting = scanner, counting
        self._units: list[Unit] = []
        self._saved = time.monotonic()

    def block(self, block: pa.RecordBatch, first_row: int) -> None:
        self._scanner.add(block, first_row)

    def finished(self, unit: Unit) -> None:
        self._units.append(unit)
        if time.monotonic() - self._saved >= self._counting.config.checkpoint_seconds:
            self.close()

    def close(self) -> None:
        if self._units:
            self._counting.add(self._scanner.take(), self._units)
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
            _each_row_group(files, units, read, (), config.threads, name, worker, world.rank == 0)

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
            if column not in file.schema.names:
                raise DataError(f"{file.name}: column '{column}' is missing, there are {file.schema.names}")
            kind = _kind(file.schema.field(column).type)
            first, name = kinds.setdefault(column, (kind, file.name))
            if kind != first:
                raise DataError(f"{file.name}: column '{column}' holds {kind}, but {first} in {name}")


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    families = {
        "text": (pa.types.is_string, pa.types.is_large_string),
        "bools": (pa.types.is_boolean,),
        "integers": (pa.types.is_integer,),
        "floats": (pa.types.is_floating,),
    }
    return next((name for name, tests in families.items() if any(t(kind) for t in tests)), str(kind))


def _identity(
    files: Sequence[File], axes: Sequence[Axis], config: DiscoverConfig, columns: Columns, earlier_cuts: Cuts
) -> str:
    """Digest of what a scan's counts depend on; a checkpoint of another one must not be continued."""
    inputs = [[f.name, f.row_group_rows] for f in files]
    settings = [config.jackknife, config.cut_tolerance, dataclasses.asdict(columns), dict(earlier_cuts)]
    text = json.dumps([inputs, [dataclasses.asdict(a) for a in axes], settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _load_cuts(path: Path, identity: str) -> dict[str, tuple[float, ...]] | None:
    """The cuts an interrupted scan found, if it got so far."""
    if not path.exists():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    _check_identity(path, saved["identity"], identity)
    return {name: tuple(values) for name, values in saved["cuts"].items()}


def _check_identity(path: Path | str, found: str, identity: str) -> None:
    if found != identity:
        raise CheckpointError(
            f"{path}: belongs to a scan of other files, axes or columns; remove it or choose another --output"
        )
