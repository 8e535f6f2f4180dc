"""Jackknife groups of users."""

import numpy as np
import pyarrow as pa
import pytest

from c2al.data.hashing import hash64
from c2al.discovery.histogram import GROUPS
from c2al.discovery.users import user_groups
from c2al.errors import DataError


def test_a_user_has_one_group_however_it_is_stored():
    ids = [7, 10**12, -3, 0, 7]
    reference = user_groups(pa.array(ids), "u").tolist()
    assert reference == user_groups(pa.array(ids).dictionary_encode(), "u").tolist()
    assert reference[1:] == user_groups(pa.array(ids).slice(1), "u").tolist()
    small = [7, 3]
    assert user_groups(pa.array(small, pa.int16()), "u").tolist() == user_groups(pa.array(small), "u").tolist()
    texts = ["user-1", "", "ü", "user-1"]
    reference = user_groups(pa.array(texts), "u").tolist()
    view = pa.array(texts, pa.string_view())
    for array in (
        view,
        pa.array(texts, pa.large_string()),
        pa.array(texts).dictionary_encode(),
        pa.array(["x", *texts])[1:],
    ):
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


def test_a_uint64_user_beyond_int64_is_a_user():
    ids = pa.array([2**64 - 1, 2**63, 7], pa.uint64())
    groups = user_groups(ids, "u")
    assert groups[2] == user_groups(pa.array([7]), "u")[0]
    assert (groups == user_groups(ids.dictionary_encode(), "u")).all()


def test_a_group_is_the_users_hash_that_the_bootstrap_takes_too():
    for ids in (pa.array([7, -3, 10**12]), pa.array(["a", "b"])):
        assert user_groups(ids, "u").tolist() == (hash64(ids) % np.uint64(GROUPS)).tolist()
