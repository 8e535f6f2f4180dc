"""Scored arms over seeds, compared: NE_diff, calibration, AUC and GAUC overall, head, tail and by segment.

Letters: G segments, J runs (every seed of the first arm, then of the next), A axes, K logit bins,
V sums and R replicates of the bootstrap.

Three passes over the score folders, all streaming: the first checks that the runs are scores of the same
rows and fills logit histograms (for AUC), the second resamples users, the third takes AUCs within users.
Memory does not grow with the rows: a pass holds one row group of each run and what `MEMORY` allows.
Segments beyond that are evaluated in further rounds of passes, users beyond it go through temporary files.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from c2al.bins import BINS
from c2al.config import Axis, DataConfig, EvaluateConfig
from c2al.errors import ConfigError, OutputError
from c2al.evaluation import bootstrap, grouped
from c2al.evaluation.estimates import SegmentSums, segment_estimates
from c2al.evaluation.judge import judged
from c2al.evaluation.result import COHORT, OVERALL, Arm, Evaluation
from c2al.evaluation.scores import Block, Scores, blocks, check_items, check_unique, open_scores
from c2al.evaluation.segments import Segments
from c2al.files import write_atomically
from c2al.ne import PROBABILITY_CLIP

MEMORY = 1 << 30
"""Bytes of the sums of a round of segments, and of the rows of a share of the users."""
ITEM_REPLICATES = 200
"""Most replicates of the users-and-items bootstrap: a standard error needs fewer than a percentile."""
BASELINE, C2AL, SCORES = "baseline", "c2al", "scores"

DEFAULT_NAMES = DataConfig()

Float = NDArray[np.float64]


def paired(runs: Sequence[Sequence[str | Path]]) -> tuple[Arm, ...]:
    """The arms "baseline" and "c2al" of one (baseline, c2al) per seed, or the arm "scores" of one (scores,)."""
    if len({len(run) for run in runs}) != 1 or len(runs[0]) not in (1, 2) or (len(runs[0]) == 1 and len(runs) > 1):
        raise ConfigError("evaluate: takes one scored run, or a pair of runs for each seed")
    names = (BASELINE, C2AL) if len(runs[0]) == 2 else (SCORES,)
    return tuple(arm(name, [run[i] for run in runs]) for i, name in enumerate(names))


def arm(name: str, folders: Sequence[str | Path]) -> Arm:
    """An arm whose runs have the seeds 0, 1, ..."""
    return Arm(name=name, seeds=tuple(range(len(folders))), folders=tuple(map(str, folders)))


def evaluate(
    arms: Sequence[Arm],
    cohorts: Path | None,
    axes: Sequence[Axis],
    config: EvaluateConfig,
    seed: int,
    output: Path,
    data: DataConfig = DEFAULT_NAMES,
    comparisons: Sequence[tuple[str, str]] = (),
) -> Evaluation:
    """Evaluates score folders of the same rows, writes evaluation.json and evaluation.csv.

    Every arm is compared with the first, the baseline, over the seeds that both have; `comparisons` adds
    pairs (arm, against). cohorts: cohorts.json, which gives head, tail and the segments of every axis;
    without it the segments are the values of the categorical `axes`. seed: of the bootstrap. data: names
    the columns of row id and user id.

    Raises ConfigError for arms that cannot be compared, DataError when a folder is incomplete, a value is
    outside its contract, a row is scored twice or two runs are not scores of the same rows, CohortError
    when an axis does not fit the scores, OutputError when the result cannot be written. ::

        evaluate(paired([("base0", "c2al0"), ("base1", "c2al1")]), None, (), EvaluateConfig(), 0, Path("out"))
    """
    pairs = _comparisons(arms, comparisons)
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: cannot be written: it is a file")
    runs = [open_scores(folder, data) for arm in arms for folder in arm.folders]
    if config.items:
        check_items(runs[0], config.items)
    segments = Segments(cohorts, axes, runs[0])
    check_unique(runs[0])
    found = []
    for sums in _rounds(runs, segments, config, seed):
        found += [segment_estimates(s, arms, pairs, config) for s in sums]
    evaluation = Evaluation(
        arms=tuple(arms),
        comparisons=pairs,
        rows=found[0].rows,
        confidence=config.confidence,
        replicates=config.replicates,
        seed=seed,
        clip=PROBABILITY_CLIP,
        items=config.items,
        segments=judged(found, len(pairs), config.confidence),
    )
    write_atomically(output / "evaluation.json", evaluation.to_json())
    write_atomically(output / "evaluation.csv", evaluation.to_csv())
    return evaluation


def _comparisons(arms: Sequence[Arm], more: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Every arm against the first, then `more`, each once. Raises ConfigError with all problems."""
    seeds = {arm.name: set(arm.seeds) for arm in arms}
    problems = []
    if not arms:
        problems.append("evaluate: no scored run was given")
    if len(seeds) < len(arms):
        problems.append(f"evaluate: arms need distinct names, got {', '.join(arm.name for arm in arms)}")
    for arm in arms:
        if not arm.name or not arm.seeds or len(set(arm.seeds)) < len(arm.seeds):
            problems.append(f"evaluate: arm '{arm.name}' needs a name and distinct seeds, got {list(arm.seeds)}")
        if len({os.path.realpath(f) for f in arm.folders}) < len(arm.folders):
            problems.append(f"evaluate: arm '{arm.name}' names one folder twice: a run is one seed, got {arm.folders}")
        if len(arm.seeds) != len(arm.folders):
            problems.append(f"evaluate: arm '{arm.name}' has {len(arm.folders)} folders for {len(arm.seeds)} seeds")
    pairs = tuple(dict.fromkeys([*((arm.name, arms[0].name) for arm in arms[1:]), *more]))
    for pair in pairs:
        if unknown := [name for name in pair if name not in seeds]:
            problems.append(f"evaluate: no arm is called '{unknown[0]}'; there are {', '.join(seeds)}")
        elif pair[0] == pair[1]:
            problems.append(f"evaluate: arm '{pair[0]}' is compared with itself")
        elif not seeds[pair[0]] & seeds[pair[1]]:
            problems.append(f"evaluate: arms '{pair[0]}' and '{pair[1]}' have no seed in common")
    if problems:
        raise ConfigError(problems)
    return pairs


def _rounds(
    runs: Sequence[Scores], segments: Segments, config: EvaluateConfig, seed: int
) -> Iterator[list[SegmentSums]]:
    """The sums of as many segments at a time as MEMORY holds."""
    total, runs_J, replicates = len(segments.names), len(runs), config.replicates + 1
    own = 8 * (4 * runs_J * BINS + (bootstrap.RUNS + 4 * runs_J + 1 + runs_J) * replicates)
    size = max(1, MEMORY // own)
    for low in range(0, total, size):
        yield _round(runs, segments, low, min(low + size, total), config, seed)


def _round(
    runs: Sequence[Scores], segments: Segments, low: int, high: int, config: EvaluateConfig, seed: int
) -> list[SegmentSums]:
    """The sums of segments low .. high - 1."""
    groups, stream = high - low, np.uint64(seed % 2**64)

    def segment(table: pa.Table) -> NDArray[np.int32]:
        found_NA = segments.of(table)
        return np.where((found_NA >= low) & (found_NA < high), found_NA - low, -1).astype(np.int32)

    def read(items: str = "") -> Iterator[Block]:
        return blocks(runs, segments.columns, segment, items)

    rows_G2 = np.zeros((groups, 2), dtype=np.int64)
    histogram_GJ2K = np.zeros((groups, len(runs), 2, BINS))
    for b in read():
        bootstrap.count(b.segment_NA, b.label_N, b.weight_N, b.bin_NJ, rows_G2, histogram_GJ2K)
    place_GJ2K, auc_GJ, error_GJ = bootstrap.placements(histogram_GJ2K)

    sums_GVR = np.zeros((groups, bootstrap.RUNS + 4 * len(runs), config.replicates + 1))
    main = sum(axis in (OVERALL, COHORT) for axis, _, _ in segments.names[low:high])
    pairs_GVR = np.zeros((main, 2 + len(runs), min(config.replicates, ITEM_REPLICATES) + 1))
    for b in map(Block.sorted_by_user, read(config.items)):
        bootstrap.resample(
            *(b.user_N, b.segment_NA, b.label_N, b.weight_N, b.loss_NJ, b.prediction_NJ, b.bin_NJ),
            *(place_GJ2K, stream, sums_GVR),
        )
        if config.items and main:
            main_NA = np.where(b.segment_NA < main, b.segment_NA, np.int32(-1))
            bootstrap.resample_pairs(b.user_N, b.item_N, main_NA, b.label_N, b.weight_N, b.loss_NJ, stream, pairs_GVR)
    grouped_GVR = np.zeros((groups, 1 + len(runs), config.replicates + 1))
    for user_U, segment_U, sum_UV in _user_aucs(read(), runs[0].rows, segments.axes, len(runs)):
        bootstrap.resample_sums(user_U, segment_U, sum_UV, stream, grouped_GVR)
    return [
        SegmentSums(
            name=segments.names[low + g],
            rows_2=rows_G2[g],
            histogram_J2K=histogram_GJ2K[g],
            sums_VR=sums_GVR[g],
            auc_J=auc_GJ[g],
            auc_error=float(error_GJ[g].max()),
            grouped_VR=grouped_GVR[g],
            pairs_VR=pairs_GVR[g] if config.items and g < main else None,
        )
        for g in range(groups)
    ]


def _user_aucs(blocks: Iterator[Block], rows: int, axes: int, runs: int) -> Iterator[grouped.UserSums]:
    """AUC sums of every user, a share of the users at a time, so that the rows of a share fit MEMORY."""
    parts = ((b.user_N, b.segment_NA, b.label_N, b.weight_N, b.prediction_NJ) for b in blocks)
    count = max(1, math.ceil(rows * grouped.bytes_per_row(axes, runs) / MEMORY))
    for share in grouped.shares(parts, axes, runs, count):
        yield grouped.user_aucs(*share)
