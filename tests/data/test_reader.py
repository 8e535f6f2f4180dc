"""BatchReader: which rows come when. Oracles work on the row ids and on plain Python."""

import dataclasses
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2al.config import DataConfig, DenseFeature, SparseFeature
from c2al.data.encode import Encoder
from c2al.data.parquet import BatchReader
from c2al.data.rows import Rows
from c2al.data.statistics import Statistics
from c2al.errors import ConfigError, DataError

NO_STATISTICS = Statistics(moments={}, vocabularies={})
DATA = DataConfig(
    dense=(DenseFeature(column="x", transforms=()),),
    sparse=(
        SparseFeature(column="id", encoding="identity", num_embeddings=1_000_000),
        SparseFeature(column="bag", encoding="identity", num_embeddings=1_000_000, max_length=3),
    ),
    shuffle_rows=64,
)


def write(folder, sizes, start=0, rows_a_group=None):
    """One file per entry of `sizes`; row i of the data set has id i and features that follow from it."""
    folder.mkdir(exist_ok=True)
    for n, size in enumerate(sizes):
        i = np.arange(start, start + size)
        table = pa.table(
            {
                "row_id": i,
                "id": i,
                "x": (i * 0.5).astype(np.float32),
                "label": (i % 3 == 0).astype(np.int8),
                "bag": pa.array([[int(v)] * (v % 5) for v in i], pa.list_(pa.int64())),
            }
        )
        pq.write_table(table, folder / f"part-{n:03d}.parquet", row_group_size=rows_a_group or max(size, 1))
        start += size
    return (str(folder),)


def reader(paths, data=DATA, **changes):
    options = {"batch_size": 16, "rank": 0, "world_size": 1, "seed": 5, "shuffle": True, "shards": 8} | {
        "carry": ("row_id",)
    }
    return BatchReader(paths, data, NO_STATISTICS, **{**options, **changes})


def ids(batch):
    return batch.carried["row_id"].to_pylist()


def everything(batch):
    """A batch as plain values that compare with ==."""
    tensors = (batch.dense_BF, batch.sparse.values(), batch.sparse.lengths(), batch.label_B, batch.weight_B)
    return ids(batch), batch.rows, [t.tolist() for t in tensors]


UNEVEN = [37, 1, 100, 0, 5, 64]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_epoch_has_every_row_once(tmp_path, world, shuffle):
    paths = write(tmp_path / "d", UNEVEN, rows_a_group=17)
    seen = [i for r in range(world) for b in reader(paths, rank=r, world_size=world, shuffle=shuffle) for i in ids(b)]
    assert sorted(seen) == list(range(sum(UNEVEN)))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_global_batches_do_not_depend_on_the_world_size(tmp_path, world):
    paths = write(tmp_path / "d", UNEVEN, rows_a_group=17)
    alone = list(reader(paths))
    ranks = [list(reader(paths, rank=r, world_size=world)) for r in range(world)]
    assert {len(r) for r in ranks} == {len(alone)}
    for step, batch in enumerate(alone):
        together = [i for r in ranks for i in ids(r[step])]
        assert together == ids(batch)
        assert {r[step].rows for r in ranks} == {batch.rows} == {len(together)}
        assert {len(r[step].label_B) for r in ranks} == {16 // world}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("step", [0, 1, 7, 12, 13])
def test_start_step_seeks(tmp_path, step, workers):
    paths = write(tmp_path / "d", UNEVEN, rows_a_group=17)
    whole = [everything(b) for b in reader(paths)]
    assert len(whole) == 13
    data = dataclasses.replace(DATA, workers=workers)
    assert [everything(b) for b in reader(paths, data, start_step=step)] == whole[step:]


def test_seek_does_not_decode_what_lies_before(tmp_path, monkeypatch):
    """The row groups before the position are damaged; only a reader that opens them can tell."""
    monkeypatch.setattr("c2al.data.parquet.UNSHUFFLED_ROWS", 160)
    paths = write(tmp_path / "d", [4000], rows_a_group=100)
    file = tmp_path / "d" / "part-000.parquet"
    meta = pq.ParquetFile(file).metadata
    begin = meta.row_group(0).column(0).dictionary_page_offset or meta.row_group(0).column(0).data_page_offset
    end = meta.row_group(9).column(0).dictionary_page_offset
    damaged = bytearray(file.read_bytes())
    damaged[begin:end] = b"\xff" * (end - begin)
    file.write_bytes(damaged)
    options = {"shuffle": False, "shards": 1}
    assert [i for b in reader(paths, start_step=70, **options) for i in ids(b)] == list(range(1120, 4000))
    with pytest.raises(DataError, match=r"part-000\.parquet, row group 0: cannot be decoded"):
        list(reader(paths, **options))


def test_rows_keep_their_values(tmp_path):
    paths = write(tmp_path / "d", UNEVEN, rows_a_group=17)
    for batch in reader(paths):
        i = np.array(ids(batch))
        real = len(i)
        np.testing.assert_array_equal(batch.dense_BF[:real, 0], (i * 0.5).astype(np.float32))
        np.testing.assert_array_equal(batch.label_B[:real], i % 3 == 0)
        np.testing.assert_array_equal(batch.sparse["id"].values(), i)
        bags = batch.sparse["bag"]
        assert [bags.values()[a:b].tolist() for a, b in zip(bags.offsets()[:-1], bags.offsets()[1:], strict=True)][
            :real
        ] == [[int(v)] * min(v % 5, 3) for v in i]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_column_may_have_one_value_per_row_in_some_row_groups_only(tmp_path, shuffle):
    """`hole` has nulls in the second half only, so that batches join row groups of both kinds."""
    n = 400
    table = pa.table(
        {
            "row_id": np.arange(n),
            "label": np.zeros(n, np.int8),
            **{c: np.arange(n) + 1000 * k for k, c in enumerate("abc")},
            "hole": pa.array([None if i >= n // 2 and i % 3 == 0 else i for i in range(n)]),
            "bag": pa.array([[i] * (i % 4) for i in range(n)]),
            "weight": pa.array([[i / 2] * (i % 4) for i in range(n)]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    options = {"encoding": "identity", "num_embeddings": 10_000}
    keys = ("a", "hole", "b", "w", "shared", "c")
    sparse = [SparseFeature(column=c, **options) for c in ("a", "hole", "b")]
    sparse.append(SparseFeature(column="bag", name="w", weights="weight", table="w", max_length=3, **options))
    sparse += [SparseFeature(column="hole", name="shared", table="w", **options), SparseFeature(column="c", **options)]
    data = DataConfig(sparse=tuple(sparse), shuffle_rows=128)
    seen = []
    for batch in reader((str(tmp_path),), data, shuffle=shuffle, batch_size=32):
        index = ids(batch)
        seen += index
        hole = [[i] if i < n // 2 or i % 3 else [] for i in index]
        bags = {"hole": hole, "shared": hole, "w": [[i] * (i % 4) for i in index]}
        bags |= {c: [[i + 1000 * k] for i in index] for k, c in enumerate("abc")}
        for tensor, own in ((batch.sparse, ("a", "hole", "b", "c")), (batch.weighted, ("w", "shared"))):
            assert tensor.keys() == [k for k in keys if k in own]
            assert tensor.values().tolist() == [v for k in own for bag in bags[k] for v in bag]
            empty = [0] * (len(batch.label_B) - len(index))
            assert tensor.lengths().tolist() == [v for k in own for v in [*map(len, bags[k]), *empty]]
        weights = [v / 2 for bag in bags["w"] for v in bag] + [1.0 for bag in hole for _ in bag]
        assert batch.weighted.weights().tolist() == weights
    assert sorted(seen) == list(range(n))


def test_padding_is_last_and_empty(tmp_path):
    paths = write(tmp_path / "d", [21])
    last = list(reader(paths))[-1]
    assert last.rows == 5
    assert last.weight_B.tolist() == [1.0] * 5 + [0.0] * 11
    assert last.sparse["id"].lengths().tolist() == [1] * 5 + [0] * 11
    assert last.sparse["bag"].lengths()[5:].tolist() == [0] * 11
    assert last.dense_BF[5:].abs().sum() == 0


def test_fewer_rows_than_ranks(tmp_path):
    paths = write(tmp_path / "d", [3])
    ranks = [list(reader(paths, rank=r, world_size=8)) for r in range(8)]
    assert [len(r) for r in ranks] == [1] * 8
    assert sorted(i for r in ranks for i in ids(r[0])) == [0, 1, 2]
    assert {r[0].rows for r in ranks} == {3}


def test_order_follows_seed_and_epoch(tmp_path):
    paths = write(tmp_path / "d", UNEVEN, rows_a_group=17)

    def order(**options):
        return [i for b in reader(paths, **options) for i in ids(b)]

    assert order() == order()
    assert order() != order(seed=6)
    assert order() != order(epoch=1)
    assert order() != sorted(order())


def test_unshuffled_ranks_read_the_file_order(tmp_path):
    paths = write(tmp_path / "d", UNEVEN, rows_a_group=17)
    for world in (1, 2, 4):
        seen = [
            i
            for r in range(world)
            for b in reader(paths, rank=r, world_size=world, shards=world, shuffle=False)
            for i in ids(b)
        ]
        assert seen == list(range(sum(UNEVEN)))
    unbuffered = dataclasses.replace(DATA, shuffle_rows=0)
    assert [i for b in reader(paths, unbuffered, shards=1) for i in ids(b)] == list(range(sum(UNEVEN)))


def test_shuffle_mixes_row_groups_within_a_batch(tmp_path):
    """With eight shards a batch of 16 draws from eight places of the data set, not from one."""
    paths = write(tmp_path / "d", [1600], rows_a_group=50)
    groups = [len({i // 50 for i in ids(b)}) for b in reader(paths, dataclasses.replace(DATA, shuffle_rows=800))]
    assert np.mean(groups) > 7


def test_sizes_that_do_not_divide_are_refused(tmp_path):
    paths = write(tmp_path / "d", [21])
    with pytest.raises(ConfigError, match=r"data\.shards: 8 cannot be dealt to 3 ranks.*e\.g\. 9"):
        reader(paths, world_size=3)
    with pytest.raises(ConfigError, match=r"train\.batch_size: 20 is not a multiple of 8 shards.*e\.g\. 24"):
        reader(paths, batch_size=20)
    with pytest.raises(DataError, match="step 3 is not within the epoch's 2 steps"):
        reader(paths, start_step=3)


def readers_alive():
    return [t for t in threading.enumerate() if t.name.startswith("c2al-")]


def test_leaving_early_stops_the_threads(tmp_path):
    paths = write(tmp_path / "d", [2000], rows_a_group=100)
    batches = iter(reader(paths))
    next(batches)
    assert readers_alive()
    batches.close()
    assert not readers_alive()


def test_an_error_in_the_background_reaches_the_consumer_and_ends_the_threads(tmp_path):
    paths = write(tmp_path / "d", [400], rows_a_group=100)
    bad = pq.read_table(tmp_path / "d" / "part-000.parquet").to_pydict()
    bad["label"][250] = 2
    pq.write_table(pa.table(bad), tmp_path / "d" / "part-000.parquet", row_group_size=100)
    with pytest.raises(
        DataError, match=r"part-000\.parquet, row group 2, row 50: column 'label' is 2, a label must be 0 or 1"
    ):
        list(reader(paths))
    assert not readers_alive()


def test_a_shard_holds_one_encoded_row_group(tmp_path, monkeypatch):
    """However many row groups the data set has: what bounds memory."""
    paths = write(tmp_path / "d", [8000], rows_a_group=20)
    alive, most = weakref.WeakSet(), []
    encode = Encoder.encode

    def tracked(*args):
        rows = encode(*args)
        alive.add(holder := Holder(rows))
        most.append(len(alive))
        return holder

    class Holder(Rows):
        """Rows that a WeakSet can hold: known by identity, not by value."""

        __hash__ = object.__hash__
        __eq__ = object.__eq__

        def __init__(self, rows):
            self.__dict__.update(vars(rows))

    monkeypatch.setattr(Encoder, "encode", tracked)
    assert sum(b.rows for b in reader(paths)) == 8000
    assert len(most) >= 400
    # The eight kept ones, and one being replaced.
    assert max(most) <= 9


MEMORY_PROBE = """
import resource, sys
import test_reader
from pathlib import Path
folder, files = Path(sys.argv[1]), int(sys.argv[2])
paths = tuple(str(folder / f"part-{n:03d}.parquet") for n in range(files))
data = test_reader.dataclasses.replace(test_reader.DATA, shuffle_rows=8192)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = sum(b.rows for b in test_reader.reader(paths, data, batch_size=1024))
print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_rows(tmp_path):
    write(tmp_path / "d", [90_000] * 10, rows_a_group=10_000)
    dataset = pq.read_table(tmp_path / "d").nbytes / 2**20
    grown = {}
    for files in (1, 10):
        words = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path / "d"), str(files)]
        out = subprocess.run(
            words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.split()
        assert int(out[0]) == 90_000 * files
        grown[files] = float(out[1])
    assert grown[10] - grown[1] < 0.5 * dataset, (grown, dataset)


def test_prefetch_is_bounded(tmp_path):
    """A consumer that stops taking stops the reader: it never runs ahead through the data set."""
    paths = write(tmp_path / "d", [4000], rows_a_group=100)
    made = []
    source = reader(paths)
    produce = source._batches

    def counted():
        for batch in produce():
            made.append(batch.rows)
            yield batch

    source._batches = counted
    batches = iter(source)
    next(batches)
    time.sleep(0.3)
    # One handed out, `prefetch` waiting, one in the producer's hand.
    assert len(made) <= 1 + DATA.prefetch + 1
    batches.close()
