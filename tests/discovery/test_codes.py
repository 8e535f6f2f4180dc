"""Encoders against Python dictionaries, value by value."""

import numpy as np
import pyarrow as pa
import pytest

from c2al.discovery.codes import Categories, Intervals, Numbering, user_groups
from c2al.discovery.histogram import GROUPS
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


def numbers_of(numbering, encoders, arrays):
    codes = numbering([encoder(array) for encoder, array in zip(encoders, arrays, strict=True)])
    return [numbering.keys[number] for number in codes.tolist()]


@pytest.mark.parametrize("entries", [3, 200])  # few are their own digits, many are looked up
def test_dictionaries_are_mapped_by_value_not_by_code(entries):
    more = [f"more{i}" for i in range(entries)]  # entries that no row has are no cohorts and do not count for the cap
    encoder = Categories("c", "axis")
    numbering = Numbering([encoder], "axis", 3)
    columns = [(["x", "y", *more], [0, 1, 1]), (["y", *more, "x"], [0, entries + 1, None]), (["x"], [0])]
    for dictionary, codes in columns:
        block = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int16()), pa.array(dictionary))
        assert numbers_of(numbering, [encoder], [block]) == [(v,) for v in block.to_pylist()]
    assert numbering.keys == [("x",), ("y",), (None,)]


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


def test_the_cap_names_the_axis():
    encoder = Categories("c", "item")
    with pytest.raises(CohortError, match=r"'item' has more than 4 cohorts.*max_cohorts"):
        Numbering([encoder], "item", 4)([encoder(pa.array([1, 2, 3, 4, None]))])


@pytest.mark.parametrize("array", [pa.array([0.5]), pa.array([b"x"]), pa.array([[1]])])
def test_a_column_without_categories_is_refused(array):
    with pytest.raises(CohortError, match=r"'c' is .*needs integers, strings or bools"):
        Categories("c", "axis")(array)


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.int16()])
def test_intervals_are_closed_below_and_open_above(kind):
    encoder = Intervals((-1, 2, 5), "c", "axis")
    block = pa.array([-2, -1, 1, 2, 5, 6, None], kind)
    assert values_of(encoder, block) == [0, 1, 1, 2, 3, 3, None]


def test_not_a_number_is_missing_and_infinities_are_not():
    encoder = Intervals((0.0,), "c", "axis")
    block = pa.array([float("nan"), float("-inf"), float("inf"), -0.0])
    assert values_of(encoder, block) == [None, 0, 1, 1]
    with pytest.raises(CohortError, match="string"):
        encoder(pa.array(["a"]))


@pytest.mark.parametrize("most", [(2, 5, 3), (2, 90, 5), (2, 10**9, 4)])  # own digits; looked up; sorted
def test_a_cross_numbers_the_combinations_that_occur(most):
    rng = np.random.default_rng(0)
    encoders = [Categories("a", "a"), Categories("b", "b"), Intervals((0.5,), "c", "c")]
    numbering, seen = Numbering(encoders, "a x b x c", 99), {}
    for below in most:  # the tables grow on the way
        texts = [f"{i}" for i in rng.integers(0, below, 40)]
        blocks = [pa.array(rng.integers(0, below, 40)), pa.array(texts), pa.array(rng.random(40))]
        rows = list(zip(*(b.to_pylist() for b in blocks[:2]), np.array(blocks[2]) >= 0.5, strict=True))
        assert numbers_of(numbering, encoders, blocks) == rows
        for key in rows:
            assert seen.setdefault(key, numbering.keys.index(key)) == numbering.keys.index(key)
    assert len(numbering.keys) == len(seen)


def test_a_cross_has_a_cap_of_its_own():
    encoders = [Categories("a", "a"), Categories("b", "b")]
    with pytest.raises(CohortError, match="'a x b' has more than 3 cohorts"):
        numbers_of(Numbering(encoders, "a x b", 3), encoders, [pa.array([1, 2, 1, 2]), pa.array([1, 1, 2, 2])])


def test_more_combinations_than_a_table_can_hold_are_refused():
    encoders = [Categories(c, c) for c in "abc"]
    blocks = [pa.array(np.arange(1000) * 7) for _ in encoders]
    with pytest.raises(CohortError, match="'a x b x c' crosses 1001 x 1001 x 1001 values"):
        numbers_of(Numbering(encoders, "a x b x c", 5000), encoders, blocks)


def test_a_user_has_one_group_however_it_is_stored():
    ids = [7, 10**12, -3, 0, None, 7]
    reference = user_groups(pa.array(ids), "u").tolist()
    assert reference == user_groups(pa.array(ids).dictionary_encode(), "u").tolist()
    assert reference[1:] == user_groups(pa.array(ids).slice(1), "u").tolist()
    small = [7, 3, None]
    assert user_groups(pa.array(small, pa.int16()), "u").tolist() == user_groups(pa.array(small), "u").tolist()
    texts = ["user-1", "", None, "ü", "user-1"]
    reference = user_groups(pa.array(texts), "u").tolist()
    for array in (pa.array(texts, pa.large_string()), pa.array(texts).dictionary_encode(), pa.array(["x", *texts])[1:]):
        assert user_groups(array, "u").tolist() == reference


@pytest.mark.parametrize("users", [pa.array(range(64_000)), pa.array([f"u{i}" for i in range(64_000)])])
def test_groups_are_even(users):
    sizes = np.bincount(user_groups(users, "u"), minlength=GROUPS)
    assert len(sizes) == GROUPS
    expected = 64_000 / GROUPS
    # Chi-square with 31 degrees of freedom: above 70 once in 10,000 times.
    assert ((sizes - expected) ** 2 / expected).sum() < 70


def test_users_must_be_integers_or_text():
    with pytest.raises(DataError, match=r"'u'.*double"):
        user_groups(pa.array([0.5]), "u")
    with pytest.raises(DataError, match="'u'"):
        user_groups(pa.array([2**64 - 1], pa.uint64()), "u")
