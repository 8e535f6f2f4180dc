"""The folder of a scan that is under way: what it was asked, its cuts, and the counts so far.

A killed scan leaves accumulators together with the row groups they hold; the next run of the same
scan, on any number of ranks, counts only the others.
"""

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path

from c2al.discovery.accumulators import Accumulators
from c2al.discovery.axes import cut_problem
from c2al.discovery.histogram import Counts
from c2al.discovery.record import ScanRecord, scan_differences
from c2al.discovery.saved import Unit, load_accumulators, save_accumulators
from c2al.errors import CheckpointError
from c2al.state import read_state, write_state

FORMAT, VERSION = "c2al.unfinished_scan", 1
_CUTS = "cuts.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Begun:
    """A scan whose cuts are known."""

    record: ScanRecord
    cuts: dict[str, tuple[float, ...]]


class Unfinished:
    """Checkpoints of one scan in `folder`, which all ranks share."""

    def __init__(self, folder: Path, record: ScanRecord):
        self._folder, self._record = folder, record

    def cuts(self) -> dict[str, tuple[float, ...]] | None:
        """The cuts an interrupted scan found, if it got so far.

        Raises CheckpointError naming the file when it is damaged or of another scan.
        """
        path = self._folder / _CUTS
        if not path.exists():
            return None
        begun = read_state(path, _Begun, format=FORMAT, version=VERSION, error=CheckpointError)
        self._check(path, begun.record)
        if problem := cut_problem(self._record.axes, begun.cuts):
            raise CheckpointError(f"{path}: damaged: {problem}")
        return begun.cuts

    def save_cuts(self, cuts: dict[str, tuple[float, ...]]) -> None:
        begun = _Begun(record=self._record, cuts=cuts)
        write_state(self._folder / _CUTS, begun, format=FORMAT, version=VERSION)

    def saved(self) -> list[Path]:
        """The accumulators that are there."""
        return sorted(self._folder.glob("*.npz"))

    def load(self, path: Path, empty: Accumulators) -> tuple[Accumulators, tuple[Unit, ...]]:
        """(accumulators, the row groups they hold).

        `empty`: the accumulators of this scan before its first row. Raises CheckpointError naming the
        file when it is damaged, of another scan, or names a row group that is not there.
        """
        total, finished = load_accumulators(path)
        now = self._record
        before = dataclasses.replace(
            now,
            axes=total.axes,
            columns=total.columns,
            settings=dataclasses.replace(now.settings, jackknife=total.jackknife),
            files=total.files,
        )
        self._check(path, before)
        if total.cuts != empty.cuts:
            raise CheckpointError(f"{path}: belongs to another scan: cuts {total.cuts} are not {empty.cuts}")
        rows = [f.row_group_rows for f in self._record.files]
        if finished is None or len(set(finished)) < len(finished):
            raise CheckpointError(f"{path}: damaged: it does not say once which row groups it holds")
        for file, row_group in finished:
            if not (0 <= file < len(rows) and 0 <= row_group < len(rows[file])):
                raise CheckpointError(f"{path}: damaged: there is no row group {row_group} of file {file}")
        return total, finished

    def _check(self, path: Path, before: ScanRecord) -> None:
        found = scan_differences(before, self._record, counting_only=True)
        if found:
            raise CheckpointError(
                f"{path}: belongs to another scan: {'; '.join(found)}; remove {self._folder} to count anew, "
                "or name another --output"
            )


class Checkpoint:
    """One rank's counts, saved together with the row groups they hold."""

    def __init__(self, empty: Accumulators, folder: Path, number: int, rank: int):
        """`number`: of files that are there already, which this one does not replace."""
        self.total = empty
        self._path = folder / f"{number:06d}-{rank:05d}.npz"
        self._units: list[Unit] = []
        self._lock = threading.Lock()

    def add(self, counts: tuple[Counts, ...], units: Sequence[Unit]) -> None:
        """Adds finished row groups and their counts, and saves."""
        with self._lock:
            self.total = self.total.plus(counts)
            self._units += units
            save_accumulators(self._path, self.total, self._units)
