"""The choice: it finds a planted pair without a minimum size, and nothing where there is nothing."""

import numpy as np
import pytest
from planted import Planted, clustered
from scipy import stats

from c2al.config import DiscoverConfig
from c2al.discovery.select import choose, compare_axis, lower_bounds


def choice(counts, **settings):
    config = DiscoverConfig(**settings)
    pairs = compare_axis("axis", counts, config)
    return pairs, choose([pairs], config)


def chosen_cohorts(counts, **settings):
    pairs, found = choice(counts, **settings)
    if found.chosen is None:
        return None
    pair = found.chosen[1]
    return counts.keys[pairs.head_P[pair]][0], counts.keys[pairs.tail_P[pair]][0]


def noise_trap(largest):
    """60 cohorts of one law, from 300 rows to `largest`, and 100 and 101 of two others."""
    rng, planted = np.random.default_rng(0), Planted()
    sizes = np.geomspace(300, largest, 60).astype(int)
    for cohort, rows in [*enumerate(sizes), (100, 40_000), (101, 30_000)]:
        b = {100: 78, 101: 128}.get(cohort, 98)
        while rows:
            piece = min(rows, 1_000_000)
            planted.add(cohort, rng.beta(2, b, piece), rng.integers(0, 2**60, piece))
            rows -= piece
    return planted.counts()


@pytest.mark.parametrize(
    ("largest", "rules"),
    [
        (100_000, ["js", "kl", "cosine", "wasserstein", "wasserstein_logit"]),
        (5_000_000, ["js"]),
    ],
)
def test_the_noise_trap_yields_the_true_pair(largest, rules):
    counts = noise_trap(largest)
    for rule in rules:
        assert chosen_cohorts(counts, rule=rule) == (100, 101), rule
    # The trap is one: by the plain divergence a pair with the smallest cohorts would win.
    pairs, _ = choice(counts)
    p = counts.fine_CS22[..., 0].sum(2) / counts.fine_CS22[..., 0].sum((1, 2))[:, None]
    plain = stats.entropy((p[pairs.head_P] + p[pairs.tail_P]) / 2, axis=1)
    plain -= (stats.entropy(p[pairs.head_P], axis=1) + stats.entropy(p[pairs.tail_P], axis=1)) / 2
    assert counts.keys[pairs.tail_P[np.argmax(plain)]][0] < 10


@pytest.mark.parametrize("correction", ["bonferroni", "holm"])
def test_clustered_rows_without_a_difference_yield_nothing(correction):
    found = sum(
        chosen_cohorts(clustered(seed, users=2000, cohorts=8), correction=correction) is not None for seed in range(40)
    )
    assert found <= 2  # at least 95% of 40 seeds choose nothing


@pytest.mark.parametrize("rule", ["wasserstein", "wasserstein_logit", "kl", "cosine"])
def test_no_other_rule_is_fooled_by_clustered_rows(rule):
    found = sum(chosen_cohorts(clustered(seed, users=2000, cohorts=8), rule=rule) is not None for seed in range(40))
    assert found <= 2


def test_a_wasserstein_bound_that_js_does_not_confirm_says_so():
    """Seeds of the null on which the bound alone is above 0, as 5 to 8% are."""
    reasons = [choice(clustered(s, users=2000, cohorts=8), rule="wasserstein_logit")[1].reason for s in range(40)]
    assert any("is above 0, but js is not" in reason for reason in reasons)


def test_rows_taken_as_independent_would_be_fooled():
    """The same data with a user of its own for every row: the trap is real."""
    fooled = sum(chosen_cohorts(clustered(s, users=2000, cohorts=8, known=False)) is not None for s in range(10))
    assert fooled >= 9


def two(rows=(4000, 3000), seed=0):
    rng = np.random.default_rng(seed)
    planted = Planted()
    for cohort, (n, b) in enumerate(zip(rows, (48, 98), strict=True)):
        planted.add(cohort, rng.beta(2, b, n), rng.integers(0, 2**60, n))
    return planted.counts()


def test_head_has_more_rows():
    assert chosen_cohorts(two()) == (0, 1)
    assert chosen_cohorts(two(rows=(3000, 4000))) == (1, 0)
    assert chosen_cohorts(two(rows=(3000, 3000))) == (0, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_rows": 3500}, "3500 rows and 0 positives"),
        ({"min_positives": 1}, "0 rows and 1 positives"),
        ({"axes": ("other",)}, "may be chosen from"),
        ({"jackknife": False}, "jackknife"),
    ],
)
def test_no_choice_has_a_reason(settings, words):
    counts = two()
    if not settings.get("jackknife", True):
        counts = type(counts)(counts.keys, counts.fine_CS22, counts.group_CGK[:, :0])
    _, found = choice(counts, **settings)
    assert found.chosen is None
    assert words in found.reason


def test_minimum_sizes_are_inclusive():
    assert chosen_cohorts(two(), min_rows=3000) == (0, 1)


def test_one_cohort_and_one_group_of_users_have_no_pair():
    rng = np.random.default_rng(0)
    _, found = choice(Planted().add(0, rng.random(100), np.arange(100)).counts())
    assert (found.chosen, found.tested, found.reason) == (None, 0, "no axis has two cohorts")
    alone = Planted().add(0, rng.random(100), np.arange(100)).add(1, rng.random(100) / 2, np.full(100, 3)).counts()
    assert "users in two groups" in choice(alone)[1].reason


def test_bounds_of_both_corrections():
    value, error, freedom = np.array([3.0, 1.0, 2.2]), np.array([1.0, 1.0, 1.0]), np.array([31, 31, 5])
    bonferroni = [v - stats.t.ppf(1 - 0.05 / 3, f) for v, f in zip(value, freedom, strict=True)]
    assert lower_bounds(value, error, freedom, 0.05, "bonferroni") == pytest.approx(bonferroni)
    # p-values 0.0027, 0.16, 0.040: Holm rejects the first at 0.05 / 3, fails the third at 0.05 / 2.
    levels = [0.05 / 3, 0.05 / 2, 0.05 / 2]
    holm = [v - stats.t.ppf(1 - a, f) for v, a, f in zip(value, levels, freedom, strict=True)]
    assert lower_bounds(value, error, freedom, 0.05, "holm") == pytest.approx(holm)
    assert (np.array(holm) > 0).tolist() == [True, False, False]


def test_a_difference_without_noise_is_its_own_bound():
    assert lower_bounds(np.array([0.5, 0.0]), np.zeros(2), np.array([31, 31]), 0.05, "holm").tolist() == [0.5, 0.0]
