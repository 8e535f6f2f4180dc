import dataclasses
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from c2al.evaluation.intervals import (
    EXCESS,
    SMALLEST_P,
    Spread,
    critical,
    exponent,
    rejection,
    spread,
)
from c2al.evaluation.power import POWER, power


def coverage_benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "interval_coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_variances_by_hand():
    """Two seeds, four replicates: the covariance of the seeds is the users' part, s^2 / 2 the seeds'."""
    replicate_SR = np.array([[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 4.0, 4.0]])
    found = spread(np.array([0.5, 1.5]), replicate_SR, users=31.0)
    # Deviations (-1.5, -.5, .5, 1.5) and (-1, -1, 1, 1): products 1.5 + .5 + .5 + 1.5 over n - 1 = 3.
    # The mean of the two deviates by (-1.25, -.75, .75, 1.25).
    assert found == Spread(1.0, pytest.approx(4 / 3), 0.25, 30.0, 1, pytest.approx(4.25 / 3))
    assert found.std == pytest.approx(math.sqrt(4 / 3 + 0.25))
    v_u, v_s = 4 / 3, 0.25
    assert found.df == pytest.approx((v_u + v_s) ** 2 / (v_u**2 / 30 + v_s**2 / 1))


def test_one_seed_is_the_users_bootstrap():
    replicate_SR = np.array([[1.0, 2.0, 3.0, 6.0]])
    found = spread(np.array([2.5]), replicate_SR, users=11.0)
    assert (found.users_variance, found.seeds_variance, found.seeds_df) == (pytest.approx(14 / 3), 0.0, 0)
    half = stats.t.ppf(0.975, 10) * math.sqrt(14 / 3)
    assert found.interval(0.95) == pytest.approx((2.5 - half, 2.5 + half))


def test_seeds_that_react_oppositely_to_users_do_not_make_the_variance_negative():
    found = spread(np.array([0.0, 2.0]), np.array([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]]), users=50.0)
    assert found.users_variance == 0.0
    assert found.share == 1.0


def test_the_decomposition_is_unbiased_and_counts_no_noise_twice():
    """var(mean) = var(u) + (var(a) + var(i)) / S, estimated from draws of known components, 2,000 of them."""
    rng, seeds, users = np.random.default_rng(0), 3, 60
    u, a, i = 1.0, 2.0, 3.0
    estimated, means, twice = [], [], []
    for _ in range(2000):
        effect_US = u * rng.normal(size=(users, 1)) + i * rng.normal(size=(users, seeds))
        value_US = effect_US * math.sqrt(users) + a * rng.normal(size=(1, seeds))
        weight_RU = rng.poisson(1.0, (100, users))
        replicate_SR = (weight_RU @ value_US / weight_RU.sum(axis=1, keepdims=True)).T
        found = spread(value_US.mean(axis=0), replicate_SR, users)
        estimated.append(found.users_variance + found.seeds_variance)
        twice.append(replicate_SR.mean(axis=0).var(ddof=1) + found.seeds_variance)
        means.append(found.value)
    true = u**2 + (a**2 + i**2) / seeds
    assert np.var(means) == pytest.approx(true, rel=0.1)  # the model itself: standard error sqrt(2 / 2000) = 3%
    assert np.mean(estimated) == pytest.approx(true, rel=0.1)
    assert np.mean(twice) > true + 0.7 * i**2 / seeds


def test_critical_value_at_its_two_ends_is_students():
    for seeds_df in (1, 2, 4, 7):
        assert critical(0.0, 300.0, seeds_df, 0.05) == pytest.approx(stats.t.ppf(0.975, 300))
        assert critical(1.0, 300.0, seeds_df, 0.05) == pytest.approx(stats.t.ppf(0.975, seeds_df))
    assert critical(0.0, 25.0, 0, 0.01) == pytest.approx(stats.t.ppf(0.995, 25))


@pytest.mark.parametrize("seeds_df", [1, 2, 4, 7])
@pytest.mark.parametrize("alpha", [0.1, 0.05, 0.01, 0.001])
def test_error_rate_is_near_the_nominal_one_whatever_the_ratio_of_variances(seeds_df: int, alpha: float):
    """By another integration than the product's: Gauss-Legendre over the chi-squared quantiles' logarithm."""
    node_Q, weight_Q = np.polynomial.legendre.leggauss(800)
    y_Q = 25 * (node_Q + 1)  # quantile exp(-y), y in [0, 50]
    ratio_Q = stats.chi2.ppf(np.exp(-y_Q), seeds_df) / seeds_df
    weight_Q = 25 * weight_Q * np.exp(-y_Q)
    a = exponent(seeds_df, alpha)
    for share in np.linspace(0.01, 0.999, 40):
        variance_Q = 1 - share + share * ratio_Q
        z, t = stats.norm.ppf(1 - alpha / 2), stats.t.ppf(1 - alpha / 2, seeds_df)
        c2_Q = z**2 + (t**2 - z**2) * (share * ratio_Q / variance_Q) ** a
        error = weight_Q @ (2 * stats.norm.sf(np.sqrt(c2_Q * variance_Q)))
        assert error <= 1.02 * EXCESS * alpha
        assert rejection(0.0, float(share), seeds_df, alpha, a) == pytest.approx(error, rel=0.02, abs=1e-6)
    if alpha == 0.05:
        exact = [1 - rejection(0.0, s, seeds_df, alpha, a) for s in np.linspace(0.01, 0.999, 40)]
        assert 0.93 <= min(exact) <= max(exact) <= 0.97


def test_plain_satterthwaite_would_claim_too_much_with_two_seeds():
    """Why it is not used: 2 seeds, 90% of the variance due to seeds, exact coverage about 87%."""
    q = stats.chi2.ppf((np.arange(20000) + 0.5) / 20000, 1)
    variance = 0.1 + 0.9 * q
    df = variance**2 / (0.9 * q) ** 2
    coverage = np.mean(1 - 2 * stats.norm.sf(stats.t.ppf(0.975, df) * np.sqrt(variance)))
    assert coverage < 0.89
    assert 1 - rejection(0.0, 0.9, 1, 0.05, exponent(1, 0.05)) > 0.93


@pytest.mark.parametrize(
    "found",
    [
        Spread(-0.003, 1e-6, 4e-7, 500.0, 1),
        Spread(0.02, 1e-6, 4e-5, 50.0, 7),
        Spread(-0.0018, 0.0, 1e-10, 300.0, 1, 1.7e-6),
    ],
)
def test_p_value_agrees_with_the_interval(found: Spread):
    p = found.p()
    assert 0 < p < 1
    just_wider, just_narrower = (found.interval(1 - p * x) for x in (1 - 1e-6, 1 + 1e-6))
    assert just_wider[0] <= 0 <= just_wider[1]
    assert not just_narrower[0] <= 0 <= just_narrower[1]


def test_p_value_of_students_t_where_there_is_one_source():
    assert Spread(2.0, 1.0, 0.0, 80.0, 0).p() == pytest.approx(2 * stats.t.sf(2.0, 80))
    assert Spread(3.0, 0.0, 1.0, 80.0, 4).p() == pytest.approx(2 * stats.t.sf(3.0, 4))


def test_identical_models():
    same, other = Spread(0.0, 0.0, 0.0, 80.0, 3), Spread(0.1, 0.0, 0.0, 80.0, 3)
    assert (same.p(), same.interval(0.95)) == (1.0, (0.0, 0.0))
    assert other.p() == SMALLEST_P


def test_two_seeds_no_longer_claim_what_two_seeds_cannot():
    """The demo that had said "+0.270%, interval over users above 0": its t-interval over seeds is +-1.7%."""
    per_seed = np.array([0.0027 - 0.0019, 0.0027 + 0.0019])
    replicate_SR = per_seed[:, None] + 0.0004 * np.random.default_rng(0).normal(size=1000)
    low, high = spread(per_seed, replicate_SR, users=900.0).interval(0.95)
    assert low < 0 < high
    users_only = np.quantile(replicate_SR.mean(axis=0), [0.025, 0.975])
    assert users_only[0] > 0


def test_seeds_that_agree_by_luck_claim_no_more_than_users_alone_allow():
    """Two seeds of -0.182% and -0.180%, each +-0.25% over users: "lower" with an interval of +-0.013% once."""
    per_seed = np.array([-0.001824, -0.001803])
    replicate_SR = per_seed[:, None] + 0.0025 * np.random.default_rng(0).normal(size=(2, 1000))
    found = spread(per_seed, replicate_SR, users=500.0)
    low, high = found.interval(0.95)
    half = stats.t.ppf(0.975, 499) * replicate_SR.mean(axis=0).std(ddof=1)
    assert (low, high) == pytest.approx((found.value - half, found.value + half))
    assert found.p() > 0.2
    seen = power(found, 500.0, 0.95).smallest
    assert seen > half, "what the users alone hide cannot be seen"


def test_smallest_difference_is_seen_with_the_power_it_states():
    """Draws designs with that true difference and counts how often the interval excludes 0."""
    design = Spread(0.0, 0.3, 0.7, 1e6, 4)
    stated = power(design, 500.0, 0.95)
    rng, seen, draws = np.random.default_rng(0), 0, 4000
    for _ in range(draws):
        seeds_variance = 0.7 * rng.chisquare(4) / 4
        seen += Spread(rng.normal(stated.smallest, 1.0), 0.3, seeds_variance, 1e6, 4).p() <= 0.05
    assert seen / draws == pytest.approx(POWER, abs=4 * math.sqrt(0.8 * 0.2 / draws))


def test_power_without_seed_noise_is_the_textbook_one():
    design = Spread(0.0, 0.0004**2, 0.0, 1e6, 0)
    stated = power(design, 1000.0, 0.95)
    assert stated.smallest == pytest.approx(0.0004 * (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)), rel=1e-3)
    assert stated.seeds_needed is None
    # The standard error must shrink to 0.1% / 2.80.
    assert stated.users_needed == pytest.approx(1000 * (0.0004 * 2.8016 / 0.001) ** 2, rel=1e-2)


def test_seeds_that_a_tenth_of_a_percent_needs():
    """SCIENCE: a pair over seeds has a standard deviation of .115%; about 11-13 pairs see .1%."""
    design = Spread(0.0, 1e-12, 0.00115**2 / 5, 1e5, 4)
    stated = power(design, 1e5, 0.95)
    n = stated.seeds_needed

    def seen(n: int) -> float:
        crit, shift = stats.t.ppf(0.975, n - 1), 0.001 / (0.00115 / math.sqrt(n))
        return stats.nct.sf(crit, n - 1, shift) + stats.nct.cdf(-crit, n - 1, shift)

    assert seen(n) >= POWER > seen(n - 1)
    assert stated.users_needed is None, "five seeds do not see it, however many users"


def test_users_alone_can_make_a_target_out_of_reach_for_any_number_of_seeds():
    stated = power(Spread(0.0, 0.001**2, 0.0001**2, 300.0, 3), 300.0, 0.95)
    assert stated.seeds_needed is None
    assert stated.users_needed > 300


def test_a_design_without_variance_states_no_power():
    assert power(Spread(0.0, 0.0, 0.0, 300.0, 3), 300.0, 0.95) is None


@pytest.mark.parametrize("seeds", [2, 5])
def test_coverage_smoke(seeds: int):
    """600 draws of a balanced design: standard error .9%. Leaving out the seeds would cover less than 93%."""
    benchmark = coverage_benchmark()
    regime = dataclasses.replace(benchmark.REGIMES["balanced"], share=0.7, users=150)
    methods = {name: benchmark.METHODS[name] for name in ("used", "users only (bootstrap)")}
    found = benchmark.simulate(regime, seeds, 600, seed=1, methods=methods)
    assert 0.925 <= found["used"].coverage <= 0.985
    assert found["users only (bootstrap)"].coverage < 0.925


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
@pytest.mark.parametrize("name", ["users alone", "users dominate", "balanced", "seeds dominate", "seeds alone"])
def test_nominal_95_percent_covers_93_to_97(name: str, seeds: int):
    """6,000 draws: standard error .3%. That band is of the interval without its floor, which only adds to it."""
    benchmark = coverage_benchmark()
    methods = {name: benchmark.METHODS[name] for name in ("used", "used, without its floor")}
    found = benchmark.simulate(benchmark.REGIMES[name], seeds, 6000, seed=7, methods=methods)
    assert 0.93 - 0.006 <= found["used, without its floor"].coverage <= 0.97 + 0.006
    assert found["used"].coverage >= found["used, without its floor"].coverage


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_hold_where_the_seeds_agree_as_well(seeds: int):
    """These draws can be told from the others, so the claim must hold in them alone. 4,000 draws, 5% or more agree."""
    benchmark = coverage_benchmark()
    methods = {name: benchmark.METHODS[name] for name in ("used", "used, without its floor")}
    regime = benchmark.REGIMES["seeds alone, all interaction"]
    found = benchmark.simulate(regime, seeds, 4000, seed=3, methods=methods)
    assert found["used"].agreeing > 0.05
    assert found["used"].agreeing_coverage >= 0.93
    assert found["used, without its floor"].agreeing_coverage < 0.9
