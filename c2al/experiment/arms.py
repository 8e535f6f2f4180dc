"""One arm after the other: its cohorts, its trainings, the setting that it keeps, its scores."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from c2al.config import BASELINE, Arm, Config, dump_config
from c2al.data.cohorts import CohortSpec
from c2al.discovery.discover import discover
from c2al.errors import CohortError
from c2al.experiment.bench import Bench
from c2al.experiment.choose import cohorts_of
from c2al.experiment.plan import Trial, arm_trials
from c2al.report.densities import draw_densities
from c2al.report.record import ArmRecord


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
    depends = "".join(map(dump_config, (*config.axes, config.discover))) + str(scores)
    folder = bench.output / f"cohorts-{hashlib.sha256(depends.encode()).hexdigest()[:10]}"

    def work() -> None:
        discover([str(scores)], config.axes, config.discover, folder, bench.world, config.data)
        bench.world.once(lambda: draw_densities(folder))

    try:
        bench.do(
            bench.output / ".claims" / folder.name,
            lambda: folder if (folder / "densities.svg").exists() else None,
            work,
            wait=True,
        )
    except CohortError as e:
        return Discovery(folder=None, finding=str(e))
    return Discovery(folder=folder, finding="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """An arm with its cohorts and trials, or with the finding that ends it."""

    arm: Arm
    cohorts: tuple[CohortSpec, ...]
    trials: tuple[Trial, ...]
    finding: str


def plan_arm(bench: Bench, arm: Arm, base: Config, discovery: Discovery) -> Plan:
    """Chooses the arm's cohorts. A CohortError there is a finding, not a failure of the experiment."""
    folder = discovery.folder
    if arm.cohorts not in ("none", "file") and folder is None:
        return Plan(arm=arm, cohorts=(), trials=(), finding=discovery.finding)
    try:
        cohorts = bench.world.once(lambda: cohorts_of(arm, bench.config, folder))
    except CohortError as e:
        return Plan(arm=arm, cohorts=(), trials=(), finding=str(e).removeprefix("rank 0: "))
    return Plan(arm=arm, cohorts=cohorts, trials=tuple(arm_trials(arm, base, cohorts)), finding="")


def train_arm(bench: Bench, plan: Plan) -> None:
    """Trains this process's share of the arm: what no other process is doing."""
    if bench.share.arms and plan.arm.name not in bench.share.arms:
        return
    for seed in bench.own_seeds:
        for trial in plan.trials:
            bench.train(trial, seed, wait=False)


def finish_arm(
    bench: Bench, name: str, source: str, trials: Sequence[Trial], cohorts: Sequence[CohortSpec]
) -> ArmRecord | None:
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
        name=name,
        source=source,
        cohorts=tuple(f"{c.label}: {c.axis} = {c.name}" for c in cohorts),
        trials=tuple(r for r in records if r is not None),
        selected=selected,
        scores=tuple(str(folder.relative_to(bench.output)) for folder in folders if folder),
        finding="",
    )


def baseline_record(bench: Bench, trials: Sequence[Trial]) -> ArmRecord | None:
    return finish_arm(bench, BASELINE, "none", trials, ())


def arm_record(bench: Bench, plan: Plan) -> ArmRecord | None:
    """None while something of the arm is still to be done."""
    if plan.finding:
        return ArmRecord(
            name=plan.arm.name,
            source=plan.arm.cohorts,
            cohorts=(),
            trials=(),
            selected=None,
            scores=(),
            finding=plan.finding,
        )
    return finish_arm(bench, plan.arm.name, plan.arm.cohorts, plan.trials, plan.cohorts)
