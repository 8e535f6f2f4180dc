"""How often each task is positive in training: where the biases of the prediction heads start.

A prediction head that starts at a rate of one half teaches the base rate to every embedding row first, and row-wise
Adagrad keeps those large first gradients in its sums for good.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from c2al.config import Config
from c2al.data.cohorts import CohortSpec
from c2al.data.encode import Encoder
from c2al.data.source import File, open_dataset
from c2al.data.statistics import Statistics
from c2al.distributed.process import World
from c2al.errors import CohortError
from c2al.nn.objective import Target
from c2al.state import read_state, write_state

FORMAT = "c2al.base_rates"
VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
    """Weighted rows of the training split, or of one cohort in it."""

    rows: int
    weight: float
    """Sum of the sample weights."""
    positives: float
    """Sum of weight * label."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseRates:
    """Counts of the training split (base_rates.json)."""

    all: Count
    cohorts: tuple[Count, ...]
    """One per chosen cohort, in their order."""

    def rates(self, target: Target) -> tuple[float, ...]:
        """(T,) share of positives of each task, the primary one first, in (0, 1).

        A task that is always or never positive gets half a row of the other class, so that its log-odds
        are finite.
        """
        auxiliary = [c.weight if target == "membership" else c.positives for c in self.cohorts]
        least = 0.5 / self.all.rows
        return tuple(min(max(p / self.all.weight, least), 1 - least) for p in (self.all.positives, *auxiliary))

    def write(self, path: Path) -> None:
        write_state(path, self, format=FORMAT, version=VERSION)

    @staticmethod
    def read(path: Path) -> "BaseRates":
        """Raises StateError naming the file and what is wrong with it."""
        return read_state(path, BaseRates, format=FORMAT, version=VERSION)


def count_base_rates(config: Config, cohorts: Sequence[CohortSpec], world: World, source: str = "cohorts") -> BaseRates:
    """Counts the training split. Collective: all ranks share the scan, which reads the label, the weight and
    the columns of the cohorts.

    Sums are taken per row group and added exactly, so the counts are the same, bit for bit, for any number
    of ranks. Raises DataError naming a value that is no label or no weight, CohortError for a cohort without
    rows or positives, whose prediction head would learn nothing but its bias; `source` names their file.
    """
    # An encoder without features, so that labels and weights are what they are in training.
    bare = dataclasses.replace(config.data, dense=(), sparse=())
    encoder = Encoder(bare, Statistics(moments={}, vocabularies={}), cohorts, ())
    files = world.together(lambda: open_dataset(config.data.train))
    groups = [(file, i) for file in files for i, rows in enumerate(file.row_group_rows) if rows]
    counted = world.share(groups, lambda group: _count(*group, encoder))
    total = [_sum(column) for column in zip(*counted, strict=True)]
    rates = BaseRates(all=total[0], cohorts=tuple(total[1:]))
    _refuse_empty(rates, cohorts, config, source)
    return rates


def _count(file: File, group: int, encoder: Encoder) -> list[Count]:
    """Counts of one row group: all rows, then each cohort."""
    rows = encoder.encode(file.read(group, encoder.columns), file.where(group))
    weight_N = rows.weight_N.astype("float64")
    members = [weight_N > 0, *(rows.member_NC.T > 0)]
    return [
        Count(
            rows=int(in_N.sum()),
            weight=float(weight_N[in_N].sum()),
            positives=float((weight_N * rows.label_N)[in_N].sum()),
        )
        for in_N in members
    ]


def _sum(counts: Sequence[Count]) -> Count:
    # fsum rounds once, so the order of the row groups does not matter.
    return Count(
        rows=sum(c.rows for c in counts),
        weight=math.fsum(c.weight for c in counts),
        positives=math.fsum(c.positives for c in counts),
    )


def _refuse_empty(rates: BaseRates, cohorts: Sequence[CohortSpec], config: Config, source: str) -> None:
    empty = [
        f"{source}: the {spec.label} cohort {spec.axis} = {spec.name} has "
        + (f"{count.rows} rows but no positives" if count.rows else "no rows")
        + f" in data.train ({', '.join(config.data.train)})"
        for spec, count in zip(cohorts, rates.cohorts, strict=True)
        if not count.positives
    ]
    if empty:
        raise CohortError("\n".join(empty))
