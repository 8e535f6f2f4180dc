"""Arrow columns -> embedding rows and dense values, against plain-Python formulas."""

import math
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2al.config import DataConfig, DenseFeature, SparseFeature
from c2al.data.encode import Encoder
from c2al.data.hashing import hash64, hashed_rows
from c2al.data.parquet import BatchReader
from c2al.data.statistics import Moments, Statistics, fit_statistics
from c2al.data.values import leaves
from c2al.errors import DataError

MASK = (1 << 64) - 1
GOLDEN_INTEGERS = [  # of the values in the test
    16294208416658607535,
    10451216379200822465,
    16490336266968443936,
    3055647633038352039,
    5196802822362493915,
]
GOLDEN_TEXTS = [1760245841805064774, 13950350942979735504, 9627328444727260652, 18342499151149537057]


def splitmix64(x):
    return finalise((x + 0x9E3779B97F4A7C15) & MASK)


def finalise(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def string_hash(text):
    return finalise(siphash24(text.encode(), b"0123456789123456"))


def siphash24(data, key):
    """SipHash-2-4 as in the paper (Aumasson and Bernstein 2012)."""

    def rotate(x, b):
        return ((x << b) | (x >> (64 - b))) & MASK

    def rounds(v, n):
        for _ in range(n):
            v[0] = (v[0] + v[1]) & MASK
            v[1] = rotate(v[1], 13) ^ v[0]
            v[0] = rotate(v[0], 32)
            v[2] = (v[2] + v[3]) & MASK
            v[3] = rotate(v[3], 16) ^ v[2]
            v[0] = (v[0] + v[3]) & MASK
            v[3] = rotate(v[3], 21) ^ v[0]
            v[2] = (v[2] + v[1]) & MASK
            v[1] = rotate(v[1], 17) ^ v[2]
            v[2] = rotate(v[2], 32)

    k0, k1 = struct.unpack("<QQ", key)
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]
    padded = data + b"\0" * (7 - len(data) % 8) + bytes([len(data) & 255])
    for (m,) in struct.iter_unpack("<Q", padded):
        v[3] ^= m
        rounds(v, 2)
        v[0] ^= m
    v[2] ^= 0xFF
    rounds(v, 4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def encode(column, feature, vocabularies=None, cut=slice(None)):
    """Bags of one feature, as lists, of a table that is a slice of a larger one."""
    data = DataConfig(sparse=(feature,))
    statistics = Statistics(moments={}, vocabularies=vocabularies or {})
    table = pa.table({"label": pa.array([0] * len(column), pa.int8()), feature.column: column})
    start, stop, _ = cut.indices(len(column))
    rows = Encoder(data, statistics, (), ()).encode(table.slice(start, stop - start), "f.parquet, row group 0")
    (jagged,) = rows.sparse
    ends = np.cumsum(jagged.lengths())
    return [bag.tolist() for bag in np.split(jagged.values_V, ends[:-1])]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64()])
def test_integers_hash_by_splitmix64_whatever_their_width(kind):
    values = [0, 1, -1, 127, -128, 5]
    assert hash64(pa.array(values, kind)).tolist() == [splitmix64(v & MASK) for v in values]


def test_unsigned_and_boolean_integers_hash_as_their_value():
    assert hash64(pa.array([0, MASK, 7], pa.uint64())).tolist() == [splitmix64(v) for v in (0, MASK, 7)]
    assert hash64(pa.array([True, False])).tolist() == [splitmix64(1), splitmix64(0)]


def test_the_oracle_is_siphash():
    assert siphash24(bytes(range(15)), bytes(range(16))) == 0xA129CA6149BE45E5, "the paper's test vector"


def test_strings_hash_by_siphash():
    values = ["", "a", "abcdefg", "abcdefgh", "zürich", "日本", "x" * 1000]
    assert hash64(pa.array(values)).tolist() == [string_hash(v) for v in values]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["b", None, "a", "b", "c"]),
        pa.array(["b", None, "a", "b", "c"], pa.large_string()),
        pa.array(["b", None, "a", "b", "c"]).dictionary_encode(),
    ],
    ids=["string", "large_string", "dictionary"],
)
def test_string_columns_of_any_layout_and_slice(column):
    feature = SparseFeature(column="s", num_embeddings=1000)
    expected = [[] if v is None else [string_hash(v) % 1000] for v in column.to_pylist()]
    assert encode(column, feature) == expected
    assert encode(column, feature, cut=slice(1, 4)) == expected[1:4]


LISTS = [[1, 2, 3], (), [], [4], [None, 5, None, 6, 7], [8, 9]]


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64())], ids=["list", "large_list"])
@pytest.mark.parametrize("max_length", [1, 2, 9])
def test_lists_are_cut_from_the_front_and_nulls_are_nothing(kind, max_length):
    feature = SparseFeature(column="l", encoding="identity", num_embeddings=10, max_length=max_length)
    expected = [[v for v in bag or [] if v is not None][:max_length] for bag in LISTS]
    column = pa.array(LISTS, kind)
    assert encode(column, feature) == expected
    for start in range(len(LISTS)):
        for stop in range(start + 1, len(LISTS) + 1):
            assert encode(column, feature, cut=slice(start, stop)) == expected[start:stop]


def test_a_null_list_that_spans_values_is_empty():
    column = pa.ListArray.from_arrays([0, 2, 4], pa.array([1, 2, 3, 4]), mask=pa.array([True, False]))
    assert column.to_pylist() == [None, [3, 4]]
    assert encode(column, SparseFeature(column="l", encoding="identity", num_embeddings=10, max_length=4)) == [
        [],
        [3, 4],
    ]


def test_fixed_size_lists_and_lists_of_strings():
    fixed = pa.array([[1, 2], [3, 4], None], pa.list_(pa.int64(), 2))
    identity = SparseFeature(column="l", encoding="identity", num_embeddings=10, max_length=2)
    assert encode(fixed, identity) == [[1, 2], [3, 4], []]
    assert encode(fixed, identity, cut=slice(1, 3)) == [[3, 4], []]
    words = [["a", "b"], (), ["b", None, "ü"]]
    hashed = SparseFeature(column="l", num_embeddings=97, max_length=2)
    expected = [[string_hash(w) % 97 for w in bag or [] if w] for bag in words]
    assert encode(pa.array(words), hashed) == expected


def test_all_null_and_empty_columns():
    feature = SparseFeature(column="s", num_embeddings=10, max_length=3)
    assert encode(pa.array([None, None], pa.string()), feature) == [[], []]
    assert encode(pa.array([None, None], pa.int64()), feature) == [[], []]
    assert encode(pa.array([None, []], pa.list_(pa.string())), feature) == [[], []]


def test_vocabulary_puts_the_unknown_in_row_0():
    feature = SparseFeature(column="s", encoding="vocabulary", num_embeddings=4)
    assert encode(pa.array(["c", "x", None, "a"]), feature, {"s": ("a", "b", "c")}) == [[3], [0], [], [1]]
    assert encode(pa.array([30, 10, 5], pa.int8()), feature, {"s": (10, 20, 300)}) == [[0], [1], [0]]
    with pytest.raises(DataError, match="column 's' has type string, but its values in training were of type integer"):
        encode(pa.array(["1"]), feature, {"s": (1, 2)})
    assert encode(pa.array([1]), feature, {"s": ()}) == [[0]]


def test_bucketise_counts_the_edges_at_or_below():
    edges = (-1.5, 0.0, 3.0)
    feature = SparseFeature(column="x", encoding="bucketise", edges=edges)
    values = [-2.0, -1.5, -0.1, 0.0, 2.9, 3.0, math.inf, -math.inf, None]
    expected = [[0] if v is None else [1 + sum(e <= v for e in edges)] for v in values]
    assert encode(pa.array(values), feature) == expected
    assert encode(pa.array([3, None, -2]), feature) == [[4], [0], [1]]


def dense(values, feature, moments=None):
    data = DataConfig(dense=(feature,))
    statistics = Statistics(moments={c: Moments(*m) for c, m in (moments or {}).items()}, vocabularies={})
    table = pa.table({"label": [0] * len(values), feature.column: values})
    return Encoder(data, statistics, (), ()).encode(table, "f.parquet, row group 3").dense_NF[:, 0].tolist()


def test_dense_transforms_in_order():
    log = DenseFeature(column="x", transforms=("log1p",))
    assert dense([0, 3, -3], log) == pytest.approx([0, math.log(4), -math.log(4)])
    both = DenseFeature(column="x", transforms=("log1p", "standardise"), null=3.0)
    assert dense([0, None], both, {"x": (1.0, 2.0)}) == pytest.approx([-0.5, (math.log(4) - 1) / 2])
    assert dense([7, 7], DenseFeature(column="x"), {"x": (7.0, 0.0)}) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, math.nan], r"f\.parquet, row group 3, row 1: column 'x' is nan, a dense value must be finite"),
        ([math.inf, 1.0], r"row group 3, row 0: column 'x' is inf"),
        ([1.0, None], r"row group 3, row 1: column 'x' is null and its feature declares no null value"),
        ([0.0, 1e300], r"row group 3, row 1: column 'x' after its transforms is 1e\+300, too large for float32"),
    ],
)
def test_dense_values_that_are_no_numbers(values, message):
    with pytest.raises(DataError, match=message):
        dense(values, DenseFeature(column="x", transforms=()))


@pytest.mark.parametrize(
    ("column", "row", "value"),
    [
        (pa.array([3, 10, 2]), 1, "10"),
        (pa.array([None, 3, -1]), 2, "-1"),
        (pa.array([[1, 2], (), [3], [4, 11, 12]]), 3, "11"),
        (pa.array([[None, 1], [], [None, -7]]), 2, "-7"),
    ],
    ids=["scalar", "after_null", "list", "list_after_null"],
)
def test_identity_out_of_range_names_the_row(column, row, value):
    feature = SparseFeature(column="i", encoding="identity", num_embeddings=10, max_length=3)
    with pytest.raises(DataError, match=rf"row group 0, row {row}: column 'i' is {value}, outside \[0, 10\)"):
        encode(column, feature)


def test_nan_lies_in_no_bucket():
    with pytest.raises(DataError, match="row 2: column 'x' is nan"):
        encode(pa.array([None, 1.0, math.nan]), SparseFeature(column="x", encoding="bucketise", edges=(0.0,)))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([0, 1, 2], r"row 2: column 'label' is 2, a label must be 0 or 1"),
        ([0.0, 0.5], r"row 1: column 'label' is 0\.5"),
        ([0.0, math.nan], r"row 1: column 'label' is nan"),
        ([None, 1], r"row 0: column 'label' is null"),
    ],
)
def test_labels_other_than_0_and_1(column, message):
    data = DataConfig(dense=(DenseFeature(column="x", transforms=()),))
    encoder = Encoder(data, Statistics(moments={}, vocabularies={}), (), ())
    with pytest.raises(DataError, match=message):
        encoder.encode(pa.table({"label": column, "x": [1] * len(column)}), "f")


@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf, None])
def test_weights_that_are_not_positive(value):
    data = DataConfig(dense=(DenseFeature(column="x", transforms=()),), weight="w")
    encoder = Encoder(data, Statistics(moments={}, vocabularies={}), (), ())
    shown = {None: "null"}.get(value, str(value))
    with pytest.raises(DataError, match=f"row 1: column 'w' is {shown}"):
        encoder.encode(pa.table({"label": [0, 1], "x": [1, 1], "w": [2.0, value]}), "f")


def statistics_of(tmp_path, data, *tables):
    for n, table in enumerate(tables):
        ids = pa.array(range(table.num_rows))
        table = table.append_column("row_id", ids).append_column("user_id", ids)
        pq.write_table(table, tmp_path / f"{n}.parquet", row_group_size=3)
    return fit_statistics((str(tmp_path),), data)


def test_moments_are_those_of_all_rows(tmp_path):
    rng = np.random.default_rng(0)
    x = 1e6 + rng.normal(size=50)
    data = DataConfig(
        dense=(DenseFeature(column="x"), DenseFeature(column="y", transforms=("log1p", "standardise"), null=2.0))
    )
    y = [None if i % 7 == 0 else float(i) for i in range(50)]
    table = pa.table({"label": [0] * 50, "x": x, "y": y})
    fitted = statistics_of(tmp_path, data, table.slice(0, 17), table.slice(17))
    # One part in 1e9 of a mean of 1e6 with deviation 1: what naive sums of squares lose.
    assert (fitted.moments["x"].mean, fitted.moments["x"].std) == pytest.approx((x.mean(), x.std()), rel=1e-9)
    logs = np.log1p([2.0 if v is None else v for v in y])
    assert (fitted.moments["y"].mean, fitted.moments["y"].std) == pytest.approx((logs.mean(), logs.std()), rel=1e-12)


def test_vocabulary_keeps_the_most_frequent(tmp_path):
    data = DataConfig(
        sparse=(
            SparseFeature(column="s", encoding="vocabulary", num_embeddings=3),
            SparseFeature(column="l", encoding="vocabulary", num_embeddings=4, max_length=2),
        )
    )
    table = pa.table({"label": [0] * 7, "s": [*"zzaabc", None], "l": [[9, 9, 1], (), [2, 2], [1], [3], [], [None]]})
    fitted = statistics_of(tmp_path, data, table.slice(0, 4), table.slice(4))
    assert fitted.vocabularies == {"s": ("a", "z"), "l": (1, 2, 9)}


def test_vocabulary_of_many_values_is_counted_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("c2al.data.statistics.VOCABULARY_SLACK", 4)
    data = DataConfig(sparse=(SparseFeature(column="s", encoding="vocabulary", num_embeddings=6),))
    values = [i % 11 for i in range(100)] + [3, 7, 7, 9, 10, 10, 10, 4]
    table = pa.table({"label": [0] * len(values), "s": values})
    by_count = sorted(set(values), key=lambda v: (-values.count(v), v))
    assert statistics_of(tmp_path, data, table).vocabularies["s"] == tuple(sorted(by_count[:5]))


def test_statistics_round_trip_and_refuse_anything_else():
    statistics = Statistics(
        moments={"x": Moments(0.1, 1 / 3)},
        vocabularies={"s": ("a", "bü"), "i": (-1, 2**62)},
        kinds={"s": "text", "i": "integer"},
    )
    assert Statistics.from_json(statistics.to_json()) == statistics
    for text in (
        "",
        "{}",
        "[]",
        statistics.to_json().replace('"version": 2', '"version": 1'),
        statistics.to_json().replace('"moments"', '"moment"'),
        statistics.to_json().replace("0.1", "NaN"),
        statistics.to_json().replace('"a"', '"z"'),
        statistics.to_json().replace('"a"', "1"),
    ):
        with pytest.raises(DataError, match=r"^stats\.json: "):
            Statistics.from_json(text, "stats.json")


def test_statistics_of_another_config_are_refused(tmp_path):
    pq.write_table(pa.table({"label": [0], "x": [1.0], "s": ["a"]}), tmp_path / "a.parquet")
    options = {"batch_size": 1, "rank": 0, "world_size": 1, "seed": 0, "shuffle": False, "shards": 1}
    for data, message in (
        (DataConfig(dense=(DenseFeature(column="x"),)), "no mean and deviation of dense feature 'x'"),
        (
            DataConfig(sparse=(SparseFeature(column="s", encoding="vocabulary", num_embeddings=3),)),
            "no vocabulary of .* 's'",
        ),
    ):
        with pytest.raises(DataError, match=message):
            BatchReader((str(tmp_path),), data, Statistics(moments={}, vocabularies={}), **options)


def test_the_hash_never_changes():
    """Golden values: a run trained with another version must find its embedding rows."""
    values = [0, 1, -1, 2**63 - 1, -(2**63)]
    assert hash64(pa.array(values)).tolist() == GOLDEN_INTEGERS
    assert hash64(pa.array(["", "a", "user-12345", "zürich"])).tolist() == GOLDEN_TEXTS


@pytest.mark.parametrize("length", range(18))
def test_text_of_every_length_hashes_by_siphash_in_every_layout(length):
    text = pa.array(["-", "äbcdefghijklmnopqr"[:length], "x"]).slice(1, 1)
    for column in (text, text.cast(pa.large_string()), text.cast(pa.string_view()), text.dictionary_encode()):
        assert hash64(column).tolist() == [string_hash(text[0].as_py())]


def test_integers_beyond_2_53_are_exact_or_refused_by_row():
    """Nanosecond times and unsigned ids: neither rounded silently nor a raw error of pyarrow."""
    big = 2**53 + 1
    buckets = SparseFeature(column="x", encoding="bucketise", edges=(float(2**53), float(2**53 + 2)))
    for values in ([big - 1, big, big + 1], [big - 1, None, big + 1]):
        expected = [[0] if v is None else [1 + sum(int(e) <= v for e in buckets.edges)] for v in values]
        assert encode(pa.array(values), buckets) == expected
    top = SparseFeature(column="x", encoding="bucketise", edges=(-1e30, 0.5, 1e30))
    assert encode(pa.array([2**64 - 1, 0, None], pa.uint64()), top) == [[3], [2], [0]]
    assert encode(pa.array([-(2**63), 1]), top) == [[2], [3]]

    assert dense([2**62, None, 5], DenseFeature(column="x", transforms=(), null=0.0)) == [2.0**62, 0.0, 5.0]
    assert dense(pa.array([2**64 - 1, None], pa.uint64()), DenseFeature(column="x", transforms=(), null=1.0)) == [
        2.0**64,
        1.0,
    ]

    ids = SparseFeature(column="x", encoding="vocabulary", num_embeddings=9, max_length=3)
    for column, row in (
        (pa.array([1, None, 2**63 + 5], pa.uint64()), 2),
        (pa.array([[1, 2], (), [], [3, None, 2**63 + 5]], pa.list_(pa.uint64())), 3),
    ):
        message = rf"row group 0, row {row}: column 'x' is 9223372036854775813, beyond int64; encoding 'hash' takes"
        with pytest.raises(DataError, match=message):
            encode(column, ids, {"x": (1, 2)})
        with pytest.raises(DataError, match=message):
            leaves(pa.chunked_array([column]), "x", "f.parquet, row group 0")


@pytest.mark.parametrize("value", [14.62, -0.1, 1e12, 1e-300])
def test_a_constant_column_enters_as_0_whatever_it_holds_later(tmp_path, value):
    """numpy's mean of equal values is off by a rounding error, so their deviation is not 0."""
    data = DataConfig(dense=(DenseFeature(column="x"),))
    values = np.full(101, value)
    fitted = statistics_of(tmp_path, data, *(pa.table({"label": [0] * 101, "x": values}) for _ in range(2)))
    assert fitted.moments["x"] == Moments(value, 0.0)
    assert dense([value, value * 2, 7.0], DenseFeature(column="x"), {"x": (value, 0.0)}) == [0.0, 0.0, 0.0]


def test_a_column_that_varies_in_its_last_bits_only_is_constant_and_a_narrow_one_is_not(tmp_path):
    data = DataConfig(dense=(DenseFeature(column="x"), DenseFeature(column="y")))
    table = pa.table({"label": [0] * 4, "x": [0.3, 0.1 + 0.2] * 2, "y": [1e6, 1e6 + 1e-6] * 2})
    fitted = statistics_of(tmp_path, data, table)
    assert fitted.moments["x"].std == 0.0
    assert fitted.moments["y"].std == pytest.approx(5e-7, rel=1e-2)


@pytest.mark.parametrize("rows", [2, 3, 1_000_000, 2**31 - 1, 2**32, 2**32 + 1, 2**33 + 7, 2**53 - 111, 2**63 - 25])
def test_an_embedding_row_is_the_hash_modulo_the_rows_of_its_table(rows):
    values = [*range(-300, 300), -(2**63), 2**63 - 1]
    assert hashed_rows(pa.array(values), rows).tolist() == [splitmix64(v & MASK) % rows for v in values]
    assert hashed_rows(pa.array([2**64 - 1], pa.uint64()), rows).tolist() == [splitmix64(MASK) % rows]
    assert hashed_rows(pa.array([], pa.int8()), rows).tolist() == []


def test_features_of_one_column_share_its_hash():
    column = pa.array(["a", None, "b", "a"])
    data = DataConfig(
        sparse=tuple(SparseFeature(column="s", name=f"s{n}", num_embeddings=n) for n in (7, 1000)),
    )
    table = pa.table({"label": pa.array([0] * 4, pa.int8()), "s": column})
    rows = Encoder(data, Statistics(moments={}, vocabularies={}), (), ()).encode(table, "f")
    for jagged, n in zip(rows.sparse, (7, 1000), strict=True):
        assert jagged.values_V.tolist() == [string_hash(v) % n for v in ("a", "b", "a")]
        assert jagged.lengths().tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user_id", [1, None], r"row 1: column 'user_id' is null"),
        ("row_id", [None, 1], r"row 0: column 'row_id' is null"),
        ("row_id", pa.array([1, 2**63], pa.uint64()), r"row 1: column 'row_id' is 9223372036854775808, a row id must"),
    ],
)
def test_ids_that_a_later_job_would_refuse_are_refused_when_read(column, values, message):
    data = DataConfig(dense=(DenseFeature(column="x", transforms=()),))
    table = pa.table({"label": [0, 1], "x": [1, 1], "row_id": [1, 2], "user_id": [1, 2]})
    table = table.set_column(table.schema.get_field_index(column), column, pa.array(values))
    encoder = Encoder(data, Statistics(moments={}, vocabularies={}), (), ("row_id", "user_id"))
    with pytest.raises(DataError, match=message):
        encoder.encode(table, "f")


def test_a_vocabulary_longer_than_its_table_is_refused():
    feature = SparseFeature(column="s", encoding="vocabulary", num_embeddings=3)
    with pytest.raises(DataError, match=r"the vocabulary of sparse feature 's' has 3 values, but its table of 3 rows"):
        encode(pa.array(["a"]), feature, {"s": ("a", "b", "c")})


@pytest.mark.parametrize(
    "change",
    [
        ('"mean": 0.1', '"mean": "0.1"'),
        ('"std"', '"deviation"'),
        (": 0.1", ": 1e999"),
        ("-1", "true"),
        ("-1", "1.5"),
        ("4611686018427387904", "1" + "0" * 5000),
        ('"kinds"', '"kind"'),
        ('"text"', '"float"'),
        ('"moments": {', '"moments": {"y": {"mean": 0, "std": -1},'),
        ('"moments": {', '"moments": ' + "[" * 100_000),
    ],
)
def test_damaged_statistics_are_refused_by_name(change):
    statistics = Statistics(
        moments={"x": Moments(0.1, 0.5)}, vocabularies={"i": (-1, 2**62), "s": ("a",)}, kinds={"s": "text"}
    )
    text = statistics.to_json()
    assert change[0] in text
    with pytest.raises(DataError, match=r"^stats\.json: "):
        Statistics.from_json(text.replace(*change, 1), "stats.json")
