"""The models of an experiment's arms: what each costs in training and at serving."""

from collections.abc import Mapping

from c2al.config import BASELINE, Arm, Config, dump_config, replace
from c2al.data.cohorts import read_cohorts
from c2al.experiment.plan import arm_overrides, arm_trials, arms_of
from c2al.text import table
from c2al.training.describe import Description, describe

_PAIR = 2


def auxiliary_cohorts(arm: Arm, config: Config) -> int:
    """Auxiliary prediction heads of an arm of `config`, before discovery has chosen any cohort.

    None where every trial's lambda is 0: such an arm uses cohorts in the primary loss only. Raises CohortError for a
    bad file, ConfigError for settings that cannot go together.
    """
    if not any(t.config.train.auxiliary for t in arm_trials(arm, config, ())):
        return 0
    if arm.cohorts == "file":
        return len(read_cohorts(arm.file).chosen())
    return {"none": 0, "one": 1}.get(arm.cohorts, _PAIR)


def describe_arms(config: Config) -> dict[str, Description]:
    """Arm -> its model, the baseline first. What an arm only selects from does not count, lambda aside."""
    made: dict[tuple[int, str, str], Description] = {}
    found = {}
    for arm in (Arm(name="", cohorts="none"), *arms_of(config)):
        own, cohorts = replace(config, **arm_overrides(arm, config)), auxiliary_cohorts(arm, config)
        key = (cohorts, dump_config(own.data), dump_config(own.model))
        if key not in made:  # arms differ in their losses more often than in their models
            made[key] = describe(own, cohorts)
        found[arm.name or BASELINE] = made[key]
    return found


def arms_table(found: Mapping[str, Description]) -> str:
    """Text for a terminal: one line per arm."""
    rows = [("arm", "auxiliary", "parameters", "served", "FLOPs training", "FLOPs serving")]
    for name, model in found.items():
        _, _, every, served, _ = model.totals
        numbers = (model.cohorts, every.parameters, served.parameters, every.training, every.serving)
        rows.append((name, *(f"{n:,}" for n in numbers)))  # type: ignore[arg-type]  # six cells
    return table(rows)
