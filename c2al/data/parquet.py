"""Streaming reader: Parquet files -> the batches of one rank.

The row groups of all files, in file order or permuted, form one sequence of N rows. Logical shard
s of L owns rows [s N / L, (s + 1) N / L) of it and deals batch_size / L of them to every step, out
of shuffled blocks; rank r of W owns shards [r L / W, (r + 1) L / W). A global batch therefore
does not depend on W, and a position in the epoch is nothing but the step.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from c2al.config import DataConfig
from c2al.data.batch import Batch, collate
from c2al.data.encode import Encoder, Rows
from c2al.data.schema import Statistics, check_columns
from c2al.data.source import File, open_dataset
from c2al.errors import ConfigError, DataError

if TYPE_CHECKING:
    from c2al.data.cohorts import CohortSpec

__all__ = ["BatchReader", "open_dataset"]

UNSHUFFLED_ROWS = 131072
"""Rows encoded ahead over all shards where no shuffle buffer says otherwise."""


class BatchReader:
    """Iterable over one epoch's batches of one rank, read and encoded in background threads.

    Every rank sees `steps` batches of B = batch_size / world_size rows; rows missing in the last
    ones are padding. Memory is bounded by the shuffle buffer, twice, plus a row group a shard.
    Leaving the iteration early stops the threads; an error in them is raised in the consumer.

    Args:
        paths: files, folders, patterns or URIs, as `open_dataset` takes them.
        batch_size: rows of a global batch; a multiple of `shards`.
        shuffle: permute row groups, and rows within blocks of data.shuffle_rows / shards, by
            (seed, epoch). Has no effect with data.shuffle_rows = 0.
        shards: logical shards L; a multiple of world_size. With shards = world_size and no
            shuffling the ranks' rows, one rank after another, are the data set in file order.
        start_step: the first step to yield; blocks before it are not decoded.
        cohorts: the chosen ones, to fill Batch.member_BC.
        carry: columns to hand through unchanged in Batch.carried.

    Raises ConfigError for sizes that do not divide and DataError for what is wrong with the
    files: at once what footers tell, during iteration bad values.
    """

    def __init__(
        self,
        paths: Sequence[str],
        data: DataConfig,
        statistics: Statistics,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        epoch: int = 0,
        shuffle: bool,
        shards: int,
        start_step: int = 0,
        cohorts: "Sequence[CohortSpec]" = (),
        carry: tuple[str, ...] = (),
    ):
        if shards % world_size:
            raise ConfigError(
                f"data.shards: {shards} cannot be dealt to {world_size} ranks; "
                f"set it to a multiple of the world size, e.g. {world_size * -(-shards // world_size)}"
            )
        if batch_size % shards:
            raise ConfigError(
                f"train.batch_size: {batch_size} is not a multiple of {shards} shards; "
                f"set it to e.g. {shards * -(-batch_size // shards)}"
            )
        self._data = data
        self._encoder = Encoder(data, statistics, cohorts, carry)
        files = open_dataset(paths)
        check_columns(files, data, self._encoder.carried_columns)

        self._order = _Order(files, shards, batch_size, data.shuffle_rows, (seed, epoch) if shuffle else None)
        self.rows = self._order.rows
        """Rows of the data set."""
        self.steps = self._order.steps
        """Steps of the epoch, the same on every rank, whatever start_step is."""
        if not 0 <= start_step <= self.steps:
            raise DataError(f"{', '.join(paths)}: step {start_step} is not within the epoch's {self.steps} steps")
        self._start_step = start_step
        own = shards // world_size
        self._shards = range(rank * own, (rank + 1) * own)
        self._size = batch_size // world_size

    def __len__(self) -> int:
        return self.steps - self._start_step

    def __iter__(self) -> Iterator[Batch]:
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(self._data.prefetch)
        stop = threading.Event()
        thread = threading.Thread(target=self._produce, args=(ready, stop), name="c2al-reader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _produce(self, ready: "queue.Queue[Batch | BaseException | None]", stop: threading.Event) -> None:
        def put(item: Batch | BaseException | None) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        try:
            for batch in self._batches():
                if not put(batch):
                    return
            put(None)
        except BaseException as e:
            put(e)

    def _batches(self) -> Iterator[Batch]:
        """Batches from start_step on, decoding one block ahead."""
        keys = [f.key for f in self._data.sparse]
        order = self._order
        sources = [_Shard(order, self._encoder, s) for s in self._shards]
        with ThreadPoolExecutor(self._data.workers, thread_name_prefix="c2al-decode") as pool:

            def request(block: int) -> list[Future[Rows]]:
                return [pool.submit(s.block, block) for s in sources] if block < order.blocks else []

            ahead = request(self._start_step // order.steps_a_block)
            try:
                for block in range(self._start_step // order.steps_a_block, order.blocks):
                    parts = [future.result() for future in ahead]
                    ahead = request(block + 1)
                    begin = block * order.steps_a_block
                    for step in range(max(begin, self._start_step), min(begin + order.steps_a_block, order.steps)):
                        a = (step - begin) * order.rows_a_step
                        pieces = [p.slice(min(a, len(p)), min(a + order.rows_a_step, len(p))) for p in parts]
                        yield collate(pieces, keys, self._size, order.real_rows(step))
            finally:
                pool.shutdown(cancel_futures=True)


class _Order:
    """Which row of which row group is at which step: the same on every rank."""

    def __init__(
        self, files: Sequence[File], shards: int, batch_size: int, shuffle_rows: int, key: tuple[int, int] | None
    ):
        groups = [(file, i, rows) for file in files for i, rows in enumerate(file.row_group_rows) if rows]
        self.key = key if shuffle_rows else None
        """(seed, epoch) of the permutations; None: file order."""
        if self.key:
            groups = [groups[i] for i in np.random.default_rng(self.key).permutation(len(groups))]
        self.groups = groups
        self.ends = np.cumsum([rows for _, _, rows in groups], dtype=np.int64)
        """Where each row group ends in the global sequence."""
        self.rows = int(self.ends[-1])
        self.bounds = np.array([s * self.rows // shards for s in range(shards + 1)])
        """Where the shards begin and end in it."""
        self.rows_a_step = batch_size // shards
        """Rows a shard deals to a step."""
        self.steps = -(-int(np.diff(self.bounds).max()) // self.rows_a_step)
        buffer = shuffle_rows if self.key else UNSHUFFLED_ROWS
        self.steps_a_block = max(1, buffer // shards // self.rows_a_step)
        self.blocks = -(-self.steps // self.steps_a_block)

    def real_rows(self, step: int) -> int:
        """Rows of the global batch of `step`, over all shards and ranks."""
        left = np.diff(self.bounds) - step * self.rows_a_step
        return int(np.clip(left, 0, self.rows_a_step).sum())


class _Shard:
    """The blocks of one logical shard; asked for them in order, it decodes each row group once."""

    def __init__(self, order: _Order, encoder: Encoder, shard: int):
        self._order = order
        self._encoder = encoder
        self._shard = shard
        self._kept: tuple[int, Rows] | None = None

    def block(self, block: int) -> Rows:
        """Rows of the block, permuted if the order is. Past the shard's end: no rows."""
        order = self._order
        size = order.steps_a_block * order.rows_a_step
        end = int(order.bounds[self._shard + 1])
        start = min(int(order.bounds[self._shard]) + block * size, end)
        rows = self._rows(start, min(start + size, end))
        if order.key is None:
            return rows
        rng = np.random.default_rng((*order.key, self._shard, block))
        return rows.take(rng.permutation(len(rows)))

    def _rows(self, start: int, stop: int) -> Rows:
        """Rows [start, stop) of the global sequence."""
        # An empty range still takes (no rows of) a row group, which says what the columns are.
        at = min(int(np.searchsorted(self._order.ends, start, side="right")), len(self._order.groups) - 1)
        parts: list[Rows] = []
        while not parts or start < stop:
            rows = self._order.groups[at][2]
            begin = int(self._order.ends[at]) - rows
            parts.append(self._group(at).slice(start - begin, min(stop - begin, rows)))
            start = begin + rows
            at += 1
        return Rows.concat(parts)

    def _group(self, at: int) -> Rows:
        if self._kept is None or self._kept[0] != at:
            # Let go of the last group before the next is decoded: a shard holds one at a time.
            self._kept = None
            file, index, _ = self._order.groups[at]
            table = file.read(index, self._encoder.columns, self._encoder.dictionary)
            self._kept = at, self._encoder.encode(table, file.where(index))
        return self._kept[1]
