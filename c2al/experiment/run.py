"""Baseline against C2AL over paired seeds, and one report.

A seed's two models share initialisation and data order and differ in the auxiliary losses alone.
Cohorts come from the first seed's baseline. Every stage leaves a finished folder, so the same
command goes on where an earlier one stopped.
"""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path

from c2al.config import Config, load_config, replace, save_config
from c2al.discovery.discover import discover
from c2al.distributed.process import World
from c2al.errors import ConfigError
from c2al.evaluation.evaluate import evaluate, paired
from c2al.evaluation.result import COHORT, OVERALL
from c2al.files import write_atomically
from c2al.report.densities import draw_densities
from c2al.report.html import write_report
from c2al.serving.export import export
from c2al.training.score import score
from c2al.training.trainer import train


def experiment(config: Config, output: Path, world: World, command: str) -> Path:
    """Runs every stage not yet finished in `output` and returns the path of the HTML report.

    Raises ConfigError for a configuration that is no experiment, CohortError when discovery finds
    no pair of cohorts that noise could not explain, and what the stages raise.
    """
    _check(config)
    world.once(lambda: _start(config, output, command))
    first, *_ = seeds = config.experiment.seeds

    for seed in seeds:
        baseline = output / f"seed_{seed}" / "baseline"
        train(replace(config, seed=seed), baseline / "run", world)
        _score_once(baseline / "run", config.data.test, baseline / "scores_test", world)
    base = output / f"seed_{first}" / "baseline"
    split = config.data.validation if config.experiment.discover_on == "validation" else config.data.train
    _score_once(base / "run", split, base / "scores_discover", world)
    cohorts = output / "cohorts" / "cohorts.json"
    if not cohorts.exists():
        discover([str(base / "scores_discover")], config.axes, config.discover, cohorts.parent, world, config.data)
        world.once(lambda: draw_densities(cohorts.parent))

    for seed in seeds:
        c2al = output / f"seed_{seed}" / "c2al"
        lambdas = {f"train.{name}": getattr(config.experiment, name) for name in ("lambda_head", "lambda_tail")}
        train(replace(config, seed=seed, **lambdas), c2al / "run", world, cohorts)
        _score_once(c2al / "run", config.data.test, c2al / "scores_test", world)

    served = output / f"seed_{first}" / "c2al"
    if world.size == 1 and not (served / "serving").exists():
        export(served / "run", config.data.test, served / "serving", world)

    def report() -> Path:
        pairs = [tuple(str(output / f"seed_{s}" / a / "scores_test") for a in ("baseline", "c2al")) for s in seeds]
        result = evaluate(
            paired(pairs), cohorts, config.axes, config.evaluate, config.seed, output / "evaluation", config.data
        )
        path = write_report(output)
        summary = tuple(s for s in result.segments if s.axis in (OVERALL, COHORT))
        print(dataclasses.replace(result, segments=summary).table())
        return path

    return world.once(report)


def _check(config: Config) -> None:
    problems = []
    if config.train.auxiliary:
        problems.append("train.lambda_head, train.lambda_tail: must be 0; experiment.lambda_* are the C2AL runs'")
    for split in ("train", "validation", "test"):
        if not getattr(config.data, split):
            problems.append(f"data.{split}: an experiment needs all three splits")
    if not config.axes:
        problems.append("axes: an experiment needs at least one axis to discover cohorts on")
    if problems:
        raise ConfigError(problems)


def _start(config: Config, output: Path, command: str) -> None:
    """Writes what the report says of the experiment itself; refuses the folder of another one."""
    known = output / "config.toml"
    if known.exists() and load_config(known) != config:
        raise ConfigError(f"{output}: holds an experiment of another config ({known}); give another --output")
    save_config(config, known)
    write_atomically(output / "command.txt", command + "\n")
    names = (
        "torch",
        "torchrec",
        "fbgemm-gpu-cpu",
        "fbgemm-gpu",
        "triton",
        "numpy",
        "numba",
        "pyarrow",
        "scipy",
        "c2al",
    )
    versions = {"python": platform.python_version(), "machine": f"{platform.machine()} {platform.system()}"}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    write_atomically(output / "versions.json", json.dumps(versions, indent=2) + "\n")


def _score_once(run_path: Path, data: Sequence[str], folder: Path, world: World) -> None:
    """Scores unless an earlier command did: the folder is renamed into place when it is whole."""
    if not folder.exists():
        score(run_path, data, folder, world)
