"""Which differences are shown, after correcting for how many were looked at.

Overall, the family is all comparisons: Holm. On segments, the family is all segments of one comparison:
Benjamini-Hochberg, since segments share users and seeds, which makes them depend positively on one
another. Head and tail count as segments.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from c2al.evaluation.intervals import Spread
from c2al.evaluation.multiple import Corrected, benjamini_hochberg, holm
from c2al.evaluation.result import OVERALL, Estimate, Judgement, Segment, Verdict

Correction = Callable[[NDArray[np.float64], float], Corrected]
Place = tuple[int, int]
"""(segment, comparison)."""


def judged(segments: Sequence[Segment], comparisons: int, confidence: float) -> tuple[Segment, ...]:
    """The segments with the judgement of each difference that has an interval."""
    overall = [i for i, s in enumerate(segments) if s.axis == OVERALL]
    others = [i for i, s in enumerate(segments) if s.axis != OVERALL]
    judgements: dict[Place, Judgement] = {}
    families: list[tuple[Correction, list[Place]]] = [(holm, [(i, c) for i in overall for c in range(comparisons)])]
    families += [(benjamini_hochberg, [(i, c) for i in others]) for c in range(comparisons)]
    for correction, family in families:
        judgements.update(_family(segments, family, correction, confidence))
    return tuple(
        dataclasses.replace(
            s,
            differences=tuple(
                dataclasses.replace(d, judgement=judgements.get((i, c))) for c, d in enumerate(s.differences)
            ),
        )
        for i, s in enumerate(segments)
    )


def _family(
    segments: Sequence[Segment], family: Sequence[Place], correction: Correction, confidence: float
) -> dict[Place, Judgement]:
    spreads = {}
    for i, c in family:
        found = estimate_spread(segments[i].differences[c].estimates["ne"], segments[i].users)
        if found is not None:
            spreads[i, c] = found
    if not spreads:
        return {}
    p_M = np.array([s.p() for s in spreads.values()])
    corrected = correction(p_M, 1 - confidence)
    return {
        place: judgement(found, float(p), float(adjusted), float(level), bool(passes))
        for (place, found), p, adjusted, level, passes in zip(
            spreads.items(), p_M, corrected.p_M, corrected.level_M, corrected.passes_M, strict=True
        )
    }


def estimate_spread(estimate: Estimate, users: float) -> Spread | None:
    """The variances behind an estimate's interval; None without an interval. users: effective users."""
    if estimate.value is None or estimate.interval is None or estimate.users_std is None:
        return None
    assert estimate.resampled_std is not None
    seeds = len(estimate.per_seed)
    seeds_variance = (estimate.seed_std or 0.0) ** 2 / seeds
    users_df, resampled = max(users - 1, 1.0), estimate.resampled_std**2
    return Spread(estimate.value, estimate.users_std**2, seeds_variance, users_df, seeds - 1, resampled)


def judgement(found: Spread, p: float, adjusted: float, level: float, passes: bool) -> Judgement:
    """passes: as the correction decided; the interval at 1 - level agrees with it."""
    interval = found.interval(1 - level)
    verdict: Verdict = "no difference shown" if not passes else "lower" if found.value < 0 else "higher"
    words = {
        "lower": "NE is lower: the corrected interval lies below 0",
        "higher": "NE is higher: the corrected interval lies above 0",
        "no difference shown": "no difference shown: the corrected interval contains 0",
    }[verdict]
    if not found.seeds_df:
        words += "; it covers other users, and one seed says nothing about other seeds"
    return Judgement(
        p=p, corrected_p=adjusted, corrected_interval=interval, passes=passes, verdict=verdict, words=words
    )
