"""What scans counted: sums that add up over threads, ranks, shards and days."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from c2al.config import Axis
from c2al.data.identity import FileIdentity
from c2al.discovery.axes import Columns, Cuts, parts, targets
from c2al.discovery.histogram import COARSE, GROUPS, SLOTS, Counts
from c2al.errors import CohortError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accumulators:
    """Everything one scan counted, and of what."""

    axes: tuple[Axis, ...]
    cuts: dict[str, tuple[float, ...]]
    columns: Columns
    jackknife: bool
    files: tuple[FileIdentity, ...]
    """The files of the scan, whether all of their rows are counted yet or not."""
    counts: tuple[Counts, ...]
    """Of every target of `targets(axes)`."""

    @classmethod
    def empty(
        cls, axes: Sequence[Axis], cuts: Cuts, columns: Columns, *, jackknife: bool, files: Sequence[FileIdentity] = ()
    ) -> "Accumulators":
        """Nothing counted yet."""
        nothing = Counts((), np.zeros((0, SLOTS, 2, 2), np.int64), np.zeros((0, GROUPS * jackknife, COARSE), np.int64))
        return cls(
            axes=tuple(axes),
            cuts=dict(cuts),
            columns=columns,
            jackknife=jackknife,
            files=tuple(files),
            counts=(nothing,) * len(targets(axes)),
        )

    def plus(self, counts: Sequence[Counts]) -> "Accumulators":
        """With the counts of further rows of the same files, target by target."""
        return dataclasses.replace(self, counts=tuple(a + b for a, b in zip(self.counts, counts, strict=True)))

    def merged(self, other: "Accumulators", name: str, other_name: str) -> "Accumulators":
        """With the counts of a scan of other files; the names are those of the two in messages.

        Raises CohortError naming what differs where the two did not count the same thing (counts
        between other cuts, or of another model's predictions, cannot be added), and naming a file
        that both counted.
        """
        for field, hint in (("axes", ""), ("columns", ""), ("cuts", "; scan it again with --cuts"), ("jackknife", "")):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise CohortError(f"{other_name}: {field} {theirs} are not those of {name}: {mine}{hint}")
        own = {content(f): f for f in self.files}
        twice = [(own[content(f)].name, f.name) for f in other.files if content(f) in own]
        if twice:
            first, second = twice[0]
            same = f"'{second}'" if first == second else f"'{second}', which is '{first}' by its content,"
            more = f" (and {len(twice) - 1} more files)" if len(twice) > 1 else ""
            raise CohortError(f"{other_name}: file {same} is counted in {name} already{more}")
        return dataclasses.replace(self.plus(other.counts), files=self.files + other.files)

    def of_axis(self, axis: Axis) -> Counts:
        """The counts of one declared axis; key components in the order of `parts`."""
        wanted = parts(axis, self.axes)
        target, counts = next(
            (t, c) for t, c in zip(targets(self.axes), self.counts, strict=True) if set(wanted) <= set(t)
        )
        return counts.marginal([target.index(a) for a in wanted])


def content(file: FileIdentity) -> tuple[int, str, str]:
    """What two files with the same content have in common, wherever they lie."""
    return file.size, file.footer_sha256, file.pages_sha256
