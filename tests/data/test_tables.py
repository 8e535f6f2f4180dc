"""What features of one table share, weighted bags, and the values that are too rare for a row of their own."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2al.config import DataConfig, SparseFeature, parse_config
from c2al.data.hashing import hash64
from c2al.data.parquet import BatchReader
from c2al.data.schema import check_columns
from c2al.data.source import open_dataset
from c2al.data.statistics import Statistics, fit_statistics, packed_rows, unpacked_rows
from c2al.errors import ConfigError, DataError


def write(path, **columns) -> str:
    rows = len(next(iter(columns.values())))
    fixed = {"label": pa.array([0] * rows, pa.int8()), "row_id": range(rows), "user_id": range(rows)}
    pq.write_table(pa.table({**fixed, **columns}), path, row_group_size=3)
    return str(path)


def bags(path: str, data: DataConfig, statistics: Statistics | None = None) -> dict[str, list]:
    """Feature -> per row its embedding rows, with their weights where its table has some."""
    fitted = statistics or fit_statistics([path], data)
    (batch,) = BatchReader([path], data, fitted, batch_size=8, rank=0, world_size=1, seed=0, shuffle=False, shards=1)
    found = {}
    for kjt in (batch.sparse, batch.weighted):
        for key in kjt.keys() if kjt is not None else ():
            values, weights = kjt[key].values().tolist(), kjt[key].weights_or_none()
            items = values if weights is None else list(zip(values, weights.tolist(), strict=True))
            ends = np.cumsum(kjt[key].lengths().tolist()).tolist()
            found[key] = [items[a:b] for a, b in zip([0, *ends], ends, strict=False)][: batch.rows]
    return found


def test_a_shared_vocabulary_is_fitted_over_all_its_columns(tmp_path):
    path = write(tmp_path / "a.parquet", item=[10, 20, 20, 30], seen=[[30, 40], [40], [], [10, 50]])
    item = SparseFeature(column="item", encoding="vocabulary", num_embeddings=5)
    seen = SparseFeature(column="seen", table="item", encoding="vocabulary", num_embeddings=5, max_length=2)
    data = DataConfig(sparse=(item, seen))
    fitted = fit_statistics([path], data)
    # 10, 20, 30 and 40 occur twice, 50 once: there is room for four.
    assert fitted.vocabularies == {"item": (10, 20, 30, 40)}
    assert bags(path, data) == {"item": [[1], [2], [2], [3]], "seen": [[3, 4], [4], [], [1, 0]]}
    assert Statistics.from_json(fitted.to_json()) == fitted


@pytest.mark.parametrize(
    ("sparse", "messages"),
    [
        (
            [
                {"column": "a", "num_embeddings": 4},
                {"column": "b", "table": "a", "num_embeddings": 5, "dim": 8, "encoding": "identity", "pooling": "mean"},
            ],
            [
                "features 'a' and 'b' share the table 'a' and must agree in num_embeddings, which is 4 and 5",
                "must agree in dim, which is 0 and 8",
                "must agree in encoding",
                "must agree in pooling",
            ],
        ),
        (
            [
                {"column": "c", "num_embeddings": 4, "weights": "x"},
                {"column": "d", "num_embeddings": 4, "dim": 6, "init": "normal", "min_count": -1, "table": "a.b"},
                {"column": "e", "num_embeddings": 4, "weights": "x", "pooling": "mean", "max_length": 2},
                {"column": "f", "encoding": "bucketise", "edges": [1.0], "min_count": 2},
            ],
            [
                "data.sparse[0].weights: needs a list-valued column",
                "data.sparse[1].dim",
                "data.sparse[1].init_scale: needed by init = 'normal'",
                "data.sparse[1].min_count",
                "data.sparse[1].table: 'a.b' has a dot",
                "data.sparse[2].weights: only with pooling = 'sum'",
                "data.sparse[3].min_count: does not go with",
            ],
        ),
        (
            [{"column": "a", "num_embeddings": 4, "weights": "label", "max_length": 2}],
            ["column 'label' is the label"],
        ),
    ],
)
def test_tables_that_contradict_themselves_are_refused(sparse, messages):
    with pytest.raises(ConfigError) as e:
        parse_config({"data": {"sparse": sparse}})
    for message in messages:
        assert message in str(e.value), message


def test_constraints_of_sharding_name_tables():
    sparse = [{"column": "a", "num_embeddings": 4}, {"column": "b", "num_embeddings": 4, "table": "a"}]
    tree = {"data": {"sparse": sparse}, "dist": {"tables": [{"name": "b"}]}}
    with pytest.raises(ConfigError, match=r"dist.tables\[0\].name: no embedding table is named 'b'"):
        parse_config(tree)
    tree["dist"]["tables"][0]["name"] = "a"
    parse_config(tree)


@pytest.mark.parametrize("encoding", ["hash", "vocabulary"])
def test_columns_of_one_table_must_hold_one_kind_of_value(tmp_path, encoding):
    path = write(tmp_path / "a.parquet", a=[1, 2], b=["1", "2"])
    kind = {"encoding": encoding, "num_embeddings": 8}
    data = DataConfig(sparse=(SparseFeature(column="a", **kind), SparseFeature(column="b", table="a", **kind)))
    with pytest.raises(DataError, match=r"a.parquet: columns 'a' and 'b' share the embedding table 'a', but are"):
        check_columns(open_dataset([path]), data)
    with pytest.raises(DataError, match="share the embedding table 'a'"):
        fit_statistics([path], data)


def weighted(**fields) -> DataConfig:
    base = {"column": "ids", "weights": "w", "encoding": "identity", "num_embeddings": 9, "max_length": 2}
    return DataConfig(
        sparse=(
            SparseFeature(**base | fields),
            SparseFeature(column="last", table="ids", encoding="identity", num_embeddings=9),
            SparseFeature(column="other", num_embeddings=4, encoding="identity"),
        )
    )


def test_weights_stay_with_their_values_whatever_is_null_or_cut(tmp_path):
    ids = pa.array([[1, 2, 3], [None, 4], None, [], [5, None, 6], [7], [8]], pa.list_(pa.int64()))
    w = pa.array([[0.5, -1, 9], [9, 2], None, [], [3, None, 4], [0.25], [8]], pa.list_(pa.float64()))
    # Read from the second row group on, whose arrays are slices of longer ones.
    path = write(tmp_path / "a.parquet", ids=ids, w=w, last=[0, 1, 2, 3, 4, 5, None], other=[0, 1, 2, 3, 0, 1, 2])
    found = bags(path, weighted())
    assert found["ids"] == [[(1, 0.5), (2, -1)], [(4, 2)], [], [], [(5, 3), (6, 4)], [(7, 0.25)], [(8, 8)]]
    assert found["last"] == [[(i, 1)] for i in range(6)] + [[]], "a feature without weights weighs 1"
    assert found["other"] == [[0], [1], [2], [3], [0], [1], [2]], "another table has no weights"


@pytest.mark.parametrize(
    ("w", "message"),
    [
        ([[1.0], [1.0], [1.0], [1.0, 2.0], []], r"row group 1, row 0: column 'ids' has 1 values, but 'w' 2 weights"),
        ([[1.0], [1.0], [1.0], [1.0], None], r"row group 1, row 1: column 'ids' has 2 values, but 'w' 0 weights"),
        ([[1.0], [1.0], [1.0], [1.0], [1.0, None]], r"row group 1, row 1: column 'w' holds None"),
        ([[1.0], [float("nan")], [1.0], [1.0], [1.0, 1.0]], r"row group 0, row 1: column 'w' holds nan"),
        ([[1.0], [1.0], [1e300], [1.0], [1.0, 1.0]], r"row group 0, row 2: column 'w' holds 1e\+300"),
        ([1.0, 1.0, 1.0, 1.0, 1.0], r"column 'w' has type double, needed is a list of numbers \(weights of sparse"),
        ([["a"], ["a"], ["a"], ["a"], ["a", "b"]], r"column 'w' has type list<.*string>, needed is a list of numbers"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_row(tmp_path, w, message):
    path = write(tmp_path / "a.parquet", ids=[[1], [2], [3], [4], [5, 6]], w=w, last=[0] * 5, other=[0] * 5)
    with pytest.raises(DataError, match=message):
        bags(path, weighted())


def test_a_weighted_column_must_be_a_list(tmp_path):
    path = write(tmp_path / "a.parquet", ids=[1, 2], w=[[1.0], [1.0]], last=[0, 0], other=[0, 0])
    with pytest.raises(DataError, match=r"column 'ids' has type int64, needed is a list .* since it has weights"):
        check_columns(open_dataset([path]), weighted())


def test_rare_values_of_a_vocabulary_share_row_0_with_the_unknown(tmp_path):
    path = write(tmp_path / "a.parquet", a=["x", "y", "x", "z", "y", "x"])
    data = DataConfig(sparse=(SparseFeature(column="a", encoding="vocabulary", num_embeddings=9, min_count=2),))
    assert fit_statistics([path], data).vocabularies == {"a": ("x", "y")}
    assert bags(path, data)["a"] == [[1], [2], [1], [0], [2], [1]]


@pytest.mark.parametrize("encoding", ["hash", "identity"])
def test_rare_rows_of_a_table_share_its_last_row(tmp_path, encoding):
    a, b = [1, 2, 1, 3, 4, 4], [[2], [5], [], [6, 6], [6], []]
    path = write(tmp_path / "a.parquet", a=a, b=b)
    size = 97 if encoding == "hash" else 7
    fields = {"encoding": encoding, "num_embeddings": size, "min_count": 2, "table": "t"}
    data = DataConfig(sparse=(SparseFeature(column="a", **fields), SparseFeature(column="b", max_length=1, **fields)))
    hashed = [int(h % 97) for h in hash64(pa.array(range(7)))]
    row = hashed if encoding == "hash" else list(range(7))
    assert len(set(row)) == 7
    # 1, 2, 4 and 6 occur at least twice over both columns.
    expected = {v: row[v] if v in (1, 2, 4, 6) else size for v in range(7)}
    found = bags(path, data)
    assert found == {"a": [[expected[v]] for v in a], "b": [[expected[v] for v in bag[:1]] for bag in b]}
    assert all(f.rows == size + 1 for f in data.sparse)
    # Any number of ranks counts the same.
    assert fit_statistics([path], data, parts=2) == fit_statistics([path], data)
    # And a value that training never held is rare, too.
    other = write(tmp_path / "b.parquet", a=[0], b=[[0]])
    assert bags(other, data, fit_statistics([path], data))["a"] == [[expected[0]]]


def test_statistics_of_other_counts_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", a=[1, 2])
    feature = {"column": "a", "encoding": "identity", "min_count": 2}
    few, many = (DataConfig(sparse=(SparseFeature(num_embeddings=n, **feature),)) for n in (4, 9))
    with pytest.raises(DataError, match="no admitted rows of the table 'a' for 9 embeddings"):
        bags(path, many, fit_statistics([path], few))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 1000])
def test_a_set_of_rows_survives_packing(rows):
    admitted = np.random.default_rng(rows).random(rows) < 0.3
    assert np.array_equal(unpacked_rows(packed_rows(admitted)), admitted)


DAMAGES = [lambda t: "9" + t, lambda t: t[:-8], lambda t: t + "AAAA", lambda t: "x", lambda t: "1:"]


@pytest.mark.parametrize("change", DAMAGES)
def test_a_damaged_set_of_rows_is_refused(change):
    fitted = Statistics(moments={}, vocabularies={}, admitted={"a": packed_rows(np.ones(100, np.bool_))})
    text = fitted.to_json().replace(fitted.admitted["a"], change(fitted.admitted["a"]))
    with pytest.raises(DataError, match=r"s.json: damaged: admitted.a: is no set of rows"):
        Statistics.from_json(text, "s.json")
