"""The sections of discovery, evaluation and experiments."""

import dataclasses
import re
from typing import Any, Literal

from c2al.config.bounds import LARGEST_FACTOR
from c2al.typed import Problems

MOST_COHORTS = 8192
"""Cohorts of one axis whose pairs can still be compared: their memory and time grow with the square."""


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
    """Correction of the bounds for the number of pairs. bonferroni: all bounds hold together. holm: step-down, which
    finds more pairs above 0, but its bounds are tests only."""
    max_cohorts: int = 4096
    """Cohorts one axis may have, up to 8192. Memory is 0.3 MiB per cohort and 140 bytes per pair of them: 7 GiB for
    8192 cohorts, on one thread."""
    prediction: str = "prediction"
    """Column with the baseline's predicted probability."""
    label: str = "label"
    """Column with 0 or 1; the score job names it so. The user's column is data.user_id."""
    jackknife: bool = True
    """False: divergences without intervals, and therefore no choice."""
    cut_tolerance: float = 0.05
    """How far the share of rows between two percentile cuts may be from the one asked for (ties)."""
    threads: int = 1
    """Worker threads per rank."""
    checkpoint_seconds: float = 60.0
    """Seconds between saves of the accumulators; a killed scan goes on from the last one."""

    def problems(self) -> Problems:
        if not 0 < self.confidence < 1:
            yield "confidence", f"must lie in (0, 1), is {self.confidence}"
        for field in ("max_cohorts", "threads"):
            if getattr(self, field) < 1:
                yield field, f"must be at least 1, is {getattr(self, field)}"
        if self.max_cohorts > MOST_COHORTS:
            yield "max_cohorts", f"must be at most {MOST_COHORTS}, is {self.max_cohorts}"
        for field in ("min_rows", "min_positives", "checkpoint_seconds", "cut_tolerance"):
            if getattr(self, field) < 0:
                yield field, f"must not be negative, is {getattr(self, field)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Intervals of NE, NE_diff, calibration and AUC."""

    replicates: int = 1000
    """Bootstrap replicates over users."""
    confidence: float = 0.95
    """Two-sided confidence of every interval."""
    items: str = ""
    """Column of item ids, which scores then carry; if given, NE_diff gets a second interval that resamples users
    and items together (pigeonhole bootstrap). It is given for the whole test set and the cohorts only, not for
    segments."""

    def problems(self) -> Problems:
        if self.replicates < 20:
            yield "replicates", f"must be at least 20, is {self.replicates}"
        if not 0 < self.confidence < 1:
            yield "confidence", f"must lie in (0, 1), is {self.confidence}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training that an experiment compares with the baseline."""

    name: str
    """What the arm is called: letters, digits, "-" and "_", at most 128 of them. "baseline" is taken."""
    cohorts: Literal["none", "chosen", "random", "least", "shuffled", "one", "file"] = "chosen"
    """Where the auxiliary cohorts come from. chosen: the pair that discovery chose. random: a pair drawn
    from all pairs of the minimum size. least: the least divergent pair of the minimum size. shuffled: the
    placebo, cohorts of the same sizes whose users are drawn at random. one: one cohort of the chosen pair.
    file: a cohorts.json. none: no auxiliary cohort, only `overrides`."""
    axis: str = ""
    """Axis that the cohorts are chosen or drawn from, in place of discover.axes; empty: as discover.axes says. A
    placebo takes the sizes of the pair chosen on it. An arm is compared with the placebos of its own axis."""
    keep: Literal["head", "tail"] = "head"
    """The cohort that cohorts = "one" keeps."""
    file: str = ""
    """Path of the cohorts.json of cohorts = "file"."""
    draw: int = 0
    """Number of the draw of cohorts = "random" and "shuffled": another number, another draw. Of few pairs two draws may
    be the same, and "random" may draw the "least" one; the report says so."""
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings that differ from the baseline's, by dotted name: {"train.optimizer.dense_lr" = 0.002}."""
    select: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings to choose from, by dotted name: {"train.auxiliary_lambda" = [0.1, 0.3, 1.0]}. Every combination is
    trained on every seed; the one of lowest mean validation NE is kept. Test data play no part."""

    @property
    def discovers(self) -> bool:
        """Whether its cohorts come from discovery."""
        return self.cohorts not in ("none", "file")

    def problems(self) -> Problems:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name) or self.name == BASELINE:
            yield "name", f"must be letters, digits, '-' or '_', and not '{BASELINE}'; is '{self.name}'"
        if len(self.name) > LONGEST_NAME:
            yield "name", f"names folders, so it may have {LONGEST_NAME} characters; '{self.name}' has {len(self.name)}"
        if (self.cohorts == "file") != bool(self.file):
            yield "file", "goes with cohorts = 'file'" if self.file else "needed by cohorts = 'file'"
        if self.axis and not self.discovers:
            yield "axis", f"is '{self.axis}', but cohorts = '{self.cohorts}' are not chosen on an axis"
        if self.draw < 0:
            yield "draw", f"must not be negative, is {self.draw}"
        if self.draw and self.cohorts not in ("random", "shuffled"):
            yield "draw", f"is {self.draw}, but cohorts = '{self.cohorts}' are not drawn"
        if self.keep != "head" and self.cohorts != "one":
            yield "keep", f"is '{self.keep}', but cohorts = '{self.cohorts}' are not one of a pair"
        if self.cohorts == "none" and not self.overrides and not self.select:
            yield "overrides", "needed by cohorts = 'none', which would train the baseline once more"
        yield from _setting_problems("overrides", self.overrides)
        yield from _grid_problems("select", self.select)
        for key in sorted(flat_settings(self.overrides).keys() & flat_settings(self.select).keys()):
            yield "select", f"'{key}' is in overrides too"


LONGEST_NAME = 128
"""Characters of an arm's name. File systems take 255 bytes, and the folders of an arm add a digest."""
BASELINE = "baseline"
"""Name of the arm without auxiliary cohorts, which every experiment has."""
_OWN = (
    *("seed", "experiment", "arms", "discover", "evaluate", "axes"),
    *(f"data.{name}" for name in ("train", "validation", "test", "label", "weight", "user_id", "row_id", "time")),
)
"""Settings that all arms of an experiment share: the splits, what is predicted, and by what rows are paired."""


def flat_settings(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name; TOML may have them as nested tables as well."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _setting_problems(field: str, settings: dict[str, Any]) -> Problems:
    for key in flat_settings(settings):
        own = next((o for o in _OWN if key == o or key.startswith(f"{o}.")), None)
        if own is not None:
            yield field, f"'{key}': {own} is the same for all arms"


def _grid_problems(field: str, grid: dict[str, Any]) -> Problems:
    yield from _setting_problems(field, grid)
    for key, values in flat_settings(grid).items():
        if not isinstance(values, list | tuple) or not values:
            yield field, f"'{key}': needs a list of values to choose from, is {values!r}"
        elif any(v in values[:i] for i, v in enumerate(values)):
            yield field, f"'{key}': every value must be there once, is {values!r}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Arms against the baseline over paired seeds."""

    seeds: tuple[int, ...] = (0,)
    """Every arm is trained with each seed; the arms of a seed share initialisation and data order."""
    auxiliary_lambda: float = 0.3
    """lambda of the arms with auxiliary cohorts that do not set train.auxiliary_lambda themselves."""
    discover_on: Literal["validation", "train"] = "validation"
    """Split whose baseline scores cohorts are discovered on."""
    select: dict[str, Any] = dataclasses.field(default_factory=dict)
    """As `select` of an arm, for the baseline. What it chooses, the arms start from."""

    def problems(self) -> Problems:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            yield "seeds", f"must be distinct, not negative and not empty, is {list(self.seeds)}"
        if not 0 < self.auxiliary_lambda <= LARGEST_FACTOR:
            yield "auxiliary_lambda", f"must lie in (0, {LARGEST_FACTOR:g}], is {self.auxiliary_lambda}"
        yield from _grid_problems("select", self.select)
