"""Arms against the baseline over paired seeds, and one report.

The trainings of a seed share data order and the initialisation of everything they have in common; they
differ in what their arm says. Cohorts come from the first seed's baseline. Every training is a folder
that is found again, so the same command goes on where an earlier one stopped, and several processes or
hosts may work on one folder: each takes what no other one is doing.
"""

import dataclasses
import shutil
import sys
from pathlib import Path

from c2al.config import Config
from c2al.distributed.process import World
from c2al.errors import CohortError
from c2al.evaluation.evaluate import evaluate
from c2al.evaluation.result import COHORT, OVERALL, Evaluation
from c2al.evaluation.result import Arm as EvaluatedArm
from c2al.experiment.arms import Discovery, Plan, arm_record, baseline_record, plan_arm, run_discovery, train_arm
from c2al.experiment.bench import Bench, Share
from c2al.experiment.check import check, check_data
from c2al.experiment.folder import claim, describe_itself, start
from c2al.experiment.plan import Trial, arms_base, arms_of
from c2al.report.html import write_report
from c2al.report.record import Record, read_record, repeated
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
    # Rows of the test split that no model could score are found before the arms are trained.
    bench.score(trials[selected], bench.seeds[0], config.data.test, "scores_test", wait=False)
    discovery = run_discovery(bench, trials[selected])
    base = arms_base(config, trials[selected])
    plans = [plan_arm(bench, arm, base, discovery) for arm in arms_of(config)]
    world.together(lambda: _refuse_impossible_minimum(plans))
    if world.rank == 0:
        for arm, other in repeated([(p.arm, p.cohorts) for p in plans]).items():
            print(f"experiment: arm '{arm}' has the same cohorts as arm '{other}'", file=sys.stderr)
    record = _records(bench, trials, plans, discovery)
    if record is None:
        return None
    report = world.once(lambda: _judge(bench, record, command))
    if report is not None and (training := serving_training(record)):
        _export(bench, training)
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
    if bench.world.size > 1:
        if not bench.world.once(serving.exists) and bench.world.rank == 0:
            print(f"experiment: {serving} is made by one process only; run the command on one", file=sys.stderr)
        return

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
        plans = [train_arm(bench, plan) for plan in plans]
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
            return dataclasses.replace(record, discovery="" if main.folder is None else main.folder.name)
        if not bench.world.once(lambda: bench.worked):
            return None


def _judge(bench: Bench, record: Record, command: str) -> Path | None:
    """Evaluates all arms and writes the report; None when another process is doing just that.

    What the folder says of itself changes after the evaluation, so that a run again that fails leaves the old report
    with all that it was made of.
    """
    config, output = bench.config, bench.output
    with claim(output / ".claims" / "report") as mine:
        if not mine:
            return None
        bench.tell("evaluation of all arms on the test split")
        evaluation = evaluate_record(record, config, output)
        describe_itself(config, output, command)
        _drop_other_serving(record, output)
        # One process alone can export; several leave the model that an earlier command exported.
        exported = bench.world.size == 1 or (output / "serving").exists()
        record = dataclasses.replace(record, serving=serving_training(record) if exported else "")
        record.write(output)
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
    if known.exists() and read_record(output).serving != serving_training(record):
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
