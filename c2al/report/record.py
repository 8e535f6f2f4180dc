"""experiment.json: what an experiment did, for the report and for people."""

import dataclasses
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from c2al.config import Arm
from c2al.state import read_state, write_state

FILE, FORMAT, VERSION = "experiment.json", "c2al.experiment", 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One combination of an arm's settings, on all seeds."""

    name: str
    """Of its folder in trainings/."""
    settings: dict[str, Any]
    validation_ne: tuple[float | None, ...]
    """By seed, in the order of experiment.seeds."""

    @property
    def mean_ne(self) -> float | None:
        """Mean validation NE over the seeds; None where it is undefined for one."""
        values = [v for v in self.validation_ne if v is not None]
        return sum(values) / len(values) if len(values) == len(self.validation_ne) and values else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmRecord:
    """One arm."""

    name: str
    source: str
    """Arm.cohorts, or "none" for the baseline."""
    axis: str = ""
    """Arm.axis: the axis that its cohorts were chosen on, if the arm names one."""
    cohorts: tuple[str, ...]
    """What its auxiliary cohorts are, for people."""
    trials: tuple[TrialRecord, ...]
    selected: int | None
    """Index into `trials` of the one whose test scores are compared; None when the arm came to nothing."""
    scores: tuple[str, ...]
    """Score folders of the selected trial on the test split, by seed, relative to the experiment."""
    finding: str
    """Why the arm came to nothing; empty otherwise."""

    @property
    def chosen(self) -> TrialRecord | None:
        """The selected trial."""
        return None if self.selected is None else self.trials[self.selected]

    def folders(self, seeds: tuple[int, ...]) -> tuple[str, ...]:
        """Folder of the selected trial's training with each seed, relative to the experiment."""
        return tuple(f"trainings/{self.chosen.name}/seed_{s}" for s in seeds) if self.chosen else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What experiment.json holds."""

    seeds: tuple[int, ...]
    discovery: str
    """Folder of discovery on the main arm's axis, relative to the experiment; empty when it came to nothing. Its
    chosen pair is what the evaluation calls head and tail."""
    finding: str
    """Why discovery came to nothing; empty otherwise."""
    baseline: ArmRecord
    arms: tuple[ArmRecord, ...]
    serving: str = ""
    """Training whose model is in serving/, relative to the experiment; empty when none is."""

    @property
    def done(self) -> tuple[ArmRecord, ...]:
        """The arms that came to something."""
        return tuple(a for a in self.arms if a.selected is not None)

    @property
    def main(self) -> ArmRecord | None:
        """The arm that the verdict is about: the first with chosen cohorts, or else the first that is no placebo."""
        ranked = sorted(self.done, key=lambda a: (a.source != "chosen", a.source == "shuffled"))
        return ranked[0] if ranked else None

    @property
    def placebo(self) -> ArmRecord | None:
        """The first placebo of the main arm's axis that came to something and is not the main arm."""
        main = self.main
        mine = (a for a in self.done if a.source == "shuffled" and a is not main and main and a.axis == main.axis)
        return next(mine, None)

    def write(self, output: Path) -> None:
        write_state(output / FILE, self, format=FORMAT, version=VERSION)


def repeated(arms: Sequence[tuple[Arm, Hashable]]) -> dict[str, str]:
    """Arm -> an earlier arm that came to the same cohorts in another way; `arms` are all, with their cohorts.

    A random pair may be the least divergent one, and of few pairs two draws may meet. Such arms are one answer and
    not two. Arms that ask for the same cohorts in the same words share them on purpose and are not among them.
    """
    found: dict[str, str] = {}
    for i, (arm, cohorts) in enumerate(arms):
        for earlier, others in arms[:i]:
            if cohorts and cohorts == others and _asked(arm) != _asked(earlier):
                found.setdefault(arm.name, earlier.name)
    return found


def same_training(arms: Sequence[ArmRecord]) -> dict[str, str]:
    """Arm -> an earlier arm whose selected trial has the same digest: the same settings, data and cohorts."""
    found: dict[str, str] = {}
    first: dict[str, str] = {}
    for arm in arms:
        if arm.chosen is not None:
            digest = arm.chosen.name.rpartition("-")[2]
            if digest in first:
                found[arm.name] = first[digest]
            first.setdefault(digest, arm.name)
    return found


def _asked(arm: Arm) -> tuple[str, str, str, str, int]:
    return arm.cohorts, arm.axis, arm.keep, arm.file, arm.draw


def read_record(output: Path) -> Record:
    """Raises StateError naming the file."""
    return read_state(output / FILE, Record, format=FORMAT, version=VERSION)
