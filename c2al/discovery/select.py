"""The choice: the pair of cohorts whose divergence is largest beyond doubt, or none and why.

Legend: P pairs of one axis, M tested pairs of all axes together.

Pairs are ranked by a one-sided lower confidence bound of the rule's divergence, corrected for all M
pairs that are tested, so a small cohort cannot win by its noise and nothing is chosen where all
cohorts are alike. The Wasserstein distances are never negative, and noise alone makes them positive: of
data sets without any difference, 5 to 8% had a pair whose bound was above 0. So under a Wasserstein rule
the chosen pair must differ by `js` too, whose bound holds its error.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from c2al.config import DiscoverConfig
from c2al.discovery.divergence import FOLDED, Comparison, Estimates
from c2al.discovery.histogram import COUNT, POSITIVE, Counts

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class AxisPairs:
    """All pairs of one axis's cohorts under the rule's divergence."""

    axis: str
    comparison: Comparison
    head_P: _Ints
    """Index of the pair's cohort with more rows; of equals the first."""
    tail_P: _Ints
    rule: Estimates
    js: Estimates
    freedom_P: _Ints
    """Degrees of freedom: user groups of the cohort that has fewer, less one."""
    eligible_P: npt.NDArray[np.bool_]
    """Both cohorts have the minimum rows and positives, and the axis may be chosen from."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Corrected lower bounds of every pair, and the pair chosen by them."""

    bounds: tuple[_Floats, ...]
    """An axis each: (P,); NaN for pairs that were not tested."""
    tested: int
    """M."""
    chosen: tuple[int, int] | None
    """(axis, pair)."""
    reason: str


def compare_axis(axis: str, counts: Counts, config: DiscoverConfig) -> AxisPairs:
    """Every pair of an axis's cohorts under the rule."""
    rows_C = counts.fine_CS22[..., COUNT].sum((1, 2))
    positives_C = counts.fine_CS22[:, :, POSITIVE, COUNT].sum(1)
    first_P, second_P = np.triu_indices(len(rows_C), 1)
    swap_P = rows_C[second_P] > rows_C[first_P]
    head_P, tail_P = np.where(swap_P, second_P, first_P), np.where(swap_P, first_P, second_P)
    comparison = Comparison(counts)
    rule = comparison.estimate(head_P, tail_P, config.rule)
    large_C = (rows_C >= config.min_rows) & (positives_C >= config.min_positives)
    return AxisPairs(
        axis=axis,
        comparison=comparison,
        head_P=head_P,
        tail_P=tail_P,
        rule=rule,
        js=comparison.estimate(head_P, tail_P, "js") if config.rule in FOLDED else rule,
        freedom_P=np.minimum(comparison.groups_C[head_P], comparison.groups_C[tail_P]) - 1,
        eligible_P=large_C[head_P] & large_C[tail_P] & (not config.axes or axis in config.axes),
    )


def choose(axes: Sequence[AxisPairs], config: DiscoverConfig) -> Choice:
    """Bounds and choice over all axes; ties go to the axis and pair that come first."""
    tested = _Tested(axes, config.correction)
    alpha = 1 - config.confidence
    if config.rule not in FOLDED:
        rule = js = tested.bounds([a.rule for a in axes], alpha)
    else:
        rule = tested.bounds([a.rule for a in axes], alpha / 2)
        js = tested.bounds([a.js for a in axes], alpha)
    if not tested.count:
        return Choice(rule, 0, None, _why_untested(axes, config))
    confirmed = [np.where((b > 0) & (d > 0), b, np.nan) for b, d in zip(rule, js, strict=True)]
    chosen = _largest(confirmed)
    at = chosen or _largest(rule)
    assert at is not None
    axis, pair = at
    found = (
        f"{config.rule} lower bound {rule[axis][pair]:.6g} at confidence {config.confidence:.6g} family-wise "
        f"over {tested.count} pairs ({config.correction})"
    )
    if chosen is not None:
        also = ", and by js it differs too" if config.rule in FOLDED else ""
        return Choice(rule, tested.count, chosen, f"largest {found}{also}")
    why = f"is above 0, but js is not: {js[axis][pair]:.6g}" if rule[axis][pair] > 0 else "is not above 0"
    reason = f"no pair differs beyond noise: the largest {found}, on axis '{axes[axis].axis}', {why}"
    return Choice(rule, tested.count, None, reason)


class _Tested:
    """The pairs that are tested: eligible, and with an error that the jackknife could estimate."""

    def __init__(self, axes: Sequence[AxisPairs], correction: str):
        self._of_axis = [a.eligible_P & np.isfinite(a.rule.error_P) & (a.freedom_P >= 1) for a in axes]
        self._freedom_M = self._joined([a.freedom_P for a in axes])
        self._correction = correction
        self.count = len(self._freedom_M)
        """M."""

    def bounds(self, estimates: Sequence[Estimates], alpha: float) -> tuple[_Floats, ...]:
        """For each axis the lower bounds of its pairs, corrected for all M: (P,), NaN for untested pairs."""
        value_M = self._joined([e.value_P for e in estimates])
        error_M = self._joined([e.error_P for e in estimates])
        rest = lower_bounds(value_M, error_M, self._freedom_M, alpha, self._correction)
        found = []
        for tested_P in self._of_axis:
            bound_P, count = np.full(len(tested_P), np.nan), int(tested_P.sum())
            bound_P[tested_P], rest = rest[:count], rest[count:]
            found.append(bound_P)
        return tuple(found)

    def _joined(self, values: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """The tested pairs' values of all axes: (M,)."""
        return np.concatenate([*(v[t] for v, t in zip(values, self._of_axis, strict=True)), np.empty(0)])


def _largest(values: Sequence[_Floats]) -> tuple[int, int] | None:
    """(axis, pair) of the largest number, of equals the first; None if all are NaN."""
    best = [(i, int(np.nanargmax(v))) for i, v in enumerate(values) if not np.isnan(v).all()]
    return max(best, key=lambda at: values[at[0]][at[1]], default=None)


def lower_bounds(value_M: _Floats, error_M: _Floats, freedom_M: _Floats, alpha: float, correction: str) -> _Floats:
    """One-sided Student-t lower bounds of M estimates whose family-wise error is at most `alpha`.

    bonferroni: every bound at level alpha / M; they hold together. holm: the i-th smallest p-value at
    alpha / (M - i) as long as all before it were significant; more pairs are found above 0, but the
    bounds are tests only and do not hold together.
    """
    count = len(value_M)
    if not count:
        return np.empty(0)
    if correction == "bonferroni":
        level_M = np.full(count, alpha / count)
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            p_M = np.nan_to_num(stdtr(freedom_M, -value_M / error_M), nan=1.0)
        order = np.argsort(p_M, kind="stable")
        level = alpha / (count - np.arange(count))
        failed = np.flatnonzero(p_M[order] > level)
        if len(failed):
            level[failed[0] :] = level[failed[0]]
        level_M = np.empty(count)
        level_M[order] = level
    return np.asarray(value_M + stdtrit(freedom_M, level_M) * error_M)


def _why_untested(axes: Sequence[AxisPairs], config: DiscoverConfig) -> str:
    if not config.jackknife:
        return "the scan ran without a jackknife (discover.jackknife = false), so no pair has a lower bound"
    if not any(len(a.head_P) for a in axes):
        return "no axis has two cohorts"
    if not any(a.eligible_P.any() for a in axes):
        return (
            f"no pair has {config.min_rows} rows and {config.min_positives} positives in both cohorts "
            "on an axis that may be chosen from (discover.min_rows, discover.min_positives, discover.axes)"
        )
    return "no pair has users enough for a standard error (every cohort needs users in two groups)"
