"""The models of an experiment's arms: what each costs in training and at serving."""

from collections.abc import Mapping

from c2al.config import BASELINE, Arm, Config, dump_config, flat_settings, replace
from c2al.data.cohorts import read_cohorts
from c2al.experiment.plan import arms_of
from c2al.text import table
from c2al.training.describe import Description, describe

_PAIR = 2


def cohorts_of_arm(arm: Arm) -> int:
    """Auxiliary cohorts an arm trains with, before discovery has chosen any. Raises CohortError for a bad file."""
    if arm.cohorts == "file":
        return len(read_cohorts(arm.file).chosen())
    return {"none": 0, "one": 1}.get(arm.cohorts, _PAIR)


def describe_arms(config: Config) -> dict[str, Description]:
    """Arm -> its model, the baseline first. Of the settings that an arm selects from, `overrides` alone count."""
    made: dict[tuple[int, str, str], Description] = {}
    found = {}
    for arm in (Arm(name="", cohorts="none"), *arms_of(config)):
        own, cohorts = replace(config, **flat_settings(arm.overrides)), cohorts_of_arm(arm)
        key = (cohorts, dump_config(own.data), dump_config(own.model))
        if key not in made:  # arms differ in their losses more often than in their models
            made[key] = describe(own, cohorts)
        found[arm.name or BASELINE] = made[key]
    return found


def arms_table(found: Mapping[str, Description]) -> str:
    """Text for a terminal: one line per arm."""
    rows = [("arm", "cohorts", "parameters", "served", "FLOPs training", "FLOPs serving")]
    for name, model in found.items():
        _, _, every, served, _ = model.totals
        numbers = (model.cohorts, every.parameters, served.parameters, every.training, every.serving)
        rows.append((name, *(f"{n:,}" for n in numbers)))  # type: ignore[arg-type]  # six cells
    return table(rows)
