"""Trainings and scores of an experiment: each is done once, by whichever process takes it."""

import contextlib
import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from c2al.config import Config, replace
from c2al.data.cohorts import write_cohorts
from c2al.distributed.checkpoint import CheckpointReader
from c2al.distributed.process import World
from c2al.errors import DataError
from c2al.experiment.folder import Result, claim, read_result, write_result
from c2al.experiment.plan import Trial, arm_trials, arms_of, baseline_trials
from c2al.report.record import TrialRecord
from c2al.training.score import score
from c2al.training.trainer import train

T = TypeVar("T")

POLL_SECONDS = 2.0
"""Between two looks at a training that another process is doing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """The part of an experiment that one process takes; empty: everything."""

    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


class Bench:
    """Does the trainings and scores of one experiment that are not done yet. Every method is collective."""

    def __init__(self, config: Config, output: Path, world: World, share: Share):
        self.config, self.output, self.world, self.share = config, output, world, share
        self.seeds = config.experiment.seeds
        self.worked = False
        """Whether this process has done anything since somebody last set this to False."""
        self._fitted = baseline_trials(config)[0].folder(output, self.seeds[0]) / "run"
        """The training whose statistics the others take over, if they fit."""
        arms = [arm_trials(arm, config, ()) for arm in arms_of(config)]
        self._trainings = len(self.seeds) * sum(map(len, (baseline_trials(config), *arms)))
        self._met: set[Path] = set()
        """Trainings that this process has come to, whoever did them."""
        self._told: set[str] = set()

    def baseline(self) -> tuple[list[Trial], int]:
        """(trials, the selected one). Everything else starts from it, so all of it is waited for."""
        trials = baseline_trials(self.config)
        for wait, seeds in ((False, self.own_seeds), (True, self.seeds)):
            for seed in seeds:
                for trial in trials:
                    self.train(trial, seed, wait)
        selected = self.select(trials)
        assert selected is not None
        return trials, selected

    @property
    def own_seeds(self) -> tuple[int, ...]:
        """The seeds that this process trains."""
        return self.share.seeds or self.seeds

    def train(self, trial: Trial, seed: int, wait: bool) -> Result | None:
        """The training's result. While another process is at it: waits, or returns None."""
        folder = trial.folder(self.output, seed)
        self._met.add(folder)

        def work() -> None:
            self.tell(f"{trial.title}, seed {seed} (training {len(self._met)} of {self._trainings})")
            begun = time.monotonic()
            cohorts = self._cohorts_file(trial) if trial.cohorts else None
            ne = train(replace(trial.config, seed=seed), folder / "run", self.world, cohorts, self._fitted)
            seconds = time.monotonic() - begun
            steps = CheckpointReader(folder / "run" / "checkpoints", self.world).finished()[-1][1].step
            self.world.once(lambda: write_result(folder, Result(ne, steps, seconds)))

        return self.do(folder, lambda: read_result(folder), work, wait)

    def score(self, trial: Trial, seed: int, split: Sequence[str], name: str, wait: bool) -> Path | None:
        """Folder of the training's scores on a split, or None while another process is at it.

        The name carries a digest of the columns that are carried along, so a changed axis scores anew.
        """
        columns = " ".join(sorted(self.config.judged_columns))
        folder = trial.folder(self.output, seed)
        scores = folder / f"{name}-{hashlib.sha256(columns.encode()).hexdigest()[:6]}"

        def work() -> None:
            self.tell(f"{trial.title}, seed {seed}: {name}")
            config = dataclasses.replace(trial.config, seed=seed, axes=self.config.axes, evaluate=self.config.evaluate)
            score(folder / "run", split, scores, self.world, config=config)

        return self.do(folder, lambda: scores if scores.exists() else None, work, wait)

    def select(self, trials: Sequence[Trial]) -> int | None:
        """The trial of lowest mean validation NE over all seeds; None while a result is missing."""
        records = self.world.once(lambda: [self.trial_record(t) for t in trials])
        if any(r is None for r in records):
            return None
        means = [(r.mean_ne if r.mean_ne is not None else float("inf"), i) for i, r in enumerate(records) if r]
        best, selected = min(means)
        if best == float("inf") and len(trials) > 1:
            raise DataError(
                f"data.validation: NE is undefined there for every setting of {trials[0].arm} (labels of one class?), "
                "so that none can be chosen"
            )
        if len(trials) > 1:
            self.tell(f"{trials[selected].title} is kept, of {len(trials)} settings (mean validation NE {best:.5f})")
        return selected

    def tell(self, what: str) -> None:
        """Says on rank 0, once, what this process is about or has found."""
        if self.world.rank == 0 and what not in self._told:
            print(f"experiment: {what}", file=sys.stderr, flush=True)
        self._told.add(what)

    def trial_record(self, trial: Trial) -> TrialRecord | None:
        """None while a seed's result is missing. Reads files, so on rank 0 only."""
        results = [read_result(trial.folder(self.output, seed)) for seed in self.seeds]
        if any(r is None for r in results):
            return None
        return TrialRecord(
            name=trial.name, settings=trial.settings, validation_ne=tuple(r.validation_ne for r in results if r)
        )

    def _cohorts_file(self, trial: Trial) -> Path:
        path = self.output / "trainings" / trial.name / "cohorts.json"
        self.world.once(lambda: write_cohorts(path, trial.cohorts, f"arm {trial.arm}"))
        return path

    def do(self, folder: Path, done: Callable[[], T | None], work: Callable[[], None], wait: bool) -> T | None:
        """What `done` returns after `work` has been done once, here or by another process."""
        while (found := self.world.once(done)) is None:
            with self._claim(folder) as mine:
                if mine and self.world.once(done) is None:
                    work()
                    self.worked = True
            if not mine and not wait:
                return None
            if not mine:
                time.sleep(POLL_SECONDS)
        return found

    @contextlib.contextmanager
    def _claim(self, folder: Path) -> Iterator[bool]:
        with contextlib.ExitStack() as stack:
            yield self.world.once(lambda: stack.enter_context(claim(folder)))
