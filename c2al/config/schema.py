"""The whole configuration: one frozen dataclass of all sections.

A field's unit and effect stand in the docstring under it.
"""

import dataclasses

from c2al.config.data import Axis, DataConfig
from c2al.config.distribution import DistConfig
from c2al.config.judge import Arm, DiscoverConfig, EvaluateConfig, ExperimentConfig
from c2al.config.model import ModelConfig
from c2al.config.train import TrainConfig
from c2al.typed import Problems, hint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a job needs besides the files it reads and writes."""

    seed: int = 0
    """Fixes data order, initialisation, dropout and resampling."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    dist: DistConfig = DistConfig()
    axes: tuple[Axis, ...] = ()
    discover: DiscoverConfig = DiscoverConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    experiment: ExperimentConfig = ExperimentConfig()
    arms: tuple[Arm, ...] = ()
    """What an experiment compares with the baseline; empty: C2AL and its placebo."""

    def problems(self) -> Problems:
        if self.seed < 0:
            yield "seed", f"must not be negative, is {self.seed}"
        if self.train.batch_size % self.data.shards:
            yield (
                "train.batch_size",
                f"must be a multiple of data.shards = {self.data.shards}, is {self.train.batch_size}",
            )
        names = [a.name for a in self.axes]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield "axes", f"axis '{name}' is declared twice"
        arms = [a.name for a in self.arms]
        for name in sorted({n for n in arms if arms.count(n) > 1}):
            yield "arms", f"arm '{name}' is declared twice"
        plain = {a.name for a in self.axes if a.kind != "cross"}
        for i, axis in enumerate(self.axes):
            for part in axis.cross:
                if part not in plain:
                    yield f"axes[{i}].cross", f"unknown axis '{part}'{hint(part, plain)}"
        for name in self.discover.axes:
            if name not in names:
                yield "discover.axes", f"unknown axis '{name}'{hint(name, names)}"
        keys = {f.key for f in self.data.sparse}
        for i, table in enumerate(self.dist.tables):
            if table.name not in keys:
                yield f"dist.tables[{i}].name", f"no sparse feature is named '{table.name}'{hint(table.name, keys)}"
