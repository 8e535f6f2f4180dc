"""Which files a path means, over which filesystem, and what is said of files that are not data."""

import os
import re

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from c2al.config import DataConfig, DenseFeature, SparseFeature
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
        ({"label": "lable"}, r"a\.parquet: no column 'lable'; did you mean 'label'\?"),
        ({"label": "s"}, r"column 's' has type string, needed is 0 or 1 as a number \(label\)"),
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
