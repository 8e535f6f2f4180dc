"""What `c2al evaluate` found: the contents of evaluation.json."""

import dataclasses
import os
from typing import Literal

from c2al.errors import DataError
from c2al.evaluation.tables import evaluation_csv, terminal_table
from c2al.state import read_state, state_text
from c2al.typed import Problems

FORMAT, VERSION = "c2al.evaluation", 3
"""Of evaluation.json; a file of another format or version is refused."""
OVERALL, COHORT = "overall", "cohort"
"""Axis names of the whole test set, and of head and tail."""
METRICS = ("ne", "calibration", "auc", "gauc")
"""Keys of `Segment.arms[arm]`."""
DIFFERENCES = ("ne", "auc", "gauc")
"""Keys of `Difference.estimates`."""

Verdict = Literal["lower", "higher", "no difference shown"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training: a name and its score folders, one per seed.

    A seed pairs the runs of two arms: the run of seed 3 is compared with the other arm's run of seed 3.
    An arm may have fewer seeds than another.
    """

    name: str
    seeds: tuple[int, ...]
    folders: tuple[str, ...]
    """Score folder of each seed, in the order of `seeds`."""

    def problems(self) -> Problems:
        if len(self.seeds) != len(self.folders):
            yield "folders", f"has {len(self.folders)} entries for {len(self.seeds)} seeds"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """One number with what is known about its uncertainty. None: undefined, `reason` says why."""

    value: float | None
    """Mean over seeds; of the AUC see `Segment.auc_error`."""
    interval: tuple[float, float] | None
    """Covers users and seeds together; see c2al.evaluation.intervals. With one seed it covers users only
    and says nothing about other seeds."""
    per_seed: tuple[float | None, ...]
    users_std: float | None
    """Standard error of `value` that all seeds share, because they are scored on the same users. With
    one seed it also holds what that seed's model makes of these users."""
    resampled_std: float | None
    """Standard error of `value` over users alone, with the seeds held fixed. `interval` is never narrower than it
    allows, however well the seeds agree."""
    seed_std: float | None
    """Standard deviation over seeds (n - 1); None with one seed."""
    df: float | None
    """Degrees of freedom of the combined standard error (Satterthwaite)."""
    users_interval: tuple[float, float] | None
    """Percentile interval of the bootstrap over users alone, with the seeds held fixed."""
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """Whether a difference of NE survives the correction for how many were looked at."""

    p: float
    """Two-sided; agrees with `Estimate.interval`."""
    corrected_p: float
    """Overall: Holm over the comparisons. Segments: Benjamini-Hochberg over the segments of the comparison."""
    corrected_interval: tuple[float, float]
    """Excludes 0 exactly if the difference passes; see c2al.evaluation.multiple."""
    passes: bool
    verdict: Verdict
    words: str
    """The verdict in a sentence; says so when it rests on one seed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power:
    """What this design can see, at 80% power and the evaluation's confidence over all comparisons: the level is that of
    Holm's first step, (1 - confidence) / comparisons."""

    smallest: float
    """Smallest true NE_diff, in absolute value, that would be seen."""
    seeds_needed: int | None
    """Seeds that would see `target` on these users; None: no number of seeds would, or one seed was run."""
    users_needed: float | None
    """Effective users that would see `target` with these seeds; None: no number of users would."""
    target: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """One arm against another on one segment, over the seeds that both have."""

    arm: str
    against: str
    estimates: dict[str, Estimate]
    """"ne": NE_diff = (NE arm - NE against) / NE against; "auc", "gauc": arm - against."""
    judgement: Judgement | None
    """Of "ne"; None where it has no interval."""
    items_interval: tuple[float, float] | None
    """Of "ne", resampling users and items together (sensitivity); only overall and cohorts, and only with
    evaluate.items."""
    power: Power | None
    """Only overall and cohorts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reliability:
    """Predicted against observed rates in bins of equal weight, sorted by prediction, pooled over seeds."""

    prediction: tuple[float, ...]
    """Mean prediction, from the centres of the logit bins: off by at most 0.8% of p (1 - p)."""
    rate: tuple[float, ...]
    """Observed share of positives."""
    weight: tuple[float, ...]
    """Sum of sample weights, averaged over seeds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """The estimates on one set of rows."""

    axis: str
    """Name of an axis, or OVERALL, or COHORT."""
    name: str
    """Of the segment in its axis; "head" and "tail" with axis COHORT."""
    detail: str
    """What head and tail are, e.g. "tab = 1"."""
    rows: int
    positives: int
    users: float
    """Effective number of users (as many equal users would vary as much) behind the positives or
    the negatives, whichever has fewer; estimated from the bootstrap."""
    auc_error: float | None
    """Largest distance that the logit bins can put between an AUC and the exact one; None without AUC."""
    arms: dict[str, dict[str, Estimate]]
    """Arm -> "ne", "calibration", "auc", "gauc" (mean AUC within users who have both classes, weighted by
    their impressions)."""
    reliability: dict[str, Reliability]
    """Arm -> bins; no bins where the segment has no rows."""
    differences: tuple[Difference, ...]
    """In the order of `Evaluation.comparisons`."""

    def difference(self, arm: str, against: str) -> Difference:
        """Raises KeyError for arms that were not compared."""
        for d in self.differences:
            if (d.arm, d.against) == (arm, against):
                return d
        raise KeyError(f"{arm} was not compared with {against}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What evaluation.json holds."""

    arms: tuple[Arm, ...]
    """The baseline first."""
    comparisons: tuple[tuple[str, str], ...]
    """(arm, against): every other arm against the baseline, then the pairs that were asked for."""
    rows: int
    confidence: float
    replicates: int
    seed: int
    clip: float
    items: str
    """Column of `Difference.items_interval`; empty: not computed."""
    segments: tuple[Segment, ...]

    def segment(self, axis: str, name: str) -> Segment | None:
        """The segment of that name, if there is one."""
        return next((s for s in self.segments if (s.axis, s.name) == (axis, name)), None)

    @property
    def overall(self) -> Segment:
        return self.segments[0]

    def to_json(self) -> str:
        """Full precision; reads back equal."""
        return state_text(self, format=FORMAT, version=VERSION)

    def to_csv(self) -> str:
        return evaluation_csv(self)

    def table(self) -> str:
        """For the terminal."""
        return terminal_table(self)


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Reads evaluation.json. Raises DataError naming the file and what is wrong with it."""
    return read_state(path, Evaluation, format=FORMAT, version=VERSION, error=DataError)
