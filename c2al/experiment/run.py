"""Arms against the baseline over paired seeds, and one report.

The trainings of a seed share data order and the initialisation of everything they have in common; they
differ in what their arm says. Cohorts come from the first seed's baseline. Every training is a folder
that is found again, so the same command goes on where an earlier one stopped, and several processes or
hosts may work on one folder: each takes what no other one is doing.
"""

import dataclasses
import shutil
from pathlib import Path

from c2al.config import BASELINE, Arm, Config
from c2al.data.cohorts import read_cohorts
from c2al.data.schema import check_columns
from c2al.data.source import open_dataset
from c2al.distributed.process import World
from c2al.errors import CohortError, ConfigError
from c2al.evaluation.evaluate import evaluate
from c2al.evaluation.result import COHORT, OVERALL, Evaluation
from c2al.evaluation.result import Arm as EvaluatedArm
from c2al.experiment.arms import Discovery, Plan, arm_record, baseline_record, plan_arm, run_discovery, train_arm
from c2al.experiment.bench import Bench, Share
from c2al.experiment.folder import SPLITS, claim, start
from c2al.experiment.plan import Trial, arm_trials, arms_of
from c2al.nn.methods import check_method
from c2al.report.html import write_report
from c2al.report.record import Record, read_record
from c2al.report.verdict import sentences
from c2al.serving.export import export
from c2al.state import read_json
from c2al.text import terminal

EVERYTHING = Share()


def experiment(config: Config, output: Path, world: World, command: str, share: Share = EVERYTHING) -> Path | None:
    """Does every stage that is not done yet in `output`, or `share` of them.

    Returns the path of the HTML report; None while other processes still work on the experiment: the
    report is written by whichever ends last.

    Raises ConfigError for a configuration that is no experiment or not the folder's, DataError when a
    split lacks what a stage needs (before the first step), CohortError when no pair of cohorts has the
    minimum size, and what the stages raise. That no pair of cohorts differs beyond noise is a finding of
    the arms concerned, not an error.
    """
    check(config, share)
    world.together(lambda: check_data(config))
    world.once(lambda: start(config, output, command))
    bench = Bench(config, output, world, share)
    trials, selected = bench.baseline()
    base = trials[selected]
    discovery = run_discovery(bench, base)
    plans = [plan_arm(bench, arm, base.config, discovery) for arm in arms_of(config)]
    world.together(lambda: _refuse_impossible_minimum(plans))
    record = _records(bench, trials, plans, discovery)
    if record is None:
        return None
    report = world.once(lambda: _judge(record, config, output))
    if record.serving and report is not None:
        _export(bench, record.serving)
    return report


def _refuse_impossible_minimum(plans: list[Plan]) -> None:
    """Raises CohortError when no arm can train because no pair of cohorts has the minimum size that was asked for.

    That is a setting to mend (discover.min_rows and its like), not a finding about the data: no pair was
    even compared. The trained baselines stay and the mended command goes on from them.
    """
    folders = {p.discovery.folder for p in plans if p.finding}
    if not plans or not all(p.finding for p in plans) or None in folders:
        return
    rules = [read_json(f / "cohorts.json", CohortError)["rule"] for f in folders if f]
    if all(rule["tested_pairs"] == 0 for rule in rules):
        raise CohortError(plans[0].finding)


def _export(bench: Bench, training: str) -> None:
    """Makes serving/ from a training's folder, once."""
    serving = bench.output / "serving"

    def work() -> None:
        export(bench.output / training / "run", bench.config.data.test, serving, bench.world)

    bench.do(bench.output / ".claims" / "serving", lambda: serving if serving.exists() else None, work, wait=True)


def _records(bench: Bench, trials: list[Trial], plans: list[Plan], discovery: Discovery) -> Record | None:
    """What all arms came to; None while other processes are at work on some.

    After any work of its own, this process looks again at what others were doing meanwhile. So of two that
    end together, at least one sees that everything is done.
    """
    while True:
        bench.worked = False
        for plan in plans:
            train_arm(bench, plan)
        baseline = baseline_record(bench, trials)
        arms = [arm_record(bench, plan) for plan in plans]
        done = tuple(a for a in arms if a is not None)
        if baseline is not None and len(done) == len(arms):
            record = Record(
                seeds=bench.seeds,
                discovery="",
                finding=discovery.finding,
                baseline=baseline,
                arms=done,
            )
            main = next((p.discovery for p in plans if record.main and p.arm.name == record.main.name), discovery)
            # One process alone can export.
            return dataclasses.replace(
                record,
                discovery="" if main.folder is None else main.folder.name,
                serving=serving_training(record) if bench.world.size == 1 else "",
            )
        if not bench.world.once(lambda: bench.worked):
            return None


def _judge(record: Record, config: Config, output: Path) -> Path | None:
    """Evaluates all arms and writes the report; None when another process is doing just that."""
    with claim(output / ".claims" / "report") as mine:
        if not mine:
            return None
        _drop_other_serving(record, output)
        record.write(output)
        evaluation = evaluate_record(record, config, output)
        main = tuple(s for s in evaluation.segments if s.axis in (OVERALL, COHORT))
        print(dataclasses.replace(evaluation, segments=main).table())
        print("\n" + "\n".join(map(terminal, sentences(record, evaluation))))
        return write_report(output)


def serving_training(record: Record) -> str:
    """Folder of the training that is exported: the first seed's of the first arm with chosen cohorts."""
    chosen = next((a for a in record.done if a.source == "chosen"), None)
    return chosen.folders(record.seeds)[0] if chosen else ""


def _drop_other_serving(record: Record, output: Path) -> None:
    """Removes serving/ when the model in it is not that of `record`."""
    known = output / "experiment.json"
    if known.exists() and read_record(output).serving != record.serving:
        shutil.rmtree(output / "serving", ignore_errors=True)


def evaluate_record(record: Record, config: Config, output: Path) -> Evaluation:
    """Every arm that came to something against the baseline, and against the placebos of its own axis."""
    done = [record.baseline, *(a for a in record.arms if a.selected is not None)]
    arms = [
        EvaluatedArm(name=a.name, seeds=record.seeds, folders=tuple(str(output / s) for s in a.scores)) for a in done
    ]
    placebos = [a for a in done if a.source == "shuffled"]
    treated = [a for a in done if a.source in ("chosen", "one", "random", "least", "file")]
    cohorts = output / record.discovery / "cohorts.json" if record.discovery else None
    return evaluate(
        arms,
        cohorts,
        config.axes,
        config.evaluate,
        config.seed,
        output / "evaluation",
        config.data,
        comparisons=[(arm.name, placebo.name) for arm in treated for placebo in placebos if arm.axis == placebo.axis],
    )


def check(config: Config, share: Share) -> None:
    """Raises ConfigError with every problem of a configuration that is no experiment."""
    problems = share_problems(share, config)
    if config.train.auxiliary:
        problems.append("train.auxiliary_lambda, train.lambdas: must be 0; auxiliary losses are what the arms add")
    elif config.train.needs_cohorts:
        problems.append("train.cohort_weight, train.group_dro: the baseline has no cohorts; set them in an arm")
    problems += [f"data.{s}: an experiment needs all three splits" for s in SPLITS if not getattr(config.data, s)]
    needs_axes = [a.name for a in arms_of(config) if a.discovers]
    if needs_axes and not config.axes:
        problems.append(f"axes: arm {', '.join(needs_axes)} needs at least one axis to discover cohorts on")
    for arm in arms_of(config):
        try:
            trials = arm_trials(arm, config, ())
            for trial in trials:
                check_method(trial.config.train.combine)
            problems += _unused_or_missing_cohorts(arm, trials)
        except ConfigError as e:
            problems += [f"arm '{arm.name}': {p}" for p in e.problems]
    if problems:
        raise ConfigError(problems)


def _unused_or_missing_cohorts(arm: Arm, trials: list[Trial]) -> list[str]:
    """What training would refuse of the arm, after hours of baselines."""
    wanted = {t.config.train.needs_cohorts for t in trials}
    if arm.cohorts == "none" and True in wanted:
        return [f"arm '{arm.name}': its settings need cohorts; its cohorts = 'none'"]
    if arm.cohorts != "none" and False in wanted:
        return [
            f"arm '{arm.name}': without effect on its cohorts, since lambda is 0 and neither train.cohort_weight nor "
            "train.group_dro is set, in at least one combination; cohorts = 'none' has none"
        ]
    return []


def check_data(config: Config) -> None:
    """Raises DataError when a split lacks a file, a column or a type that any stage needs: before the first step.

    Raises CohortError naming the arm and its cohorts.json when that is missing or damaged.
    """
    axes = [a.column for a in config.axes if a.column]
    given = [column for arm in config.arms if arm.cohorts == "file" for column in _columns_of_file(arm)]
    for split in SPLITS:
        carried = axes if split == "test" else [*axes, *given]  # test data are scored, and need no cohorts
        check_columns(open_dataset(getattr(config.data, split)), config.data, tuple(dict.fromkeys(carried)))


def _columns_of_file(arm: Arm) -> list[str]:
    """Columns of the cohorts in the arm's file. A file that chose none is a finding of the arm, no fault."""
    try:
        return [column for cohort in read_cohorts(arm.file).named for column in cohort.columns]
    except CohortError as e:
        raise CohortError(f"arm '{arm.name}': {e}") from e


def share_problems(share: Share, config: Config) -> list[str]:
    """What of `share` this experiment does not have."""
    known, seeds = [BASELINE, *(a.name for a in arms_of(config))], config.experiment.seeds
    wrong = [f"--arms: no arm is named '{a}'; there are {', '.join(known)}" for a in share.arms if a not in known]
    return wrong + [f"--seeds: {s} is none of experiment.seeds = {list(seeds)}" for s in share.seeds if s not in seeds]
