"""Content identity: a changed input file is seen and named, an unchanged one is the same."""

import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2al.data import identity
from c2al.data.identity import FileIdentity, differences, identify
from c2al.data.source import open_dataset
from c2al.state import read_state, write_state


def write(path, labels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"label": pa.array(labels, pa.int8()), "x": np.arange(len(labels))}), path, **options)


def labels_of(seed, rows=4000):
    return np.random.default_rng(seed).permutation(np.arange(rows) % 2)


def changes(tmp_path, change):
    path = tmp_path / "data" / "part.parquet"
    write(path, labels_of(0), row_group_size=1000)
    before = identify(open_dataset([str(path.parent)]))
    change(path)
    return differences(before, identify(open_dataset([str(path.parent)])))


def test_a_copied_or_touched_file_is_the_same(tmp_path):
    def touch(path):
        shutil.copy(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
        os.utime(path, (1, 1))

    assert changes(tmp_path, touch) == []


@pytest.mark.parametrize("whole_bytes", [1 << 20, 0], ids=["small file", "larger file"])
def test_shuffled_labels_of_equal_size_and_statistics_are_seen(tmp_path, monkeypatch, whole_bytes):
    monkeypatch.setattr(identity, "WHOLE_BYTES", whole_bytes)
    path = tmp_path / "part.parquet"
    write(path, labels_of(0), row_group_size=1000, compression="none", use_dictionary=False)
    before = identify(open_dataset([str(path)]))
    write(path, labels_of(1), row_group_size=1000, compression="none", use_dictionary=False)
    now = identify(open_dataset([str(path)]))
    # The footer alone does not tell: that is the case this test is about.
    assert (before[0].size, before[0].footer_sha256) == (now[0].size, now[0].footer_sha256)
    assert differences(before, now) == [f"{path}: has the same size and other content (its data pages differ)"]


def test_a_changed_value_row_group_or_row_count_is_named(tmp_path):
    def other_rows(path):
        write(path, labels_of(0, 3999), row_group_size=1000)

    def other_groups(path):
        write(path, labels_of(0), row_group_size=2000)

    def other_values(path):
        write(path, np.zeros(4000), row_group_size=1000)

    assert "had 4,000 rows, has 3,999" in changes(tmp_path / "a", other_rows)[0]
    assert "in other row groups (4 before, 2 now)" in changes(tmp_path / "b", other_groups)[0]
    assert str(tmp_path / "c/data/part.parquet") in changes(tmp_path / "c", other_values)[0]


def test_a_file_gone_and_a_file_new_are_named(tmp_path):
    def rename(path):
        path.rename(path.with_name("other.parquet"))

    folder = tmp_path / "data"
    assert changes(tmp_path, rename) == [
        f"{folder / 'part.parquet'}: is not there any more",
        f"{folder / 'other.parquet'}: was not there before",
    ]


def test_an_identity_is_stored_and_read_back_equal(tmp_path):
    write(tmp_path / "a.parquet", labels_of(0))
    (found,) = identify(open_dataset([str(tmp_path)]))
    write_state(tmp_path / "identity.json", found, format="c2al.test", version=1)
    assert read_state(tmp_path / "identity.json", FileIdentity, format="c2al.test", version=1) == found
