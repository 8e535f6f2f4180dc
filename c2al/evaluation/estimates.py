"""From the sums of one segment to its estimates, differences and reliability.

Letters: J runs, S seeds of an arm or of a comparison, K logit bins, V sums, R replicates (column 0 is the
estimate itself).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from c2al.bins import bin_predictions
from c2al.config import EvaluateConfig
from c2al.evaluation import bootstrap
from c2al.evaluation.grouped import grouped_auc
from c2al.evaluation.intervals import Spread, spread
from c2al.evaluation.power import power
from c2al.evaluation.result import COHORT, OVERALL, Arm, Difference, Estimate, Reliability, Segment
from c2al.ne import normalized_entropy

MIN_USERS = 20.0
"""No interval is given when fewer effective users stand behind a segment's positives or negatives:
intervals over a handful of clusters cover too little (nominal 95%: 91% at 8 effective users, 93-94% at
16, 95% at 81, in 300 draws each of the null simulation in the tests)."""
MAX_UNDEFINED = 0.01
"""Nor when more than this share of the replicates lacks positives or negatives."""
RELIABILITY_BINS = 10

Float = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentSums:
    """What the passes over the scores give for one segment."""

    name: tuple[str, str, str]
    """Axis, name and detail."""
    rows_2: NDArray[np.int64]
    """Negatives, positives."""
    histogram_J2K: Float
    sums_VR: Float
    """See c2al.evaluation.bootstrap."""
    auc_J: Float
    auc_error: float
    grouped_VR: Float
    """Weight of the users with an AUC, then weight * AUC of each run."""
    pairs_VR: Float | None
    """Of the bootstrap of users and items."""


@dataclasses.dataclass(frozen=True)
class _Judging:
    """What decides whether an estimate gets an interval."""

    users: float
    missing: str
    """Why a value that needs both classes is undefined."""
    config: EvaluateConfig
    comparisons: int


def segment_estimates(
    sums: SegmentSums, arms: Sequence[Arm], comparisons: Sequence[tuple[str, str]], config: EvaluateConfig
) -> Segment:
    """The segment with its differences not yet judged (see c2al.evaluation.judge)."""
    class_2R = sums.sums_VR[: bootstrap.RUNS]
    users = min(effective(class_R) for class_R in class_2R)
    missing = ("no rows", "no negatives", "no positives", "")[int(class_2R[1, 0] > 0) + 2 * int(class_2R[0, 0] > 0)]
    judging = _Judging(users, missing, config, len(comparisons))
    metric_JR = {**bootstrap.metrics(sums.sums_VR, sums.auc_J), "gauc": grouped_auc(sums.grouped_VR)}
    first, runs = 0, {}
    for arm in arms:
        runs[arm.name] = dict(zip(arm.seeds, range(first, first + len(arm.seeds)), strict=True))
        first += len(arm.seeds)
    estimates = {
        arm: {
            metric: _estimate(value_JR[list(of.values())], _reasoned(judging, metric))[0]
            for metric, value_JR in metric_JR.items()
        }
        for arm, of in runs.items()
    }
    return Segment(
        axis=sums.name[0],
        name=sums.name[1],
        detail=sums.name[2],
        rows=int(sums.rows_2.sum()),
        positives=int(sums.rows_2[1]),
        users=users,
        auc_error=None if math.isnan(sums.auc_error) else sums.auc_error,
        arms=estimates,
        reliability={arm: _reliability(sums.histogram_J2K[list(of.values())].mean(axis=0)) for arm, of in runs.items()},
        differences=tuple(_difference(a, b, runs[a], runs[b], sums, metric_JR, judging) for a, b in comparisons),
    )


def _reasoned(judging: _Judging, metric: str) -> _Judging:
    if metric == "gauc" and not judging.missing:
        return dataclasses.replace(judging, missing="no user with positives and negatives")
    return judging


def effective(class_R: Float) -> float:
    """1 / Var(replicated sum / sum): with Poisson(1) weights, (sum of users' shares squared)^-1."""
    variance = float(np.square(class_R[1:] / class_R[0] - 1).mean()) if class_R[0] > 0 else 0.0
    return 1 / variance if variance else 0.0


def _difference(
    arm: str,
    against: str,
    arm_runs: dict[int, int],
    against_runs: dict[int, int],
    sums: SegmentSums,
    metric_JR: dict[str, Float],
    judging: _Judging,
) -> Difference:
    seeds = [seed for seed in arm_runs if seed in against_runs]
    a, b = [arm_runs[s] for s in seeds], [against_runs[s] for s in seeds]
    estimates, spreads = {}, {}
    for metric in ("ne", "auc", "gauc"):
        value_JR = metric_JR[metric]
        value_SR = value_JR[a] - value_JR[b]
        if metric == "ne":
            value_SR = _relative(value_SR, value_JR[b])
        estimates[metric], spreads[metric] = _estimate(value_SR, _reasoned(judging, metric))
    main, found = sums.name[0] in (OVERALL, COHORT), spreads["ne"]
    return Difference(
        arm=arm,
        against=against,
        estimates=estimates,
        judgement=None,
        items_interval=_items_interval(sums.pairs_VR, a, b, judging.config) if main and found else None,
        power=power(found, judging.users, 1 - (1 - judging.config.confidence) / judging.comparisons)
        if main and found
        else None,
    )


def _relative(change: Float, of: Float) -> Float:
    with np.errstate(divide="ignore", invalid="ignore"):
        relative: Float = np.where(of > 0, change / of, np.nan)
    return relative


def _estimate(value_SR: Float, judging: _Judging) -> tuple[Estimate, Spread | None]:
    """Column 0 is the estimate, the others are its bootstrap distribution. No Spread: no interval."""
    config = judging.config
    per_seed = tuple(None if math.isnan(v) else float(v) for v in value_SR[:, 0])
    seed_std = float(value_SR[:, 0].std(ddof=1)) if len(per_seed) > 1 else None
    empty = Estimate(
        value=None, interval=None, per_seed=per_seed, users_std=None, resampled_std=None, seed_std=None, df=None,
        users_interval=None, reason=judging.missing,
    )  # fmt: skip
    if any(v is None for v in per_seed):
        return empty, None
    value = float(value_SR[:, 0].mean())
    defined_SR = value_SR[:, 1:][:, ~np.isnan(value_SR[:, 1:]).any(axis=0)]
    lost = 1 - defined_SR.shape[1] / config.replicates
    reason = ""
    if judging.users < MIN_USERS:
        reason = f"no interval: {judging.users:.1f} effective users, at least {MIN_USERS:.0f} needed"
    elif lost > MAX_UNDEFINED:
        reason = f"no interval: undefined in {lost:.1%} of the replicates"
    if reason:
        return dataclasses.replace(empty, value=value, seed_std=seed_std, reason=reason), None
    found = spread(value_SR[:, 0], defined_SR, judging.users)
    tail = (1 - config.confidence) / 2
    low, high = np.quantile(defined_SR.mean(axis=0), (tail, 1 - tail)).tolist()
    estimate = Estimate(
        value=value,
        interval=found.interval(config.confidence),
        per_seed=per_seed,
        users_std=math.sqrt(found.users_variance),
        resampled_std=math.sqrt(found.resampled_variance),
        seed_std=seed_std,
        df=found.df,
        users_interval=(low, high),
    )
    return estimate, found


def _items_interval(
    pairs_VR: Float | None, arm: Sequence[int], against: Sequence[int], config: EvaluateConfig
) -> tuple[float, float] | None:
    """Of NE_diff, with users and items resampled together instead of users alone.

    The pigeonhole variance is at least the true one of a table crossed by users and items, on average.
    None without the bootstrap, or where a replicate has one class only.
    """
    if pairs_VR is None:
        return None
    # resample_pairs keeps negatives, positives, losses.
    ne_JR = normalized_entropy(pairs_VR[2:], pairs_VR[1], pairs_VR[0])
    value_SR = _relative(ne_JR[list(arm)] - ne_JR[list(against)], ne_JR[list(against)])
    if np.isnan(value_SR).any():
        return None
    effective_pairs = min(effective(pairs_VR[0]), effective(pairs_VR[1]))
    return spread(value_SR[:, 0], value_SR[:, 1:], effective_pairs).interval(config.confidence)


def _reliability(histogram_2K: Float) -> Reliability:
    """Neighbouring logit bins are joined into RELIABILITY_BINS of about equal weight; empty ones are left out."""
    weight_K = histogram_2K.sum(axis=0)
    middle_K = weight_K.cumsum() - weight_K / 2
    bin_K = np.minimum(RELIABILITY_BINS * middle_K / max(weight_K.sum(), 1e-300), RELIABILITY_BINS - 1).astype(int)
    weight, predicted, positive = (
        np.bincount(bin_K, values, RELIABILITY_BINS)
        for values in (weight_K, weight_K * bin_predictions(), histogram_2K[1])
    )
    used = weight > 0
    return Reliability(
        prediction=tuple((predicted[used] / weight[used]).tolist()),
        rate=tuple((positive[used] / weight[used]).tolist()),
        weight=tuple(weight[used].tolist()),
    )
