"""One arm after the other: its cohorts, its trainings, the setting that it keeps, its scores."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from c2al.config import BASELINE, Arm, Config, dump_config
from c2al.data.cohorts import CohortSpec
from c2al.discovery.discover import discover, merge
from c2al.errors import CohortError, NotFiniteError
from c2al.experiment.bench import Bench
from c2al.experiment.choose import cohorts_of, on_axis
from c2al.experiment.plan import Trial, arm_trials
from c2al.report.densities import draw_densities
from c2al.report.record import ArmRecord

_RANK = re.compile(r"^rank \d+: ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discovery:
    """Where discovery wrote, or why it came to nothing."""

    folder: Path | None
    finding: str


def run_discovery(bench: Bench, baseline: Trial) -> Discovery:
    """Discovery on the first seed's baseline scores; again only if axes, rule or baseline have changed.

    Cuts that do not fit the scored rows are a finding about the data, as is an axis with one cohort: the
    arms that need cohorts end with it, the experiment goes on.
    """
    config = bench.config
    split = config.data.validation if config.experiment.discover_on == "validation" else config.data.train
    scores = bench.score(baseline, bench.seeds[0], split, f"scores_{config.experiment.discover_on}", wait=True)

    assert scores is not None

    def work(folder: Path) -> None:
        bench.tell(f"discovery of cohorts on the {config.experiment.discover_on} split")
        discover([str(scores)], config.axes, config.discover, folder, bench.world, config.data)

    try:
        return Discovery(folder=_choose_once(bench, config, scores, work), finding="")
    except CohortError as e:
        return Discovery(folder=None, finding=str(e))


def discovery_on(bench: Bench, everywhere: Discovery, axis: str) -> Discovery:
    """The choice from one axis, on the counts of `everywhere`: no score is read again. `everywhere` for axis ""."""
    if not axis or everywhere.folder is None:
        return everywhere
    config, counted = on_axis(bench.config, axis), everywhere.folder

    def work(folder: Path) -> None:
        bench.world.once(lambda: merge([counted], config.discover, folder) and None)

    return Discovery(folder=_choose_once(bench, config, counted, work), finding="")


def _choose_once(bench: Bench, config: Config, source: Path, work: Callable[[Path], None]) -> Path:
    """The folder of a choice by `config.discover` on `source`, made by `work` here or in another process.

    Its name does not depend on where the experiment lies: a folder that was moved, or that two hosts see under
    two paths, holds one choice.
    """
    depends = "".join(map(dump_config, (*config.axes, config.discover))) + source.relative_to(bench.output).as_posix()
    folder = bench.output / f"cohorts-{hashlib.sha256(depends.encode()).hexdigest()[:10]}"

    def work_and_draw() -> None:
        work(folder)
        bench.world.once(lambda: draw_densities(folder))

    def done() -> Path | None:
        return folder if (folder / "densities.svg").exists() else None

    found = bench.do(bench.output / ".claims" / folder.name, done, work_and_draw, wait=True)
    assert found is not None
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """An arm with its cohorts and trials, or with the finding that ends it."""

    arm: Arm
    cohorts: tuple[CohortSpec, ...]
    trials: tuple[Trial, ...]
    finding: str
    discovery: Discovery
    """What its cohorts were chosen by, if they were."""


def plan_arm(bench: Bench, arm: Arm, base: Config, everywhere: Discovery) -> Plan:
    """Chooses the arm's cohorts. A CohortError there is a finding, not a failure of the experiment."""
    discovery = discovery_on(bench, everywhere, arm.axis)
    folder = discovery.folder
    if arm.discovers and folder is None:
        return Plan(arm=arm, cohorts=(), trials=(), finding=discovery.finding, discovery=discovery)
    try:
        cohorts = bench.world.once(lambda: cohorts_of(arm, bench.config, folder))
    except CohortError as e:
        return Plan(arm=arm, cohorts=(), trials=(), finding=_RANK.sub("", str(e)), discovery=discovery)
    trials = tuple(arm_trials(arm, base, cohorts))
    return Plan(arm=arm, cohorts=cohorts, trials=trials, finding="", discovery=discovery)


def train_arm(bench: Bench, plan: Plan) -> Plan:
    """Trains this process's share of the arm: what no other process is doing.

    Cohorts that have no row or no positive in the training split, and a loss that is not finite, end the arm: the
    plan comes back with that finding, and the other arms go on.
    """
    if bench.share.arms and plan.arm.name not in bench.share.arms:
        return plan
    try:
        for seed in bench.own_seeds:
            for trial in plan.trials:
                bench.train(trial, seed, wait=False)
    except (CohortError, NotFiniteError) as e:
        return dataclasses.replace(plan, cohorts=(), trials=(), finding=_RANK.sub("", str(e)))
    return plan


def finish_arm(bench: Bench, arm: Arm, trials: Sequence[Trial], cohorts: Sequence[CohortSpec]) -> ArmRecord | None:
    """Selects the arm's setting and scores the test split with it; None while a training or a score is missing."""
    selected = bench.select(trials)
    if selected is None:
        return None
    folders = [
        bench.score(trials[selected], seed, bench.config.data.test, "scores_test", wait=False) for seed in bench.seeds
    ]
    if any(folder is None for folder in folders):
        return None
    records = bench.world.once(lambda: [bench.trial_record(t) for t in trials])
    return ArmRecord(
        name=arm.name,
        source=arm.cohorts,
        axis=arm.axis,
        cohorts=tuple(f"{c.label}: {c.axis} = {c.name}" for c in cohorts),
        trials=tuple(r for r in records if r is not None),
        selected=selected,
        scores=tuple(str(folder.relative_to(bench.output)) for folder in folders if folder),
        finding="",
    )


def baseline_record(bench: Bench, trials: Sequence[Trial]) -> ArmRecord | None:
    return finish_arm(bench, Arm(name=BASELINE, cohorts="none"), trials, ())


def arm_record(bench: Bench, plan: Plan) -> ArmRecord | None:
    """None while something of the arm is still to be done."""
    if plan.finding:
        return ArmRecord(
            name=plan.arm.name,
            source=plan.arm.cohorts,
            axis=plan.arm.axis,
            cohorts=(),
            trials=(),
            selected=None,
            scores=(),
            finding=plan.finding,
        )
    return finish_arm(bench, plan.arm, plan.trials, plan.cohorts)
