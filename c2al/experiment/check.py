"""What can be said of an experiment before its first training: settings, data, and what one process takes of it."""

from collections.abc import Sequence
from typing import Any

from c2al.config import BASELINE, OF_AUXILIARY_LOSSES, Arm, Config, TrainConfig, flat_settings
from c2al.data.arrow_types import family
from c2al.data.cohort_codes import axis_problem
from c2al.data.cohorts import PAIR_LABELS, read_cohorts
from c2al.data.schema import check_columns
from c2al.data.source import File, open_dataset
from c2al.errors import CohortError, ConfigError, DataError
from c2al.experiment.bench import Share
from c2al.experiment.folder import SPLITS
from c2al.experiment.plan import Trial, arm_trials, arms_of, baseline_trials
from c2al.nn.methods import check_method
from c2al.training.cohort_settings import check_labels, shown
from c2al.training.score import carried_columns


def check(config: Config, share: Share) -> None:
    """Raises ConfigError with every problem of a configuration that is no experiment."""
    problems = share_problems(share, config)
    problems += _baseline_problems(config)
    problems += [
        f"data.{s}: names no files; an experiment needs all three splits" for s in SPLITS if not getattr(config.data, s)
    ]
    try:
        carried_columns(config)
    except ConfigError as e:
        problems += e.problems
    needs_axes = [a.name for a in arms_of(config) if a.discovers]
    if needs_axes and not config.axes:
        problems.append(f"axes: arm {', '.join(needs_axes)} needs at least one axis to discover cohorts on")
    auxiliary = False
    for arm in arms_of(config):
        try:
            trials = arm_trials(arm, config, ())
            for trial in trials:
                check_method(trial.config.train.combine)
            problems += _arm_problems(arm, trials)
            auxiliary |= any(t.config.train.auxiliary for t in trials)
        except ConfigError as e:
            problems += [f"arm '{arm.name}': {p}" for p in e.problems]
            auxiliary = True  # nobody can tell
    if not auxiliary:
        problems += [
            f"train.{field}: is {shown(value)}, but no arm has an auxiliary loss for it to act on"
            for field, (value, _) in config.train.auxiliary_settings.items()
        ]
    if problems:
        raise ConfigError(problems)


def _baseline_problems(config: Config) -> list[str]:
    """What training would refuse of the baseline, or what is without effect on it."""
    found = [f"{s}: the baseline has no cohorts; set it in an arm" for s in config.train.cohort_settings]
    found += [
        f"experiment.select: '{key}' is without effect: the baseline has no auxiliary loss; select it in an arm"
        for key in _of_auxiliary_losses(config.experiment.select)
    ]
    if found:
        return found
    try:
        wanted = {s for t in baseline_trials(config) for s in t.config.train.cohort_settings}
    except ConfigError as e:
        return [f"experiment.select: {p}" for p in e.problems]
    return [f"experiment.select: {s}: the baseline has no cohorts; select it in an arm" for s in sorted(wanted)]


def _of_auxiliary_losses(settings: dict[str, Any]) -> list[str]:
    """The names among an arm's `settings` or `select` that act on auxiliary losses alone, defaults aside."""
    default = TrainConfig()
    names = {f"train.{field}": getattr(default, field) for field in OF_AUXILIARY_LOSSES}
    return [k for k, v in flat_settings(settings).items() if k in names and v not in (names[k], [names[k]])]


def _arm_problems(arm: Arm, trials: list[Trial]) -> list[str]:
    """What training would refuse of the arm, after hours of baselines."""
    wanted = [t.config.train.cohort_settings for t in trials]
    if arm.cohorts == "none" and (named := sorted({s for settings in wanted for s in settings})):
        return [f"arm '{arm.name}': its settings need cohorts ({', '.join(named)}); its cohorts = 'none'"]
    if arm.cohorts != "none" and not all(wanted):
        return [
            f"arm '{arm.name}': without effect on its cohorts, since lambda is 0 and neither train.cohort_weight nor "
            "train.group_dro is set, in at least one combination; cohorts = 'none' has none"
        ]
    if any(t.config.train.auxiliary for t in trials):
        return _label_problems(arm, trials)
    return [
        f"arm '{arm.name}': {key}: there is no auxiliary loss for it to act on: the arm's "
        + ("cohorts = 'none'" if arm.cohorts == "none" else "lambda is 0")
        for key in _of_auxiliary_losses({**flat_settings(arm.overrides), **flat_settings(arm.select)})
    ]


def _label_problems(arm: Arm, trials: list[Trial]) -> list[str]:
    """Lambdas of cohorts that the arm will not have. Whatever discovery chooses, it calls the two head and tail."""
    labels: tuple[str, ...] = (arm.keep,) if arm.cohorts == "one" else PAIR_LABELS
    found = []
    for trial in trials:
        try:
            if arm.cohorts == "file":
                labels = tuple(c.label for c in read_cohorts(arm.file).chosen())
            check_labels(trial.config.train, arm.file or f"cohorts = '{arm.cohorts}'", labels)
        except ConfigError as e:
            found += [f"arm '{arm.name}': {p}" for p in e.problems]
        except CohortError:
            break  # check_data names the damaged file; a file that chose none is a finding
    return list(dict.fromkeys(found))


def check_data(config: Config) -> None:
    """Raises DataError when a split lacks a file, a column or a type that any stage needs: before the first step.

    Raises CohortError naming the arm and its cohorts.json when that is missing or damaged.
    """
    axes = [a.column for a in config.axes if a.column]
    given = [column for arm in config.arms if arm.cohorts == "file" for column in _columns_of_file(arm)]
    files: list[File] = []
    for split in SPLITS:
        carried = axes if split == "test" else [*axes, *given]  # test data are scored, and need no cohorts
        items = config.evaluate.items if split in ("test", config.experiment.discover_on) else ""
        own = open_dataset(getattr(config.data, split))
        check_columns(own, config.data, tuple(dict.fromkeys(carried)), items=items)
        files += own
    _check_axes(config, files)


def _check_axes(config: Config, files: Sequence[File]) -> None:
    """Raises DataError for an axis whose column no stage could cut by, or that is another kind in another split."""
    for axis in (a for a in config.axes if a.column):
        first: tuple[str, str] | None = None
        for file in files:
            kind = file.schema.field(axis.column).type
            if wrong := axis_problem(axis.kind, kind):
                raise DataError(f"{file.name}: axis '{axis.name}': column '{axis.column}' {wrong}")
            first = first or (file.name, family(kind))
            if family(kind) != first[1]:
                raise DataError(
                    f"{file.name}: axis '{axis.name}': column '{axis.column}' holds {family(kind)}, but {first[1]} in "
                    f"{first[0]}"
                )


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
