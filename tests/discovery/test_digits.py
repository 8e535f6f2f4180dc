"""Encoders against Python dictionaries, value by value."""

import numpy as np
import pyarrow as pa
import pytest

from c2al.discovery.digits import Categories, Intervals
from c2al.errors import CohortError, DataError


def values_of(encoder, array):
    return [encoder.category(digit) for digit in encoder(array).tolist()]


@pytest.mark.parametrize(
    "blocks",
    [
        [pa.array([3, 1, None, 3], pa.int32()), pa.array([-7, None], pa.int32()), pa.array([1, 900], pa.int32())],
        [pa.array([10**15, 4, None]), pa.array([-(10**17), 4])],  # too far apart for a table
        [pa.array([5, 6]), pa.array([10**12, 6]), pa.array([7, 5])],  # from the table to beyond it and back
        [pa.array([255, 0, 3], pa.uint8()), pa.array([None, None], pa.uint8())],
        [pa.array([-300, None]), pa.array([None, 7], pa.int8()), pa.array([-300, 7])],
        [pa.array(range(200)), pa.array([None, 199, 0])],
        [pa.array([True, None, False]), pa.array([False, False])],
        [pa.array(["b", "a", None]), pa.array(["a", "ü", ""])],
        [pa.array(["b", "a", None], pa.large_string())],
        [pa.array([9, 8, 9]).dictionary_encode(), pa.array([8, None]).dictionary_encode()],
        [pa.array([], pa.int64()), pa.array([1])],
    ],
)
def test_every_value_keeps_its_number_over_blocks(blocks):
    encoder = Categories("c", "axis")
    for block in blocks:
        assert values_of(encoder, block) == block.to_pylist()


def test_a_dictionary_may_hold_an_entry_twice():
    encoder = Categories("c", "axis")
    many = [f"more{i}" for i in range(200)]
    for dictionary, codes in [(["x", "x", "y"], [0, 1, 2]), (["z", *many], [0, 200, 7])]:
        block = pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(dictionary))
        assert values_of(encoder, block) == block.to_pylist()


def test_sliced_blocks_count_their_own_rows():
    encoder = Categories("c", "axis")
    array = pa.array(["a", None, "b", "a", None, "c"]).dictionary_encode()
    assert values_of(encoder, array.slice(2, 3)) == ["b", "a", None]


@pytest.mark.parametrize("array", [pa.array([0.5]), pa.array([b"x"]), pa.array([[1]])])
def test_a_column_without_categories_is_refused(array):
    with pytest.raises(CohortError, match=r"'c' is .*needs integers, strings or bools"):
        Categories("c", "axis")(array)


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.int16()])
def test_intervals_are_closed_below_and_open_above(kind):
    encoder = Intervals((-1, 2, 5), "c", "axis")
    block = pa.array([-2, -1, 1, 2, 5, 6, None], kind)
    assert values_of(encoder, block) == [0, 1, 1, 2, 3, 3, None]


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.uint32(), pa.uint64()])
@pytest.mark.parametrize("nulls", [[], [None]])
def test_integers_that_are_no_float32_are_cut_where_they_are(kind, nulls):
    """Rounded to the nearest float32, 2^25 + 3 would reach the cut at 2^25 + 4."""
    cuts = (2**25 + 4, 2**30)
    values = [0, 2**25 - 1, 2**25, 2**25 + 3, 2**25 + 4, 2**25 + 5, 2**30 - 1, 2**30, 2**30 + 1]
    if kind in (pa.int64(), pa.uint64()):
        cuts = (*cuts, 2**53, 2**60)
        values += [2**53 - 1, 2**53, 2**53 + 1, 2**60 - 1, 2**60 + 1]
    values += [np.iinfo(kind.to_pandas_dtype()).min, np.iinfo(kind.to_pandas_dtype()).max]
    expected = [sum(v >= cut for cut in cuts) for v in values]
    assert values_of(Intervals(cuts, "c", "axis"), pa.array(values + nulls, kind)) == expected + nulls


def test_not_a_number_is_missing_and_infinities_are_not():
    encoder = Intervals((0.0,), "c", "axis")
    block = pa.array([float("nan"), float("-inf"), float("inf"), -0.0])
    assert values_of(encoder, block) == [None, 0, 1, 1]
    with pytest.raises(CohortError, match="string"):
        encoder(pa.array(["a"]))


def test_string_view_is_text():
    encoder = Categories("c", "axis")
    for block in [pa.array(["b", "a", None], pa.string_view()), pa.array(["a", "c"], pa.string_view())]:
        assert values_of(encoder, block) == block.to_pylist()


@pytest.mark.parametrize("entries", [2, 200])
def test_an_entry_of_a_dictionary_may_be_null(entries):
    dictionary = pa.array(["x", None, *(f"more{i}" for i in range(entries))])
    block = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2]), dictionary)
    assert values_of(Categories("c", "axis"), block) == ["x", None, None, "more0"]


def test_an_integer_beyond_int64_is_named():
    with pytest.raises(DataError, match=r"axis 'axis': column 'c' holds 18446744073709551615, .*int64"):
        Categories("c", "axis")(pa.array([1, None, 2**64 - 1], pa.uint64()))


def test_a_string_that_is_not_utf8_is_named():
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe")]
    )
    with pytest.raises(DataError, match=r"axis 'axis': column 'c' holds a string that is not UTF-8"):
        Categories("c", "axis")(bad)
