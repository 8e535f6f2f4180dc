"""Intervals that cover users and seeds: the mean over S paired seeds, all scored on the same users.

Letters: S seeds, R bootstrap replicates.

**The model.** The estimate of seed s is d_s = delta + u + a_s + i_s. u is the error that the sample of
users gives to every seed alike, a_s is what the training seed does, i_s is how that seed's models meet
these users. The mean over seeds has variance var(u) + (var(a) + var(i)) / S.

**Two estimates without overlap.** The sample variance s^2 of d_1 .. d_S over seeds holds a and i but not
u, since all seeds share it: E s^2 = var(a) + var(i). A bootstrap over users, with the same weights for all
seeds, gives replicates of d_1 .. d_S together. Their covariance between two seeds is var(u): it holds
neither a nor i. So V = V_u + V_s, with V_u the mean covariance between seeds and V_s = s^2 / S, is an
unbiased estimate. Adding the bootstrap variance of the mean to s^2 / S instead counts i twice.

**The critical value.** V_s has S - 1 degrees of freedom, V_u about as many as there are effective users.
Satterthwaite's t is too short where seeds dominate and are few (2 seeds: a nominal 95% covers down to
87%). Howe's (1974) critical value, c^2 = t_u^2 (1 - r) + t_s^2 r with r = V_s / V and t_u, t_s the two t
quantiles, never covers too little but up to 98.7%. We take c^2 = t_u^2 + (t_s^2 - t_u^2) r^a with the
largest a in [1, 2] whose error rate is at most EXCESS times the nominal one for every ratio of the two
variances. The error rate is computed by numerical integration, not by simulation; ``rejection`` does it.
benchmarks/interval_coverage.py then shows the coverage by simulation, beside the methods that were tried.

**The floor.** Few seeds may agree by luck, and s^2 is then far below what the bootstrap knows: seeds held fixed, the
mean varies over users by V_b = V_u + var(i) / S. Over all draws the interval above covers as it should; in the draws
where the seeds agree it does not, and they can be told. So no interval is narrower, and no p-value smaller, than
users alone give it. The price is coverage beyond 97% where few seeds differ by i alone.

Sources: Howe, "Two-sided tolerance limits and approximate confidence limits on sums of mean squares",
JASA 69 (1974); Satterthwaite, Biometrics Bulletin 2 (1946).
"""

import dataclasses
import functools
import math

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Float = NDArray[np.float64]
Pair = tuple[float, float]

EXCESS = 1.35
"""Most that the error rate may exceed alpha by, as a factor, in the worst ratio of the variances. At 2 seeds
and 95% the coverage without the floor then lies in [93.2%, 97.0%]; a factor of 1 gives Howe's interval, up to
98.7%."""
SMALLEST_P = 1e-12
"""p-values below this are not told apart."""
_NODES = 400
_RATIOS = np.array([0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.999])
"""True shares V_s / V that `exponent` guards."""
_LEVELS = np.geomspace(1e-7, 0.5, 18)
"""alphas at which exponents are computed; those between are interpolated."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """A mean over seeds and its two variances."""

    value: float
    users_variance: float
    """V_u, of the part that all seeds share."""
    seeds_variance: float
    """V_s = s^2 / S; 0 with one seed, which says nothing about others."""
    users_df: float
    seeds_df: int
    """S - 1."""
    resampled_variance: float = 0.0
    """V_b, of the mean over users alone, with the seeds held fixed: V_u and the part of the seeds that is i."""

    @property
    def std(self) -> float:
        """Combined standard error."""
        return math.sqrt(self.users_variance + self.seeds_variance)

    @property
    def share(self) -> float:
        """r: share of the variance that comes from seeds."""
        total = self.users_variance + self.seeds_variance
        return self.seeds_variance / total if total else 0.0

    @property
    def df(self) -> float:
        """Satterthwaite's degrees of freedom of the combined variance."""
        r = self.share
        return 1 / ((1 - r) ** 2 / self.users_df + (r**2 / self.seeds_df if self.seeds_df else 0.0))

    def interval(self, confidence: float) -> Pair:
        half = critical(self.share, self.users_df, self.seeds_df, 1 - confidence) * self.std
        floor = critical(0.0, self.users_df, 0, 1 - confidence) * math.sqrt(self.resampled_variance)
        half = max(half, floor)
        return self.value - half, self.value + half

    def p(self) -> float:
        """Two-sided p-value of 0: the smallest 1 - confidence whose interval excludes 0."""
        if not self.resampled_variance:
            return self._combined_p()
        reached = abs(self.value) / math.sqrt(self.resampled_variance)
        return max(self._combined_p(), 2 * float(special.stdtr(self.users_df, -reached)))

    def _combined_p(self) -> float:
        """That of the interval without its floor."""
        if not self.std:
            return 1.0 if self.value == 0 else SMALLEST_P
        reached = abs(self.value) / self.std

        def beyond(log_alpha: float) -> float:
            return critical(self.share, self.users_df, self.seeds_df, math.exp(log_alpha)) - reached

        low, high = math.log(SMALLEST_P), math.log1p(-1e-9)
        if beyond(low) <= 0:
            return SMALLEST_P
        return 1.0 if beyond(high) >= 0 else math.exp(optimize.brentq(beyond, low, high, xtol=1e-12))


def spread(value_S: Float, replicate_SR: Float, users: float) -> Spread:
    """The mean of `value_S` and its variances; `replicate_SR` are finite bootstrap values with shared weights.

    users: effective number of users.
    """
    seeds = len(value_S)
    covariance_SS = np.atleast_2d(np.cov(replicate_SR))
    if seeds == 1:
        users_variance, seeds_variance = float(covariance_SS[0, 0]), 0.0
    else:
        between = (covariance_SS.sum() - covariance_SS.trace()) / (seeds * (seeds - 1))
        # An estimate of a covariance may be negative where the true one is about 0.
        users_variance = max(float(between), 0.0)
        seeds_variance = float(value_S.var(ddof=1)) / seeds
    resampled = float(covariance_SS.mean())
    return Spread(float(value_S.mean()), users_variance, seeds_variance, max(users - 1, 1.0), seeds - 1, resampled)


def critical(share: float, users_df: float, seeds_df: int, alpha: float) -> float:
    """Half width of the two-sided (1 - alpha) interval in standard errors; see the head of this file."""
    users_t = float(special.stdtrit(users_df, 1 - alpha / 2))
    if not seeds_df:
        return users_t
    seeds_t = float(special.stdtrit(seeds_df, 1 - alpha / 2))
    a = float(np.interp(math.log(alpha), np.log(_LEVELS), _exponents(seeds_df)))
    # With fewer users than seeds the users' quantile is the larger one; the formula holds as it stands.
    return math.sqrt(users_t**2 + (seeds_t**2 - users_t**2) * share**a)


def rejection(shift: float, share: float, seeds_df: int, alpha: float, a: float) -> float:
    """Probability that the interval excludes 0 when the true value is `shift` true standard errors.

    share: the true V_s / V. The users' variance is taken as known. shift = 0 gives the error rate.
    Integrates over the chi-squared distribution of V_s.
    """
    ratio_Q, weight_Q = _quadrature(seeds_df)
    variance_Q = (1 - share) + share * ratio_Q
    z = float(special.ndtri(1 - alpha / 2))
    t = float(special.stdtrit(seeds_df, 1 - alpha / 2))
    bound_Q = np.sqrt((z * z + (t * t - z * z) * (share * ratio_Q / variance_Q) ** a) * variance_Q)
    return float(weight_Q @ (special.ndtr(shift - bound_Q) + special.ndtr(-shift - bound_Q)))


@functools.lru_cache(maxsize=4096)
def exponent(seeds_df: int, alpha: float) -> float:
    """The largest a in [1, 2] whose error rate is at most EXCESS * alpha for every share."""

    def excess(a: float) -> float:
        return max(rejection(0.0, share, seeds_df, alpha, a) for share in _RATIOS) - EXCESS * alpha

    if excess(2.0) <= 0:
        return 2.0
    return 1.0 if excess(1.0) >= 0 else float(optimize.brentq(excess, 1.0, 2.0, xtol=1e-3))


@functools.lru_cache(maxsize=256)
def _exponents(seeds_df: int) -> Float:
    return np.array([exponent(seeds_df, float(alpha)) for alpha in _LEVELS])


@functools.lru_cache(maxsize=256)
def _quadrature(df: int) -> tuple[Float, Float]:
    """Nodes of chi-squared / df and their weights, dense where the variance is small: errors happen there."""
    v_Q = (np.arange(_NODES) + 0.5) / _NODES
    ratio_Q = stats.chi2.ppf(v_Q**5, df) / df
    return ratio_Q, 5 * v_Q**4 / _NODES
