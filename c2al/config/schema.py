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
    """Where the impressions lie and what their columns mean."""
    model: ModelConfig = ModelConfig()
    """The network."""
    train: TrainConfig = TrainConfig()
    """One training run."""
    dist: DistConfig = DistConfig()
    """Process group, sharding and communication."""
    axes: tuple[Axis, ...] = ()
    """Semantic axes, one `[[axes]]` each; scores carry their columns, discovery and evaluation cut rows by them."""
    discover: DiscoverConfig = DiscoverConfig()
    """Which pair of cohorts becomes head and tail."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Intervals of the metrics."""
    experiment: ExperimentConfig = ExperimentConfig()
    """The paired comparison of arms."""
    arms: tuple[Arm, ...] = ()
    """What an experiment compares with the baseline, one `[[arms]]` each; empty: C2AL and its placebo."""

    @property
    def judged_columns(self) -> tuple[str, ...]:
        """Columns by which rows are judged, so that scores carry them: those of the axes, and evaluate.items."""
        return tuple(dict.fromkeys(c for c in (*(axis.column for axis in self.axes), self.evaluate.items) if c))

    def problems(self) -> Problems:
        if self.seed < 0:
            yield "seed", f"must not be negative, is {self.seed}"
        if self.train.batch_size % self.data.shards:
            yield (
                "train.batch_size",
                f"must be a multiple of data.shards = {self.data.shards}, is {self.train.batch_size}",
            )
        if self.train.combine != "sum" and self.model.encoder != "shared-bottom":
            yield (
                "train.combine",
                f"'{self.train.combine}' needs features that all tasks share, model.encoder = 'shared-bottom'; "
                f"is '{self.model.encoder}'",
            )
        names = [a.name for a in self.axes]
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield "axes", f"axis '{name}' is declared twice"
        arms = [a.name for a in self.arms]
        for name in sorted({n for n in arms if arms.count(n) > 1}):
            yield "arms", f"arm '{name}' is declared twice"
        yield from self._cross_problems()
        for field in ("user_id", "label", "weight"):
            if self.evaluate.items and self.evaluate.items == getattr(self.data, field):
                yield "evaluate.items", f"'{self.evaluate.items}' is data.{field}; name the column of the items"
        for name in self.discover.axes:
            if name not in names:
                yield "discover.axes", f"unknown axis '{name}'{hint(name, names)}"
        for i, arm in enumerate(self.arms):
            if arm.axis and arm.axis not in names:
                yield f"arms[{i}].axis", f"arm '{arm.name}': unknown axis '{arm.axis}'{hint(arm.axis, names)}"
        tables = self.data.tables
        for i, table in enumerate(self.dist.tables):
            if table.name not in tables:
                yield f"dist.tables[{i}].name", f"no embedding table is named '{table.name}'{hint(table.name, tables)}"
        if self.train.early_stopping.patience and not self.data.validation:
            yield (
                "train.early_stopping.patience",
                "goes by validation NE, but data.validation names no files",
            )

    def _cross_problems(self) -> Problems:
        kinds = {axis.name: axis.kind for axis in self.axes}
        plain = {axis.name: axis.column for axis in self.axes if axis.kind != "cross"}
        for i, axis in enumerate(self.axes):
            for part in axis.cross:
                if kinds.get(part) == "cross":
                    yield f"axes[{i}].cross", f"axis '{part}' is a cross itself; name its axes instead"
                elif part not in plain:
                    yield f"axes[{i}].cross", f"unknown axis '{part}'{hint(part, plain)}"
            columns = [plain[part] for part in dict.fromkeys(axis.cross) if part in plain]
            for column in sorted({c for c in columns if columns.count(c) > 1}):
                same = " and ".join(f"'{p}'" for p in axis.cross if plain.get(p) == column)
                yield f"axes[{i}].cross", f"axes {same} are both on column '{column}'"
