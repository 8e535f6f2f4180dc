"""Settings and cohorts that must go together, checked before anything is read or written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from c2al.config import TrainConfig
from c2al.errors import ConfigError
from c2al.typed import hint


def check_cohort_settings(train: TrainConfig, cohorts: Path | None) -> None:
    """Raises ConfigError for settings without the cohorts that they need, and for what is without effect."""
    problems = []
    if cohorts is None and (wanting := train.cohort_settings):
        verb = "needs" if len(wanting) == 1 else "need"
        problems.append(f"{', '.join(wanting)}: {verb} the cohorts; give --cohorts cohorts.json")
    if cohorts is not None and not train.needs_cohorts:
        problems.append(
            f"{cohorts}: cohorts without effect, since train.auxiliary_lambda and train.lambdas are 0 and neither "
            "train.cohort_weight nor train.group_dro is set"
        )
    if not train.auxiliary:
        for field, (value, default) in train.auxiliary_settings.items():
            problems.append(
                f"train.{field}: is {shown(value)}, but there is no auxiliary loss for it to act on, since "
                f"train.auxiliary_lambda and train.lambdas are 0; set one of them, or train.{field} = {shown(default)}"
            )
    if problems:
        raise ConfigError(problems)


def check_labels(train: TrainConfig, cohorts: Path | str, labels: Sequence[str]) -> None:
    """Raises ConfigError for settings that do not go with the names of the cohorts chosen by `cohorts`.

    `cohorts` is the file that chose them, or in an experiment the words of the arm that will.
    """
    if unknown := sorted(train.lambdas.keys() - set(labels)):
        raise ConfigError([f"train.lambdas.{n}: {cohorts} chose {', '.join(labels)}{hint(n, labels)}" for n in unknown])
    zero = [label for label in labels if train.auxiliary and train.lambda_of(label) == 0]
    if train.uncertainty_weighting and zero:
        raise ConfigError(
            f"train.uncertainty_weighting: a learned weight starts at its lambda, which is 0 of {', '.join(zero)}"
        )
    if zero == list(labels):
        raise ConfigError(
            f"train.lambdas: the lambda of every cohort that {cohorts} chose is 0 ({', '.join(labels)}), so that "
            f"train.auxiliary_lambda = {train.auxiliary_lambda} is without effect"
        )


def shown(value: Any) -> str:
    """A setting's value as a message shows it."""
    return str(value).lower() if isinstance(value, bool) else repr(value)
