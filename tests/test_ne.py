"""Eq. 13 by hand, and where it is undefined."""

import math

import numpy as np
import pytest

from c2al.ne import normalized_entropy


def test_three_rows_by_hand():
    loss = math.log(2) + 2 * math.log(4 / 3)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert float(normalized_entropy(loss, 2, 1)) == pytest.approx(loss / 3 / entropy, rel=1e-14)


def test_the_base_rate_is_one_whatever_the_rate():
    positives, negatives = np.array([1.0, 5.0, 1e-9, 3e8]), np.array([1.0, 2.0, 1.0, 1.0])
    total = positives + negatives
    loss = -(positives * np.log(positives / total) + negatives * np.log(negatives / total))
    assert normalized_entropy(loss, positives, negatives) == pytest.approx(np.ones(4), rel=1e-12)


def test_undefined_is_nan_without_a_warning():
    with np.errstate(all="raise"):
        got = normalized_entropy([1.0, 1.0, 0.0, math.nan], [0.0, 2.0, 0.0, 1.0], [2.0, 0.0, 0.0, 1.0])
    assert np.isnan(got).all()


def test_arguments_broadcast():
    assert normalized_entropy(np.ones((3, 2)), np.ones(2), 1.0).shape == (3, 2)
    assert normalized_entropy(1.0, 1.0, 1.0).shape == ()
