"""What an experiment trains: arms, trials of an arm, and the folder of each training.

A trial is one combination of an arm's `select` settings. A training is a trial with one seed. Its folder
carries a digest of everything that its weights depend on, so another setting, other cohorts or another
default can never be taken for it, and whatever has been trained is found again.

    OUT/trainings/<arm>-<digest>/seed_<s>/   run/  scores_*/  result.json
"""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

from c2al.config import (
    BASELINE,
    Arm,
    Config,
    DiscoverConfig,
    EvaluateConfig,
    ExperimentConfig,
    dump_config,
    flat_settings,
    replace,
)
from c2al.data.cohorts import CohortSpec

LAMBDA = "train.auxiliary_lambda"
DEFAULT_ARMS = (Arm(name="c2al", cohorts="chosen"), Arm(name="placebo", cohorts="shuffled"))
"""What an experiment without `arms` compares with the baseline."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One combination of an arm's settings."""

    arm: str
    settings: dict[str, Any]
    """Those of `select`, by dotted name; empty where there is nothing to select."""
    config: Config
    """The whole configuration, but for the seed."""
    cohorts: tuple[CohortSpec, ...]
    """Auxiliary cohorts; empty without auxiliary losses."""

    @property
    def name(self) -> str:
        """Folder name: the arm and a digest of what its weights depend on, the seed aside."""
        shared = dataclasses.replace(
            self.config,
            seed=0,
            axes=(),
            arms=(),
            discover=DiscoverConfig(),
            evaluate=EvaluateConfig(),
            experiment=ExperimentConfig(),
        )
        cohorts = json.dumps([c.to_json() for c in self.cohorts], sort_keys=True)
        digest = hashlib.sha256(f"{dump_config(shared)}\n{cohorts}".encode()).hexdigest()
        return f"{self.arm}-{digest[:10]}"

    @property
    def title(self) -> str:
        """For people: the arm and what sets this trial apart from its others."""
        return ", ".join([self.arm, *(f"{name} = {value}" for name, value in flat_settings(self.settings).items())])

    def folder(self, output: Path, seed: int) -> Path:
        """Folder of this trial's training with `seed`."""
        return output / "trainings" / self.name / f"seed_{seed}"


def arms_of(config: Config) -> tuple[Arm, ...]:
    """The declared arms, or the default ones."""
    return config.arms or DEFAULT_ARMS


def baseline_trials(config: Config) -> list[Trial]:
    """Every combination of `experiment.select`."""
    return _trials(BASELINE, config, {}, config.experiment.select, ())


def arm_trials(arm: Arm, base: Config, cohorts: tuple[CohortSpec, ...]) -> list[Trial]:
    """Every combination of the arm's `select`, on top of the configuration that the baseline chose."""
    return _trials(arm.name, base, arm_overrides(arm, base), arm.select, cohorts)


def arm_overrides(arm: Arm, base: Config) -> dict[str, Any]:
    """What the arm changes whatever it selects: its overrides, and lambda where it has cohorts and sets none itself."""
    overrides = flat_settings(arm.overrides)
    if arm.cohorts != "none" and LAMBDA not in {**overrides, **flat_settings(arm.select)}:
        overrides[LAMBDA] = base.experiment.auxiliary_lambda
    return overrides


def _trials(
    name: str, base: Config, overrides: dict[str, Any], select: dict[str, Any], cohorts: tuple[CohortSpec, ...]
) -> list[Trial]:
    grid = flat_settings(select)
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    made = [(s, with_effect(replace(base, **overrides, **s))) for s in combinations]
    return [Trial(arm=name, settings=s, config=config, cohorts=cohorts) for s, config in made]


def with_effect(config: Config) -> Config:
    """`config`, and where it has no auxiliary loss, without the settings that act on auxiliary losses alone.

    So an experiment's own configuration may set them for its arms, and the baseline trains without them.
    """
    if config.train.auxiliary:
        return config
    idle = {field: default for field, (_, default) in config.train.auxiliary_settings.items()}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **idle))


def arms_base(config: Config, baseline: Trial) -> Config:
    """What the arms start from: the experiment's configuration with what the baseline selected."""
    return replace(config, **baseline.settings)
