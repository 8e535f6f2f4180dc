"""Cohort numbers against Python dictionaries, value by value."""

import numpy as np
import pyarrow as pa
import pytest

from c2al.discovery.digits import Categories, Intervals
from c2al.discovery.numbering import Numbering
from c2al.errors import CohortError


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


def test_the_cap_names_the_axis():
    encoder = Categories("c", "item")
    with pytest.raises(CohortError, match=r"'item' has more than 4 cohorts.*max_cohorts"):
        Numbering([encoder], "item", 4)([encoder(pa.array([1, 2, 3, 4, None]))])


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
