"""The sections of discovery, evaluation and experiments."""

import dataclasses
from typing import Literal

from c2al.typed import Problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscoverConfig:
    """Which pair of cohorts becomes head and tail."""

    rule: Literal["js", "wasserstein", "wasserstein_logit", "kl", "cosine"] = "js"
    """Divergence the pairs are ranked by, through its lower confidence bound."""
    axes: tuple[str, ...] = ()
    """Axes a pair may be chosen from; empty: all."""
    min_rows: int = 0
    """Rows both cohorts of the chosen pair must have."""
    min_positives: int = 0
    """Positives both cohorts of the chosen pair must have."""
    confidence: float = 0.95
    """Family-wise confidence of the lower bounds."""
    correction: Literal["holm", "bonferroni"] = "bonferroni"
    max_cohorts: int = 4096
    """Cohorts one axis may have."""
    prediction: str = "prediction"
    """Column with the baseline's predicted probability."""
    label: str = "label"
    """Column with 0 or 1; the score job names it so. The user's column is data.user_id."""
    jackknife: bool = True
    """False: divergences without intervals, and therefore no choice."""
    cut_tolerance: float = 0.05
    """How far the share of rows between two percentile cuts may be from the one asked for (ties)."""
    threads: int = 1
    """Worker threads a rank."""
    checkpoint_seconds: float = 60.0
    """Seconds between saves of the accumulators; a killed scan goes on from the last one."""

    def problems(self) -> Problems:
        if not 0 < self.confidence < 1:
            yield "confidence", f"must lie in (0, 1), is {self.confidence}"
        for field in ("max_cohorts", "threads"):
            if getattr(self, field) < 1:
                yield field, f"must be at least 1, is {getattr(self, field)}"
        for field in ("min_rows", "min_positives", "checkpoint_seconds", "cut_tolerance"):
            if getattr(self, field) < 0:
                yield field, f"must not be negative, is {getattr(self, field)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Intervals of NE, NE_diff, calibration and AUC."""

    replicates: int = 1000
    """Bootstrap replicates over users."""
    confidence: float = 0.95
    """Two-sided, of every interval."""
    items: str = ""
    """Column of item ids in the scores; if given, NE_diff gets a second interval that resamples users and
    items together (pigeonhole bootstrap)."""

    def problems(self) -> Problems:
        if self.replicates < 20:
            yield "replicates", f"must be at least 20, is {self.replicates}"
        if not 0 < self.confidence < 1:
            yield "confidence", f"must lie in (0, 1), is {self.confidence}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Baseline and C2AL over paired seeds."""

    seeds: tuple[int, ...] = (0,)
    """Each seed trains a baseline and a C2AL model with the same data order and initialisation."""
    lambda_head: float = 0.2
    """Of the C2AL runs; train.lambda_head must be 0 in an experiment."""
    lambda_tail: float = 0.2
    discover_on: Literal["validation", "train"] = "validation"
    """Split whose baseline scores cohorts are discovered on."""

    def problems(self) -> Problems:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            yield "seeds", f"must be distinct and not empty, is {list(self.seeds)}"
        if self.lambda_head < 0 or self.lambda_tail < 0 or self.lambda_head + self.lambda_tail == 0:
            yield "lambda_head", "and lambda_tail must not be negative, nor both 0"
