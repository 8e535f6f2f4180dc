"""What a scan was asked: its inputs by content, its axes, columns and settings.

The record stands beside an unfinished scan and beside a finished result (scan.json). With it, the
next command knows whether it is the same one: it then goes on, or says that the result is there. Any
other command is refused, with the difference in words.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from c2al.config import Axis, DiscoverConfig
from c2al.data.identity import FileIdentity, differences
from c2al.discovery.axes import Columns
from c2al.errors import StateError
from c2al.state import read_state, write_state

FORMAT, VERSION = "c2al.scan", 1
SCAN = "scan.json"
"""Name of the record in a finished output."""

SPEED = ("threads", "checkpoint_seconds")
"""Settings that change no result."""
COUNTING = ("jackknife", "cut_tolerance", "prediction", "label")
"""Settings that the counts depend on; the others only decide between the cohorts that are counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanRecord:
    """One scan, or one merge of scans."""

    axes: tuple[Axis, ...]
    columns: Columns
    settings: DiscoverConfig
    earlier_cuts: dict[str, tuple[float, ...]]
    """Of percentile axes that keep the cuts of an earlier scan."""
    files: tuple[FileIdentity, ...]


def scan_differences(before: ScanRecord, now: ScanRecord, *, counting_only: bool = False) -> list[str]:
    """What a command asks otherwise than an earlier one, in words; empty: it is the same command.

    counting_only: leaves out the settings that decide between cohorts after they are counted.
    """
    found = differences(before.files, now.files)
    found += [
        f"{name} were {was}, are {is_now}"
        for name, was, is_now in (
            ("axes", _words(before.axes), _words(now.axes)),
            ("columns", dataclasses.asdict(before.columns), dataclasses.asdict(now.columns)),
            ("given cuts", before.earlier_cuts, now.earlier_cuts),
        )
        if was != is_now
    ]
    for field in dataclasses.fields(DiscoverConfig):
        was, is_now = getattr(before.settings, field.name), getattr(now.settings, field.name)
        if was != is_now and field.name not in SPEED and (field.name in COUNTING or not counting_only):
            found.append(f"discover.{field.name} was {was!r}, is {is_now!r}")
    return found


def _words(axes: Sequence[Axis]) -> list[str]:
    """Each axis by the fields that say something."""
    return [", ".join(f"{k} = {v!r}" for k, v in dataclasses.asdict(a).items() if v not in ("", ())) for a in axes]


def write_record(folder: Path, record: ScanRecord) -> None:
    write_state(folder / SCAN, record, format=FORMAT, version=VERSION)


def read_record(folder: Path) -> ScanRecord:
    """The record of a finished output. Raises StateError naming its file if it is not one."""
    return read_state(folder / SCAN, ScanRecord, format=FORMAT, version=VERSION, error=StateError)
