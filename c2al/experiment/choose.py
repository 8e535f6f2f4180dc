"""Which auxiliary cohorts an arm trains with.

All sources but "file" start from what discovery counted on the baseline's predictions, so that every arm
answers one question: does it matter that these cohorts are the ones that the baseline sees most differently?
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from c2al.config import Arm, Config, replace
from c2al.data.cohorts import PAIR_LABELS, Cohorts, CohortSpec, Condition, read_cohorts
from c2al.data.hashing import DRAW_BUCKETS, drawn_share
from c2al.data.source import open_dataset
from c2al.discovery.axes import cohort_spec
from c2al.discovery.discover import ACCUMULATORS
from c2al.discovery.saved import load_accumulators
from c2al.discovery.select import compare_axis
from c2al.errors import CohortError

Pair = tuple[CohortSpec, ...]


def on_axis(config: Config, axis: str) -> Config:
    """With cohorts chosen from one axis; as it is for axis ""."""
    return replace(config, **{"discover.axes": (axis,)}) if axis else config


class NoCohorts(CohortError):
    """A finding, not a fault: what the arm asks for does not exist in these data."""


def cohorts_of(arm: Arm, config: Config, discovery: Path | None) -> Pair:
    """The arm's auxiliary cohorts, named head and tail; empty for cohorts = "none".

    `discovery` is the folder of the choice on the arm's axis; "none" and "file" need none.

    Raises NoCohorts with the reason when no noise bound supports a pair, or no pair has the minimum size.
    """
    if arm.cohorts == "none":
        return ()
    if arm.cohorts == "file":
        return read_cohorts(arm.file).chosen()
    assert discovery is not None
    config = on_axis(config, arm.axis)
    found = read_cohorts(discovery / "cohorts.json")
    if arm.cohorts in ("random", "least"):
        return _other_pair(arm, config, discovery, found)
    try:
        pair = found.chosen()
    except CohortError as e:
        raise NoCohorts(str(e)) from e
    if arm.cohorts == "one":
        return tuple(c for c in pair if c.label == arm.keep)
    return pair if arm.cohorts == "chosen" else placebo(pair, config, arm.draw)


def _other_pair(arm: Arm, config: Config, discovery: Path, found: Cohorts) -> Pair:
    """A pair of the minimum size that is not the chosen one: drawn, or the one of least divergence."""
    pairs = [
        p
        for p in eligible_pairs(config, discovery)
        if [c.conditions for c in p[0]] != [c.conditions for c in found.named]
    ]
    if not pairs:
        raise NoCohorts(
            f"arm '{arm.name}': no other pair of cohorts has {config.discover.min_rows} rows and "
            f"{config.discover.min_positives} positives in both (discover.min_rows, discover.min_positives)"
            + ("" if found.named else f"; of the choice, discovery says: {found.reason}")
        )
    if arm.cohorts == "least":
        return min(pairs, key=lambda p: p[1])[0]
    rng = np.random.default_rng((config.seed, arm.draw, *hashlib.sha256(b"c2al random pair").digest()[:4]))
    return pairs[int(rng.integers(len(pairs)))][0]


def eligible_pairs(config: Config, discovery: Path) -> list[tuple[Pair, float]]:
    """Every pair of the minimum size, with its divergence by the rule, on every axis that may be chosen from."""
    total, _ = load_accumulators(discovery / ACCUMULATORS)
    found = []
    for axis in total.axes:
        counts = total.of_axis(axis)
        pairs = compare_axis(axis.name, counts, config.discover)
        for i in np.flatnonzero(pairs.eligible_P & np.isfinite(pairs.rule.value_P)):
            specs = tuple(
                dataclasses.replace(cohort_spec(axis, total.axes, total.cuts, counts.keys[int(number)]), label=label)
                for label, number in zip(PAIR_LABELS, (pairs.head_P[i], pairs.tail_P[i]), strict=True)
            )
            found.append((specs, float(pairs.rule.value_P[i])))
    return found


def placebo(pair: Sequence[CohortSpec], config: Config, draw: int) -> Pair:
    """Cohorts of the same numbers of training rows as `pair`, whose users are drawn at random.

    A user is in a placebo cohort by a hash of its id, so all of its rows are, in every split. The sizes
    are those of `pair` to within one of the hash's buckets. The two cohorts are disjoint.
    """
    rows_K, size = _count(pair, config, draw)
    placebos, start = [], 0
    before = np.concatenate(([0], np.cumsum(rows_K)))
    for cohort, rows in zip(pair, size, strict=True):
        wanted = before[start] + rows
        stop = int(np.abs(before[start + 1 :] - wanted).argmin()) + start + 1
        condition = Condition(
            column=config.data.user_id, draw=draw, lower=start / DRAW_BUCKETS, upper=stop / DRAW_BUCKETS
        )
        placebos.append(
            CohortSpec(axis="placebo", name=f"as many as {cohort.name}", conditions=(condition,), label=cohort.label)
        )
        start = stop
    return tuple(placebos)


def _count(pair: Sequence[CohortSpec], config: Config, draw: int) -> tuple[npt.NDArray[np.int64], list[int]]:
    """(training rows by bucket of the user's hash (K,), training rows of each cohort)."""
    columns = sorted({config.data.user_id, *(column for cohort in pair for column in cohort.columns)})
    rows_K, size = np.zeros(DRAW_BUCKETS, np.int64), [0] * len(pair)
    for file in open_dataset(config.data.train):
        for group, rows in enumerate(file.row_group_rows):
            if not rows:
                continue
            table = file.read(group, columns)
            share_R = drawn_share(table[config.data.user_id], draw)
            bucket_R = (share_R[~np.isnan(share_R)] * DRAW_BUCKETS).astype(np.int64)
            rows_K += np.bincount(bucket_R, minlength=DRAW_BUCKETS)
            for i, cohort in enumerate(pair):
                size[i] += int(cohort.membership(table).sum())
    return rows_K, size
