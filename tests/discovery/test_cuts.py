"""Radix select against a plain sort."""

import numpy as np
import pytest

from c2al.discovery.cuts import PercentileCuts
from c2al.errors import CohortError

PERCENTILES = (0.0, 5.0, 25.0, 50.0, 75.0, 95.0, 100.0)


def select(values, percentiles=PERCENTILES, pieces=1, tolerance=0.05):
    cuts = PercentileCuts("activity", percentiles)
    for end in (cuts.narrow, lambda total: cuts.finish(total, tolerance)):
        total = cuts.histogram()
        for piece in np.array_split(np.asarray(values, np.float32), pieces):
            part = cuts.histogram()
            cuts.count(piece, part)
            total += part
        result = end(total)
    return result


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(size=10_001),
        np.random.default_rng(1).lognormal(sigma=9, size=5_000),  # over many exponents
        1.0 + np.random.default_rng(2).random(4_000) * 1e-5,  # all in one bucket of the top 16 bits
        np.arange(-50, 50),
    ],
)
def test_cuts_are_order_statistics(values, pieces):
    ordered = np.sort(np.asarray(values, np.float32))
    expected = [float(ordered[int(p) * len(ordered) // 100]) for p in PERCENTILES[1:-1]]
    assert np.asarray(select(values, pieces=pieces), np.float32).tolist() == expected


def test_missing_values_do_not_count_and_zeros_have_one_sign():
    values = np.r_[np.full(500, np.nan), np.full(50, -0.0), np.full(50, 0.0), np.arange(1, 101)]
    assert select(values, (0.0, 50.0, 100.0)) == (1.0,)


def test_fractional_percentiles_are_exact():
    # 0.1 % of 1,000 rows is row 1; in binary floating point 0.1 * 1000 / 100 is below 1 on some paths.
    assert select(np.arange(1000), (0.0, 0.1, 100.0)) == (1.0,)
    assert select(np.arange(1000), (0.0, 99.9, 100.0)) == (999.0,)


def test_ties_that_spoil_a_cut_are_an_error_with_the_true_share():
    values = np.r_[np.zeros(300), np.arange(1, 701)]
    with pytest.raises(CohortError, match=r"'activity'.*p0-p5 with 0\.0% of the values instead of 5\.0%"):
        select(values)
    # With 30% zeros, p0-p20 would be empty and p20-p50 hold half; a cut above the ties is fine.
    with pytest.raises(CohortError, match=r"p0-p20 with 0\.0%"):
        select(values, (0.0, 20.0, 50.0, 100.0))
    assert select(values, (0.0, 50.0, 100.0)) == (201.0,)
    # Below the tolerance the cohorts are accepted as they are.
    few = np.r_[np.zeros(30), np.full(40, 0.5), np.arange(1, 931)]
    assert select(few, (0.0, 5.0, 100.0)) == (0.5,)
    with pytest.raises(CohortError, match=r"p0-p5 with 3\.0%"):
        select(few, (0.0, 5.0, 100.0), tolerance=0.01)


def test_an_axis_without_values_is_an_error():
    with pytest.raises(CohortError, match="'activity': every value is null"):
        select([np.nan, np.nan])
