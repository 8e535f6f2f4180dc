"""Encoders against Python dictionaries, value by value."""

import numpy as np
import pyarrow as pa
import pytest

from c2al.discovery.codes import Categories, Cross, Intervals, user_groups
from c2al.discovery.histogram import GROUPS
from c2al.errors import CohortError, DataError


def values_of(encoder, array):
    return [encoder.keys[i][0] for i in encoder(array).tolist()]


@pytest.mark.parametrize(
    "blocks",
    [
        [pa.array([3, 1, None, 3], pa.int32()), pa.array([-7, None], pa.int32()), pa.array([1, 900], pa.int32())],
        [pa.array([10**15, 4, None]), pa.array([-(10**17), 4])],  # too far apart for a table
        [pa.array([5, 6]), pa.array([10**12, 6]), pa.array([7, 5])],  # from the table to beyond it and back
        [pa.array([255, 0, 3], pa.uint8()), pa.array([None, None], pa.uint8())],
        [pa.array([True, None, False]), pa.array([False, False])],
        [pa.array(["b", "a", None]), pa.array(["a", "ü", ""])],
        [pa.array(["b", "a", None], pa.large_string())],
        [pa.array([9, 8, 9]).dictionary_encode(), pa.array([8, None]).dictionary_encode()],
        [pa.array([], pa.int64()), pa.array([1])],
    ],
)
def test_every_value_keeps_its_number_over_blocks(blocks):
    encoder = Categories("c", "axis", 100)
    for block in blocks:
        assert values_of(encoder, block) == block.to_pylist()
    assert len(encoder.keys) == len({v for b in blocks for v in b.to_pylist()})


def test_dictionaries_are_mapped_by_value_not_by_code():
    encoder = Categories("c", "axis", 3)  # "unused" entries are no cohorts and do not count for the cap
    for dictionary, codes in [(["x", "y", "unused"], [0, 1, 1]), (["y", "x"], [0, 1, None]), (["unused2", "x"], [1])]:
        block = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int8()), pa.array(dictionary))
        assert values_of(encoder, block) == block.to_pylist()
    assert [k for (k,) in encoder.keys] == ["x", "y", None]


def test_sliced_blocks_count_their_own_rows():
    encoder = Categories("c", "axis", 9)
    array = pa.array(["a", None, "b", "a", None, "c"]).dictionary_encode()
    assert values_of(encoder, array.slice(2, 3)) == ["b", "a", None]


def test_the_cap_names_the_axis():
    with pytest.raises(CohortError, match=r"'item' has more than 4 cohorts.*max_cohorts"):
        Categories("c", "item", 4)(pa.array([1, 2, 3, 4, None]))


@pytest.mark.parametrize("array", [pa.array([0.5]), pa.array([b"x"]), pa.array([[1]])])
def test_a_column_without_categories_is_refused(array):
    with pytest.raises(CohortError, match=r"'c' is .*needs integers, strings or bools"):
        Categories("c", "axis", 9)(array)


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


def test_a_cross_numbers_the_combinations_that_occur():
    rng = np.random.default_rng(0)
    parts = [Categories("a", "a", 99), Categories("b", "b", 99), Intervals((0.5,), "c", "c")]
    cross, seen = Cross(parts, "a x b x c", 99), set()
    for most in (2, 5, 3):  # the tables grow on the way
        blocks = [pa.array(rng.integers(0, most, 40)), pa.array(rng.integers(0, most, 40)), pa.array(rng.random(40))]
        codes = cross([part(block) for part, block in zip(parts, blocks, strict=True)])
        rows = list(zip(blocks[0].to_pylist(), blocks[1].to_pylist(), np.array(blocks[2]) >= 0.5, strict=True))
        assert [cross.keys[i] for i in codes] == rows
        seen |= set(rows)
    assert len(cross.keys) == len(seen)


def test_a_cross_has_a_cap_of_its_own():
    parts = [Categories("a", "a", 9), Categories("b", "b", 9)]
    with pytest.raises(CohortError, match="'a x b' has more than 3 cohorts"):
        Cross(parts, "a x b", 3)([parts[0](pa.array([1, 2, 1, 2])), parts[1](pa.array([1, 1, 2, 2]))])


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
