"""Row groups decoded in threads, with a progress bar and the share of the time that decoding takes."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import pyarrow as pa
from tqdm import tqdm

from c2al.data.source import File
from c2al.data.statistics import Watched
from c2al.discovery.accumulate import BLOCK_ROWS
from c2al.discovery.saved import Unit
from c2al.errors import C2ALError


class Worker(Protocol):
    """What one thread does with the row groups it is given."""

    def block(self, block: pa.RecordBatch, first_row: int) -> None:
        """Takes some rows of a row group, `first_row` the first of them."""

    def finished(self, unit: Unit) -> None:
        """All rows of a row group have been taken."""

    def close(self) -> None:
        """There is no row group left."""


class RowGroups:
    """The row groups that one rank reads in one pass, and which of their columns."""

    def __init__(self, files: Sequence[File], units: Sequence[Unit], columns: Sequence[str], texts: Sequence[str] = ()):
        """`texts`: columns whose strings come dictionary-encoded."""
        self._files, self._columns, self._texts = files, columns, texts
        self._units = units
        self.rows = sum(files[f].row_group_rows[g] for f, g in units)

    def feed(
        self, new_worker: Callable[[], Worker], threads: int, name: str, report: bool, watched: Watched = iter
    ) -> None:
        """Hands every row group to one of `threads` workers, each in a thread of its own.

        An error stops all threads; those of the data get file and row group in front. `report`: shows
        the pass called `name` on the terminal. `watched` hands out the row groups, and may raise.
        """
        todo, stop = _Todo(watched(self._units)), threading.Event()

        def thread() -> None:
            try:
                self._work(new_worker(), todo, stop, progress)
            except BaseException:
                stop.set()
                raise

        with _Progress(name, self.rows, report) as progress, ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(thread) for _ in range(threads)]:
                future.result()

    def _work(self, worker: Worker, todo: "_Todo", stop: threading.Event, progress: "_Progress") -> None:
        """One thread: decodes and counts until there is nothing left or another thread failed."""
        while not stop.is_set() and (unit := todo.next()) is not None:
            file, row_group = self._files[unit[0]], unit[1]
            start = time.perf_counter()
            table = file.read(row_group, self._columns, self._texts)
            decoded = time.perf_counter()
            _hand_over(table, worker, file.where(row_group))
            rows = table.num_rows
            del table  # before the next one is decoded
            progress.add(rows, decoded - start, time.perf_counter() - start)
            worker.finished(unit)
        worker.close()


class _Todo:
    """The row groups that no thread has taken yet."""

    def __init__(self, units: Iterator[Unit]):
        self._units, self._lock = units, threading.Lock()

    def next(self) -> Unit | None:
        with self._lock:
            return next(self._units, None)


class _Progress:
    """The bar of one pass, and its last line with the speed."""

    def __init__(self, name: str, rows: int, report: bool):
        self._name, self._rows, self._report = name, rows, report
        self._lock = threading.Lock()
        self._decoding = self._working = 0.0
        """Seconds of all threads together."""
        self._began = time.perf_counter()
        self._bar = tqdm(total=rows, desc=name, unit="row", unit_scale=True, disable=None if report else True)

    def add(self, rows: int, decoding: float, working: float) -> None:
        """A row group is done: its rows, the seconds it took to decode and in all."""
        with self._lock:
            self._decoding += decoding
            self._working += working
            self._bar.set_postfix_str(f"{self._decoding / self._working:.0%} of the time decoding", refresh=False)
            self._bar.update(rows)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.close()
        if kind is None and self._report and self._working:
            seconds = time.perf_counter() - self._began
            print(
                f"{self._name}: {self._rows:,} rows in {seconds:.1f} s, {self._rows / seconds:,.0f} rows/s per rank, "
                f"{self._decoding / self._working:.0%} of the time decoding Parquet",
                file=sys.stderr,
            )


def _hand_over(table: pa.Table, worker: Worker, where: str) -> None:
    row = 0
    try:
        for block in table.to_batches(max_chunksize=BLOCK_ROWS):
            worker.block(block, row)
            row += block.num_rows
    except C2ALError as e:
        raise type(e)(f"{where}: {e}") from e
