"""Divergences against scipy on the same histograms, and against closed forms of two Beta laws."""

import numpy as np
import pytest
from planted import Planted, clustered
from scipy.spatial.distance import jensenshannon
from scipy.special import logit as scipy_logit
from scipy.stats import entropy, wasserstein_distance

from c2al.discovery.divergence import MEASURES, Comparison, cosine, js, kl, logit, pool, pooled_bins, wasserstein
from c2al.discovery.histogram import COARSE, GROUPS, coarse_edges, slot_edges

HEAD, TAIL = np.array([0]), np.array([1])


def histograms(seed):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(64, 0.3)), rng.dirichlet(np.full(64, 0.3))


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_scipy_on_the_same_histograms(seed):
    p, q = histograms(seed)
    position = np.sort(np.random.default_rng(seed).normal(size=64))
    assert js(p, q) == pytest.approx(jensenshannon(p, q) ** 2, rel=1e-9)
    assert kl(p, q) == pytest.approx(entropy(p, q), rel=1e-9)
    moved = wasserstein(np.cumsum(p), np.cumsum(q), position)
    assert moved == pytest.approx(wasserstein_distance(position, position, p, q), rel=1e-9)


def test_small_differences_keep_their_digits():
    p, _ = histograms(0)
    q = p * (1 + 1e-5 * np.cos(np.arange(64)))
    q /= q.sum()
    # Second order of the Jensen-Shannon divergence; a difference of entropies would lose it.
    assert js(p, q) == pytest.approx(((p - q) ** 2 / p).sum() / 8, rel=1e-4)


def test_disjoint_and_equal_histograms():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.0, 1.0])
    assert js(p, q) == pytest.approx(np.log(2))
    assert kl(p, q) == np.inf
    assert cosine(p, q, np.ones(3)) == 1
    assert [float(f) for f in (js(p, p), kl(p, p), cosine(p, p, np.ones(3)))] == pytest.approx([0, 0, 0], abs=1e-15)


def test_cosine_does_not_depend_on_how_a_bin_is_split():
    p, q, width = np.array([0.2, 0.8]), np.array([0.5, 0.5]), np.array([1.0, 3.0])
    split = [np.array([x[0] / 2, x[0] / 2, x[1] / 3, x[1] * 2 / 3]) for x in (p, q)]
    assert cosine(*split, np.array([0.5, 0.5, 1.0, 2.0])) == pytest.approx(cosine(p, q, width), rel=1e-12)


def test_pooled_bins_are_even_and_contiguous():
    rng = np.random.default_rng(0)
    total_K = np.zeros(COARSE, np.int64)
    total_K[100:300] = rng.integers(50, 150, 200)
    bin_K = pooled_bins(total_K)
    assert set(np.diff(bin_K)) == {0, 1}
    mass_B = pool(total_K[None], bin_K)[0]
    assert len(mass_B) == 64
    assert mass_B.sum() == total_K.sum()
    assert (mass_B > 0).all()
    assert mass_B.max() < 2 * total_K.sum() / 64
    # One slot with nearly all mass is one bin, and no bin is empty.
    total_K[200] = 10**9
    assert (pool(total_K[None], pooled_bins(total_K))[0] > 0).all()


@pytest.fixture(scope="module")
def beta_pair():
    """5M rows each of Beta(2, 48) and Beta(2, 98); scaled down in nothing."""
    planted, rng = Planted(), np.random.default_rng(0)
    for cohort, b in enumerate((48, 98)):
        for _ in range(5):
            planted.add(cohort, rng.beta(2, b, 1_000_000), rng.integers(0, 10**6, 1_000_000))
    return Comparison(planted.counts())


def test_closed_forms_at_five_million_rows(beta_pair):
    value = {m: beta_pair.estimate(HEAD, TAIL, m).value_P[0] for m in MEASURES}
    assert np.sqrt(value["js"]) == pytest.approx(np.sqrt(0.106849977), rel=4e-3)
    assert value["wasserstein"] == pytest.approx(0.02, rel=4e-3)
    assert value["wasserstein_logit"] == pytest.approx(0.719108584, rel=4e-3)
    # 64 bins of equal mass have coarse tails, where KL gets much of its value: 2 % below the closed form.
    assert value["kl_head_tail"] == pytest.approx(0.64500881, rel=3e-2)
    assert value["kl_tail_head"] == pytest.approx(0.401811433, rel=1e-2)
    assert value["kl"] == pytest.approx(value["kl_head_tail"] + value["kl_tail_head"], rel=1e-6)


def test_intervals_hold_the_closed_forms(beta_pair):
    truth = {"js": 0.106849977, "wasserstein": 0.02, "wasserstein_logit": 0.719108584}
    for measure, value in truth.items():
        estimate = beta_pair.estimate(HEAD, TAIL, measure)
        # The standard errors at 5M rows are of the order of the bins' own error, hence the 0.3 %.
        assert abs(estimate.value_P[0] - value) < 4 * estimate.error_P[0] + 3e-3 * value


def test_an_estimate_is_the_textbook_jackknife():
    counts = clustered(seed=3, users=400, cohorts=2)
    estimate = Comparison(counts).estimate(HEAD, TAIL, "js")
    bin_K = pooled_bins(counts.group_CGK.sum((0, 1)))

    def divergence(kept):
        p, q = (np.bincount(bin_K, weights=counts.group_CGK[c][kept].sum(0)) for c in (0, 1))
        return jensenshannon(p, q) ** 2

    everyone = np.arange(GROUPS)
    full = divergence(everyone)
    left_out = np.array([divergence(everyone != g) for g in everyone])
    bias = (GROUPS - 1) * (left_out.mean() - full)
    error = np.sqrt((GROUPS - 1) / GROUPS * ((left_out - left_out.mean()) ** 2).sum())
    assert estimate.value_P[0] == pytest.approx(full - bias, rel=1e-9)
    assert estimate.error_P[0] == pytest.approx(error, rel=1e-9)


def test_wasserstein_is_scipys_on_the_slots():
    counts = clustered(seed=4, users=300, cohorts=2)
    comparison = Comparison(counts)
    middle = np.append((slot_edges()[1:] + slot_edges()[:-1]) / 2, 1)
    middle[0] = 0
    masses = counts.fine_CS22[..., 0].sum(2)
    left_out = Comparison(type(counts)(counts.keys, counts.fine_CS22, counts.group_CGK[:, :0]))
    for measure, position in (("wasserstein", middle), ("wasserstein_logit", logit(middle))):
        plain = left_out.estimate(HEAD, TAIL, measure)
        expected = wasserstein_distance(position, position, masses[0], masses[1])
        assert plain.value_P[0] == pytest.approx(expected, rel=1e-9)
        assert np.isnan(plain.error_P[0])
        # Its error comes from the coarse slots and is a standard error of the same quantity.
        assert 0 < comparison.estimate(HEAD, TAIL, measure).error_P[0] < expected + 1


def test_a_cohort_in_one_user_group_has_no_error():
    rng = np.random.default_rng(0)
    planted = Planted().add(0, rng.beta(2, 48, 3000), rng.integers(0, 500, 3000))
    counts = planted.add(1, rng.beta(2, 98, 100), np.full(100, 7)).counts()
    for measure in MEASURES:
        assert np.isnan(Comparison(counts).estimate(HEAD, TAIL, measure).error_P[0])


def test_logit_is_bounded_at_the_ends():
    assert logit(np.array([0.3, 0.9])) == pytest.approx(scipy_logit([0.3, 0.9]))
    assert logit(np.array([0.0, 1.0])) == pytest.approx([scipy_logit(2.0**-25), scipy_logit(1 - 2.0**-25)])
    assert np.isfinite(logit(coarse_edges())).all()
