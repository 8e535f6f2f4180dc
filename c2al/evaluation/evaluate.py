"""NE, NE_diff, calibration and AUC of scored runs, overall, head, tail and by segment.

Letters: G segments, J runs (all baselines, then all C2ALs), P runs of a seed, S seeds, K logit bins,
V sums and R replicates of the bootstrap.

Two passes over the score folders, both streaming: the first checks that the runs are scores of the
same rows and fills logit histograms (for AUC), the second resamples users. Memory: one row group of
each run and (2 + 4 J) G R + 4 G J K float64 numbers, whatever the number of rows.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from c2al.config import Axis, DataConfig, EvaluateConfig
from c2al.errors import ConfigError
from c2al.evaluation import bootstrap
from c2al.evaluation.result import VERSION, Estimate, Evaluation, Segment
from c2al.evaluation.scores import CLIP, Block, Segments, blocks, open_scores
from c2al.files import write_atomically

MIN_USERS = 20.0
"""No interval is given when fewer effective users stand behind a segment's positives or negatives:
percentiles over a handful of clusters cover too little (nominal 95%: 91% at 8 effective users, 93-94% at
16, 95% at 81, in 300 draws each of the null simulation in the tests)."""
MAX_UNDEFINED = 0.01
"""Nor when more than this share of the replicates lacks positives or negatives."""

DEFAULT_NAMES = DataConfig()

Float = NDArray[np.float64]


def evaluate(
    runs: Sequence[tuple[str | Path, ...]],
    cohorts: Path | None,
    axes: Sequence[Axis],
    config: EvaluateConfig,
    seed: int,
    output: Path,
    data: DataConfig = DEFAULT_NAMES,
) -> Evaluation:
    """Evaluates score folders of the same rows, writes evaluation.json and evaluation.csv.

    runs: (baseline, c2al) for each seed, or one (scores,). cohorts: cohorts.json, which gives head,
    tail and the segments of every axis; without it the segments are the values of the categorical
    `axes`. seed: of the bootstrap. data: names the columns of row id, user id and label.

    Raises DataError when a folder is incomplete, a value is outside its contract or two runs are not
    scores of the same rows; CohortError when an axis does not fit the scores.
    """
    if len({len(run) for run in runs}) != 1 or len(runs[0]) not in (1, 2) or (len(runs[0]) == 1 and len(runs) > 1):
        raise ConfigError("evaluate: takes one scored run, or a pair of runs for each seed")
    # All baselines, then all C2ALs: a matrix of P runs of S seeds in row order.
    scores = [open_scores(str(run[i]), data) for i in range(len(runs[0])) for run in runs]
    segments = Segments(cohorts, axes, scores[0])
    groups = len(segments.names)

    rows_G2 = np.zeros((groups, 2), dtype=np.int64)
    histogram_GJ2K = np.zeros((groups, len(scores), 2, bootstrap.BINS))
    for block in blocks(scores, segments):
        bootstrap.count(block.segment_NA, block.label_N, block.weight_N, block.bin_NJ, rows_G2, histogram_GJ2K)
    place_GJ2K, auc_GJ, error_GJ = bootstrap.placements(histogram_GJ2K)

    sums_GVR = np.zeros((groups, bootstrap.RUNS + 4 * len(scores), config.replicates + 1))
    for block in map(Block.sorted_by_user, blocks(scores, segments)):
        bootstrap.resample(
            block.user_N,
            block.segment_NA,
            block.label_N,
            block.weight_N,
            block.loss_NJ,
            block.prediction_NJ,
            block.bin_NJ,
            place_GJ2K,
            np.uint64(seed),
            sums_GVR,
        )

    evaluation = Evaluation(
        version=VERSION,
        runs=tuple(tuple(map(str, run)) for run in runs),
        rows=int(rows_G2[0].sum()),
        confidence=config.confidence,
        replicates=config.replicates,
        seed=seed,
        clip=CLIP,
        segments=tuple(
            _segment(name, rows_G2[g], sums_GVR[g], auc_GJ[g].reshape(len(runs[0]), -1), error_GJ[g].max(), config)
            for g, name in enumerate(segments.names)
        ),
    )
    write_atomically(output / "evaluation.json", evaluation.to_json())
    write_atomically(output / "evaluation.csv", evaluation.to_csv())
    return evaluation


def _segment(
    name: tuple[str, str, str],
    rows_2: NDArray[np.int64],
    sums_VR: Float,
    auc_PS: Float,
    auc_error: float,
    config: EvaluateConfig,
) -> Segment:
    """P runs of each of S seeds -> the estimates of one segment; `name` is its axis, name and detail."""
    metrics = {
        metric: value_JR.reshape(*auc_PS.shape, -1)
        for metric, value_JR in bootstrap.metrics(sums_VR, auc_PS.ravel()).items()
    }
    estimated: dict[str, Float] = {}
    if len(auc_PS) == 2:
        baseline, c2al = metrics["ne"]
        estimated["ne_diff"] = (c2al - baseline) / baseline
        estimated["auc_diff"] = metrics["auc"][1] - metrics["auc"][0]
    for i, prefix in enumerate(("baseline.", "c2al.") if len(auc_PS) == 2 else ("",)):
        estimated.update({prefix + metric: value_PSR[i] for metric, value_PSR in metrics.items()})

    class_2R = sums_VR[: bootstrap.RUNS]
    users = min(_effective_users(class_R) for class_R in class_2R)
    missing = ("no rows", "no negatives", "no positives", "")[int(class_2R[1, 0] > 0) + 2 * int(class_2R[0, 0] > 0)]
    return Segment(
        axis=name[0],
        name=name[1],
        detail=name[2],
        rows=int(rows_2.sum()),
        positives=int(rows_2[1]),
        users=users,
        auc_error=None if math.isnan(auc_error) else float(auc_error),
        estimates={n: _estimated(value_SR, users, missing, config) for n, value_SR in estimated.items()},
    )


def _effective_users(class_R: Float) -> float:
    """1 / Var(replicated sum / sum): with Poisson(1) weights, (sum of users' shares squared)^-1."""
    variance = float(np.square(class_R[1:] / class_R[0] - 1).mean()) if class_R[0] > 0 else 0.0
    return 1 / variance if variance else 0.0


def _estimated(value_SR: Float, users: float, missing: str, config: EvaluateConfig) -> Estimate:
    """Column 0 is the estimate, the others are its bootstrap distribution."""
    per_seed = tuple(None if math.isnan(v) else float(v) for v in value_SR[:, 0])
    if any(v is None for v in per_seed):
        return Estimate(value=None, interval=None, per_seed=per_seed, seed_std=None, reason=missing)
    mean_R = value_SR.mean(axis=0)
    defined = mean_R[1:][~np.isnan(mean_R[1:])]
    lost = 1 - len(defined) / config.replicates
    reason = ""
    if users < MIN_USERS:
        reason = f"no interval: {users:.1f} effective users, at least {MIN_USERS:.0f} needed"
    elif lost > MAX_UNDEFINED:
        reason = f"no interval: undefined in {lost:.1%} of the replicates"
    tail = (1 - config.confidence) / 2
    return Estimate(
        value=float(mean_R[0]),
        interval=None if reason else tuple(np.quantile(defined, (tail, 1 - tail)).tolist()),
        per_seed=per_seed,
        seed_std=float(value_SR[:, 0].std(ddof=1)) if len(per_seed) > 1 else None,
        reason=reason,
    )
