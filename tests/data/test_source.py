"""Which files a path means, over which filesystem, and what is said of files that are not data."""

import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from c2al.config import DataConfig, DenseFeature, SparseFeature
from c2al.data import source
from c2al.data.schema import check_columns, check_inputs
from c2al.data.source import open_dataset
from c2al.errors import DataError

TABLE = pa.table(
    {
        "row_id": [1, 2, 3],
        "user_id": [1, 2, 2],
        "label": pa.array([0, 1, 0], pa.int8()),
        "x": [0.5, 1.5, 2.5],
        "s": ["a", "b", "a"],
    }
)


@pytest.fixture
def folder(tmp_path):
    for name in ("b.parquet", "a.parquet", "deep/er/c.parquet", "_hidden.parquet", ".tmp/d.parquet", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(TABLE, tmp_path / name, row_group_size=2)
    return tmp_path


def found(folder, *paths):
    return [os.path.relpath(f.name, folder) for f in open_dataset(paths)]


def test_folders_files_and_patterns(folder):
    every = ["a.parquet", "b.parquet", "deep/er/c.parquet"]
    assert found(folder, str(folder)) == every
    assert found(folder, f"{folder}/b.parquet") == ["b.parquet"]
    assert found(folder, f"{folder}/*.parquet") == ["_hidden.parquet", "a.parquet", "b.parquet"]
    assert found(folder, f"{folder}/d*/*/c*") == ["deep/er/c.parquet"]
    assert found(folder, f"{folder}/b.parquet", str(folder)) == every
    assert found(folder, folder.as_uri()) == every
    assert found(folder, f"{folder.as_uri()}/a*.parquet") == ["a.parquet"]


def test_relative_paths(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [f.name for f in open_dataset(["deep"])] == ["deep/er/c.parquet"]
    assert [f.name for f in open_dataset(["a*.parquet"])] == ["a.parquet"]


def test_an_empty_path_is_not_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert open_dataset(["."])
    with pytest.raises(DataError, match="'': an empty path"):
        open_dataset(["a.parquet", ""])


def test_row_groups_and_columns(folder):
    (file,) = open_dataset([f"{folder}/a.parquet"])
    assert file.row_group_rows == (2, 1)
    assert file.read(1, ["x", "row_id"]).to_pydict() == {"x": [2.5], "row_id": [3]}
    assert file.read(0, ["s"], dictionary=["s"])["s"].type == pa.dictionary(pa.int32(), pa.string())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("*.orc", r"\*\.orc: no Parquet file there"),
        ("empty", "empty: no Parquet file there"),
        ("notes.txt", "notes.txt: not a whole Parquet file"),
    ],
)
def test_paths_without_data(folder, path, message):
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("not Parquet")
    with pytest.raises(DataError, match=message):
        open_dataset([f"{folder}/{path}"])


def test_no_path_and_no_rows(tmp_path):
    with pytest.raises(DataError, match="no path is configured"):
        open_dataset([])
    pq.write_table(TABLE.slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}: 1 Parquet file(s) hold 0 rows")):
        open_dataset([str(tmp_path)])


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_file_is_named(folder, kept):
    file = folder / "b.parquet"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(DataError, match=r"b\.parquet: not a whole Parquet file"):
        open_dataset([str(folder)])


def test_credentials_are_not_shown():
    with pytest.raises(DataError, match=r"^xyz://\*\*\*@bucket/a: cannot be listed"):
        open_dataset(["xyz://key:secret@bucket/a"])


def test_unknown_scheme():
    with pytest.raises(DataError, match=r"xyz://bucket/a: cannot be listed"):
        open_dataset(["xyz://bucket/a"])


DENSE = DenseFeature(column="x", transforms=())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "lable"}, r"a\.parquet: no column 'lable'; needed is 0 or 1 .*; did you mean 'label'\?"),
        ({"label": "zzz"}, r"no column 'zzz'; needed is 0 or 1 .*; there are '.*'"),
        ({"label": "s"}, r"column 's' has type string, needed is 0 or 1 as a number \(the label, data\.label\)"),
        ({"weight": "s"}, r"column 's' has type string, needed is a number \(weight\)"),
        ({"dense": (DenseFeature(column="s"),)}, r"column 's' has type string, needed is a number \(dense feature\)"),
        (
            {"sparse": (SparseFeature(column="x", num_embeddings=9),)},
            r"column 'x' has type double, needed is integer or string or a list of them \(sparse feature 'x', encoding",
        ),
        (
            {"sparse": (SparseFeature(column="s", encoding="identity", num_embeddings=9),)},
            r"column 's' has type string, needed is integer or a list",
        ),
        (
            {"sparse": (SparseFeature(column="s", encoding="bucketise", edges=(1.0,)),)},
            r"column 's' has type string, needed is a number \(sparse feature 's', encoding 'bucketise'\)",
        ),
    ],
)
def test_columns_that_are_missing_or_of_another_type(folder, changes, message):
    files = open_dataset([f"{folder}/a.parquet"])
    with pytest.raises(DataError, match=message):
        check_columns(files, DataConfig(**{"dense": (DENSE,), **changes}))


def test_carried_columns_have_one_type_in_all_files(folder):
    pq.write_table(TABLE.set_column(0, "row_id", pa.array(["1", "2", "3"])), folder / "b.parquet")
    files = open_dataset([f"{folder}/a.parquet", f"{folder}/b.parquet"])
    check_inputs(files, DataConfig(dense=(DENSE,)))
    with pytest.raises(DataError, match=r"b\.parquet: column 'row_id' has type string, but int64 in .*a\.parquet"):
        check_inputs(files, DataConfig(dense=(DENSE,)), ["row_id"])
    with pytest.raises(DataError, match=r"a\.parquet: no column 'rowid'"):
        check_inputs(files, DataConfig(dense=(DENSE,)), ["rowid"])


def test_object_store(folder):
    """The same calls over S3, against moto's server in this process."""
    server_module = pytest.importorskip("moto.server", reason="moto's server is not installed")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = f"?scheme=http&endpoint_override={host}%3A{port}&region=us-east-1&allow_bucket_creation=true"
        s3, _ = pafs.FileSystem.from_uri(f"s3://key:secret@bucket/{options}")
        s3.create_dir("bucket")
        for name in ("a", "b"):
            pq.write_table(TABLE, f"bucket/day/{name}.parquet", filesystem=s3)
        files = open_dataset([f"s3://key:secret@bucket/day{options}"])
        assert [f.name for f in files] == ["s3://bucket/day/a.parquet", "s3://bucket/day/b.parquet"]
        assert files[1].read(0, ["row_id"])["row_id"].to_pylist() == [1, 2, 3]
        assert [f.name for f in open_dataset([f"s3://key:secret@bucket/*/b.parquet{options}"])] == [
            "s3://bucket/day/b.parquet"
        ]
    finally:
        server.stop()


def written(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"row_id": [1, 2], "user_id": [1, 2], "label": [0, 1], "x": [0.5, 1.5], **columns}), path)
    return path


@pytest.mark.parametrize("name", ["a[1]b", "it's", "what?", "day{1,2}", "ünï", "a b"])
def test_names_with_any_character_are_found_by_folder_file_and_pattern(tmp_path, name):
    written(tmp_path / name / "x" / f"{name}.parquet")
    expected = [f"{name}/x/{name}.parquet"]
    for path in (name, expected[0], f"{name}/*/*.parquet", f"{name}/**/*.parquet", f"*/x/{name}.parquet", "**"):
        assert found(tmp_path, f"{tmp_path}/{path}") == expected, path


def test_two_stars_stand_for_folders_at_any_depth(tmp_path):
    every = ["a.parquet", "x/b.parquet", "x/y/c.parquet"]
    for name in (*every, "_old/d.parquet", "x/.tmp/e.parquet"):
        written(tmp_path / name)
    assert found(tmp_path, f"{tmp_path}/**/*.parquet") == every
    assert found(tmp_path, f"{tmp_path}/**") == every
    assert found(tmp_path, f"{tmp_path}/x/**/c.parquet") == ["x/y/c.parquet"]
    assert found(tmp_path, f"{tmp_path}/*/y") == ["x/y/c.parquet"]


def test_a_file_named_like_a_pattern_is_taken_as_it_is(tmp_path):
    written(tmp_path / "a*.parquet")
    written(tmp_path / "ab.parquet")
    assert found(tmp_path, f"{tmp_path}/a*.parquet") == ["a*.parquet"]


@pytest.mark.parametrize("name", ["part-0.parq", "part-00000", "data.PARQUET"])
def test_a_parquet_file_of_another_ending_is_read(tmp_path, name):
    written(tmp_path / name)
    (tmp_path / "README.md").write_text("about the data")
    assert found(tmp_path, str(tmp_path)) == [name]


@pytest.mark.parametrize("name", ["data.parquet.gz", "part-0.csv", "part-0", "x/part-0.orc"])
def test_a_file_that_may_be_data_in_another_form_is_refused_not_passed_over(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"" if name == "part-0" else b"\x1f\x8babc")
    with pytest.raises(DataError, match=rf"{name}: not a Parquet file \(it begins with b'"):
        open_dataset([str(folder)])


def test_partition_folders_are_columns(tmp_path):
    for day, hour, country in (("2024-01-01", "00", "de"), ("2024-01-02", "13", "__HIVE_DEFAULT_PARTITION__")):
        written(tmp_path / f"day={day}" / f"hour={hour}" / f"country={country}" / "part.parquet")
    files = open_dataset([str(tmp_path)])
    data = DataConfig(
        dense=(DENSE, DenseFeature(column="hour", transforms=())),
        sparse=(SparseFeature(column="day", num_embeddings=9),),
    )
    check_columns(files, data, ["country"])
    table = files[1].read(0, ["hour", "x", "day", "country"], dictionary=["day"])
    assert table.to_pydict() == {"hour": [13] * 2, "x": [0.5, 1.5], "day": ["2024-01-02"] * 2, "country": [None] * 2}
    written(tmp_path / "day=2024-01-03" / "part.parquet", day=["own", "own"])
    assert open_dataset([f"{tmp_path}/day=2024-01-03"])[0].read(0, ["day"]).to_pydict() == {"day": ["own", "own"]}


def test_text_that_is_not_utf_8_is_named(tmp_path):
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff"))
    (file,) = open_dataset([str(written(tmp_path / "a.parquet", s=bad))])
    for dictionary in ([], ["s"]):
        with pytest.raises(DataError, match=r"a\.parquet, row group 0: column 's' cannot be decoded: .*UTF8"):
            file.read(0, ["s"], dictionary)


def test_a_damaged_index_of_a_dictionary_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"s": ["aa", "bb", "cc"] * 1000}), path, compression="none")
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    damaged = bytearray(path.read_bytes())
    damaged[chunk.dictionary_page_offset + chunk.total_compressed_size - 1] |= 0b11000000  # the last row's index: 3
    path.write_bytes(damaged)
    for dictionary in ([], ["s"]):
        with pytest.raises(DataError, match=r"a\.parquet, row group 0: .*cannot be decoded: "):
            open_dataset([str(path)])[0].read(0, ["s"], dictionary)


@pytest.mark.parametrize(
    ("column", "read"),
    [
        (pa.array(["a", None], pa.string_view()), pa.string()),
        (pa.array([["a"], None], pa.list_(pa.string_view())), pa.list_(pa.string())),
        (pa.array([[1, 2], None], pa.list_view(pa.int64())), pa.list_(pa.int64())),
        (pa.array([5, None]).dictionary_encode(), pa.int64()),
    ],
    ids=["string_view", "list of string_view", "list_view", "dictionary of integers"],
)
def test_layouts_of_other_writers_are_read_as_the_plain_type(tmp_path, column, read):
    (file,) = open_dataset([str(written(tmp_path / "a.parquet", c=column))])
    assert file.schema.field("c").type == read
    assert file.read(0, ["c"])["c"].type == read
    assert file.read(0, ["c"])["c"].to_pylist() == column.to_pylist()


@pytest.mark.parametrize("encoding", ["hash", "vocabulary"])
def test_a_column_of_two_kinds_in_two_files_is_refused_for_every_encoding(tmp_path, encoding):
    written(tmp_path / "a.parquet", s=[1, 2])
    written(tmp_path / "b.parquet", s=["1", "2"])
    data = DataConfig(sparse=(SparseFeature(column="s", encoding=encoding, num_embeddings=9),))
    for check in (check_columns, check_inputs):
        with pytest.raises(DataError, match=r"b\.parquet: column 's' has type string, but int64 in .*a\.parquet"):
            check(open_dataset([str(tmp_path)]), data)


def test_ids_of_another_type_than_in_training_are_refused(tmp_path):
    files = open_dataset([str(written(tmp_path / "a.parquet", s=["1", "2"]))])
    data = DataConfig(sparse=(SparseFeature(column="s", num_embeddings=9),))
    with pytest.raises(DataError, match=r"a\.parquet: column 's' has type string, but .* of type integer"):
        check_inputs(files, data, (), {"s": "integer"})
    check_inputs(files, data, (), {"s": "text"})


def test_a_list_without_max_length_is_refused(tmp_path):
    files = open_dataset([str(written(tmp_path / "a.parquet", l=[[1, 2], [3]]))])
    with pytest.raises(
        DataError, match=r"column 'l' has type list.*, needed is one integer or string per row.*max_len"
    ):
        check_inputs(files, DataConfig(sparse=(SparseFeature(column="l", num_embeddings=9),)))
    check_inputs(files, DataConfig(sparse=(SparseFeature(column="l", num_embeddings=9, max_length=1),)))


def test_a_column_that_is_there_twice_is_named(tmp_path):
    table = pa.table({"row_id": [1], "user_id": [1], "label": [1], "x": [0.5]})
    pq.write_table(table.append_column("x", table["x"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column 'x' is there 2 times$"):
        check_columns(open_dataset([str(tmp_path)]), DataConfig(dense=(DENSE,)))


@pytest.mark.parametrize(
    ("column", "values", "needed"),
    [
        ("row_id", ["a", "b"], "an integer"),
        ("row_id", [1.0, 2.0], "an integer"),
        ("user_id", [1.0, 2.0], "an integer or a string"),
    ],
)
def test_ids_that_only_later_jobs_read_are_checked_by_the_first(tmp_path, column, values, needed):
    files = open_dataset([str(written(tmp_path / "a.parquet", **{column: values}))])
    with pytest.raises(DataError, match=rf"column '{column}' has type .*, needed is {needed} \(data\.{column}\)"):
        check_columns(files, DataConfig(dense=(DENSE,)))


def test_a_missing_label_says_what_is_needed(tmp_path):
    pq.write_table(pa.table({"row_id": [1], "user_id": [1], "x": [0.5]}), tmp_path / "a.parquet")
    files = open_dataset([str(tmp_path)])
    with pytest.raises(DataError, match=r"no column 'label'; needed is 0 or 1 as a number \(the label, data\.label\)"):
        check_columns(files, DataConfig(dense=(DENSE,)))
    check_columns(files, DataConfig(dense=(DENSE,)), labelled=False)


def test_a_footer_is_parsed_once_for_all_its_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": range(50)}), path, row_group_size=5)
    (file,) = open_dataset([str(path)])
    before = source._parsed.cache_info().misses
    assert [file.read(g, ["x"])["x"][0].as_py() for g in range(10)] == list(range(0, 50, 5))
    assert source._parsed.cache_info().misses == before + 1


def test_a_file_that_was_replaced_is_read_by_its_own_footer(tmp_path):
    path = tmp_path / "a.parquet"
    for first in (0, 100):
        pq.write_table(pa.table({"x": range(first, first + 3), f"c{first}": ["abc"] * 3}), path)
        (file,) = open_dataset([str(path)])
        assert file.read(0, ["x", f"c{first}"]).to_pydict() == {
            "x": list(range(first, first + 3)),
            f"c{first}": ["abc"] * 3,
        }


def test_a_footer_longer_than_what_is_read_at_once(tmp_path):
    names = [f"column_{i}_{'x' * 100}" for i in range(1000)]
    pq.write_table(pa.table({n: [i] for i, n in enumerate(names)}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size > 2 * source.TAIL_BYTES
    assert open_dataset([str(tmp_path)])[0].read(0, names[-1:]).to_pydict() == {names[-1]: [999]}


def test_a_long_footer_is_read_once_for_all_its_row_groups(tmp_path):
    """Its bytes grow with the row groups, so reading it for each of them is quadratic."""
    names = [f"column_{i}_{'x' * 100}" for i in range(300)]
    path = tmp_path / "a.parquet"
    for first in (0, 100):  # the second replaces the first
        pq.write_table(pa.table({n: range(first, first + 10) for n in names}), path, row_group_size=1)
        assert path.stat().st_size > 2 * source.TAIL_BYTES
        (file,) = open_dataset([str(path)])
        before = source._parsed.cache_info().misses
        assert [file.read(g, names[-1:])[0][0].as_py() for g in range(10)] == list(range(first, first + 10))
        assert source._parsed.cache_info().misses == before + 1


def test_files_that_are_alike_at_their_ends_are_read_each_by_its_own_footer(tmp_path):
    """Of one size; in one of their first row groups one misses a value of x and the other one of y."""
    for missing in "xy":
        values = {name: [i if i != 7 or name != missing else None for i in range(5000)] for name in "xy"}
        pq.write_table(pa.table(values), tmp_path / f"{missing}.parquet", row_group_size=5)
    written = [(tmp_path / f"{name}.parquet").read_bytes() for name in "xy"]
    assert len(written[0]) == len(written[1])
    assert written[0][-source.TAIL_BYTES :] == written[1][-source.TAIL_BYTES :]
    for file, missing in zip(open_dataset([str(tmp_path)]), "xy", strict=True):
        for name in "xy":
            assert file.read(1, [name])[0].to_pylist() == [5, 6, None if name == missing else 7, 8, 9]
