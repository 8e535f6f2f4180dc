"""Streaming reader: Parquet files -> the batches of one rank.

The row groups of all files, in file order or permuted, form one sequence of N rows. Logical shard
s of L owns rows [s N / L, (s + 1) N / L) of it and deals batch_size / L of them to every step, out
of shuffled blocks; rank r of W owns shards [r L / W, (r + 1) L / W). A global batch therefore
does not depend on W, and a position in the epoch is nothing but the step.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from c2al.config import DataConfig
from c2al.data.background import in_background
from c2al.data.batch import Batch, collate
from c2al.data.cohorts import CohortSpec
from c2al.data.encode import Encoder
from c2al.data.rows import Rows
from c2al.data.schema import check_inputs
from c2al.data.source import File, open_dataset
from c2al.data.statistics import Statistics
from c2al.errors import ConfigError, DataError
from c2al.text import redacted

__all__ = ["BatchReader", "open_dataset"]

UNSHUFFLED_ROWS = 131072
"""Rows encoded ahead over all shards where no shuffle buffer says otherwise."""


class BatchReader:
    """Iterable over one epoch's batches of one rank, read and encoded in background threads.

    Every rank sees `steps` batches of B = batch_size / world_size rows; rows missing in the last
    ones are padding. Memory is bounded by the shuffle buffer, twice, plus one row group per shard.
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
        pin_memory: as torch's DataLoader means it: batches from which a GPU copies while the host goes on.

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
        pin_memory: bool = False,
    ):
        check_sizes(batch_size, shards, world_size)
        self._data = data
        self._encoder = Encoder(data, statistics, cohorts, carry)
        files = open_dataset(paths)
        check_inputs(files, data, self._encoder.carried_columns, statistics.kinds)

        self._order = _Order(files, shards, batch_size, data.shuffle_rows, (seed, epoch) if shuffle else None)
        self.rows = self._order.rows
        """Rows of the data set."""
        self.steps = self._order.steps
        """Steps of the epoch, the same on every rank, whatever start_step is."""
        if not 0 <= start_step <= self.steps:
            shown = ", ".join(map(redacted, paths))
            raise DataError(f"{shown}: step {start_step} is not within the epoch's {self.steps} steps")
        self._start_step, self._pin_memory = start_step, pin_memory
        own = shards // world_size
        self._shards = range(rank * own, (rank + 1) * own)
        self._size = batch_size // world_size

    def __len__(self) -> int:
        return self.steps - self._start_step

    def __iter__(self) -> Iterator[Batch]:
        return in_background(self._batches(), self._data.prefetch)

    def _batches(self) -> Generator[Batch]:
        """Batches from start_step on, decoding one block ahead."""
        order = self._order
        sources = [_Shard(order, self._encoder, s) for s in self._shards]
        first_block = self._start_step // order.steps_per_block
        with ThreadPoolExecutor(self._data.workers, thread_name_prefix="c2al-decode") as pool:

            def request(block: int) -> list[Future[Rows]]:
                return [pool.submit(s.block, block) for s in sources] if block < order.blocks else []

            ahead = request(first_block)
            try:
                for block in range(first_block, order.blocks):
                    parts = [future.result() for future in ahead]
                    ahead = request(block + 1)
                    for step, (a, b) in order.steps_of(block):
                        if step >= self._start_step:
                            pieces = [p.slice(min(a, len(p)), min(b, len(p))) for p in parts]
                            batch = collate(pieces, self._data, self._size, order.real_rows(step))
                            yield batch.pin_memory() if self._pin_memory else batch
            finally:
                pool.shutdown(cancel_futures=True)


def check_sizes(batch_size: int, shards: int, world_size: int) -> None:
    """Raises ConfigError unless every rank gets as many shards, and every shard as many rows of a batch."""
    if shards % world_size:
        raise ConfigError(
            f"data.shards: {shards} cannot be dealt to {world_size} ranks; "
            f"set it to a multiple of the world size, e.g. {world_size * -(-shards // world_size)}"
        )
    if batch_size < 1:
        raise ConfigError(f"train.batch_size: must be at least 1, is {batch_size}")
    if batch_size % shards:
        raise ConfigError(
            f"train.batch_size: {batch_size} is not a multiple of {shards} shards; "
            f"set it to e.g. {shards * -(-batch_size // shards)}"
        )


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
        self.rows_per_step = batch_size // shards
        """Rows a shard deals to a step."""
        self.steps = -(-int(np.diff(self.bounds).max()) // self.rows_per_step)
        buffer = shuffle_rows if self.key else UNSHUFFLED_ROWS
        self.steps_per_block = max(1, buffer // shards // self.rows_per_step)
        self.blocks = -(-self.steps // self.steps_per_block)

    def steps_of(self, block: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """Every step of a block, with the rows [a, b) of each shard's block that it takes."""
        begin = block * self.steps_per_block
        for step in range(begin, min(begin + self.steps_per_block, self.steps)):
            a = (step - begin) * self.rows_per_step
            yield step, (a, a + self.rows_per_step)

    def real_rows(self, step: int) -> int:
        """Rows of the global batch of `step`, over all shards and ranks."""
        left = np.diff(self.bounds) - step * self.rows_per_step
        return int(np.clip(left, 0, self.rows_per_step).sum())


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
        size = order.steps_per_block * order.rows_per_step
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
