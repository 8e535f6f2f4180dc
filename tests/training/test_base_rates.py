"""Base rates of the tasks: counted as weighted rows, the same on any number of ranks."""

import dataclasses

import numpy as np
import pytest

import ranks
from c2al.config import parse_config
from c2al.data.cohorts import read_cohorts
from c2al.distributed.process import process_group
from c2al.errors import CohortError, DataError, StateError
from c2al.training.base_rates import BaseRates, Count, count_base_rates
from impressions import tree, write_cohorts, write_impressions

ROWS = 403
RNG = np.random.default_rng(0)
LABEL = (RNG.random(ROWS) < 0.3).astype(np.int8)
SURFACE = RNG.choice(["feed", "search", "story"], ROWS)
WEIGHT = RNG.uniform(0.1, 3.0, ROWS)


@pytest.fixture
def case(tmp_path):
    write_impressions(tmp_path / "train", ROWS, label=LABEL, surface=SURFACE, w=WEIGHT)
    plain = tree(tmp_path)
    plain["data"] |= {"weight": "w", "train": [str(tmp_path / "train")]}
    return parse_config(plain), read_cohorts(write_cohorts(tmp_path / "cohorts.json")).chosen()


def counted(config, cohorts) -> BaseRates:
    with process_group(config.dist) as world:
        return count_base_rates(config, cohorts, world)


def test_counts_are_weighted_sums_by_hand(case):
    rates = counted(*case)
    w = WEIGHT.astype(np.float32).astype(np.float64)
    for count, member in zip(
        (rates.all, *rates.cohorts), (np.full(ROWS, True), SURFACE == "feed", SURFACE == "story"), strict=True
    ):
        assert count.rows == member.sum()
        assert count.weight == pytest.approx(w[member].sum(), rel=1e-12)
        assert count.positives == pytest.approx((w * LABEL)[member].sum(), rel=1e-12)
    feed, story = ((w * LABEL)[s == SURFACE].sum() / w.sum() for s in ("feed", "story"))
    assert rates.rates("label") == pytest.approx(((w * LABEL).sum() / w.sum(), feed, story))
    assert rates.rates("membership")[1:] == pytest.approx(
        tuple(w[s == SURFACE].sum() / w.sum() for s in ("feed", "story"))
    )


def test_a_baseline_has_the_rate_of_the_label_alone(case):
    assert len(counted(case[0], ()).rates("label")) == 1


def test_rates_of_nothing_and_everything_have_finite_log_odds():
    def rates(positives):
        return BaseRates(all=Count(rows=50, weight=100.0, positives=positives), cohorts=()).rates("label")

    assert rates(0.0) == (0.01,)
    assert rates(100.0) == (0.99,)


def count_on_ranks(config, cohorts) -> BaseRates:
    with process_group(config.dist) as world:
        return count_base_rates(config, cohorts, world)


def test_ranks_count_the_same_bit_for_bit(case):
    """Four row groups over three ranks: one rank has two of them."""
    config, cohorts = case
    assert ranks.run_ranks(count_on_ranks, 3, config, cohorts) == [counted(config, cohorts)] * 3


def test_what_is_read_is_what_was_written_and_a_damaged_file_is_named(case, tmp_path):
    rates = counted(*case)
    rates.write(tmp_path / "base_rates.json")
    assert BaseRates.read(tmp_path / "base_rates.json") == rates
    (tmp_path / "base_rates.json").write_text('{"format": "c2al.base_rates", "version": 1, "all": 3, "cohorts": []}')
    with pytest.raises(StateError, match=r"base_rates\.json: damaged: all"):
        BaseRates.read(tmp_path / "base_rates.json")


def test_a_value_that_is_no_label_is_named(case, tmp_path):
    config, cohorts = case
    bad = LABEL.copy()
    bad[102] = 2
    write_impressions(tmp_path / "bad", ROWS, label=bad, surface=SURFACE, w=WEIGHT)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=(str(tmp_path / "bad"),)))
    with pytest.raises(DataError, match=r"part-0.parquet, row group 1, row 2: column 'label' is 2"):
        counted(config, cohorts)


def test_every_cohort_without_positives_is_named(case):
    config, (head, tail) = case
    none = dataclasses.replace(tail, conditions=(dataclasses.replace(tail.conditions[0], equals="nowhere"),), name="no")
    with pytest.raises(CohortError, match=r"the tail cohort surface = no has no rows in data\.train"):
        counted(config, (head, none))
