"""Filling the model and the optimizer of a new run from the checkpoint of the earlier one it begins with.

R rows of a table, D columns.
"""

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from c2al.distributed.checkpoint.parts import StoredParts
from c2al.distributed.checkpoint.state import average_key, model_key
from c2al.distributed.optim import Optimizer
from c2al.distributed.process import World
from c2al.distributed.tables import Block, Table, drop_caches, local_tables
from c2al.training.model import AUXILIARY_PREFIX
from c2al.training.run_folder import Run, open_earlier
from c2al.training.start_from import Ints, inputs_of, row_map, why_fresh

ROWS_AT_ONCE = 1 << 16
"""Rows of a table that are read at a time; bounds the memory beyond the table itself."""


def load_start(run: Run, dmp: DistributedModelParallel, optimizer: Optimizer, world: World) -> str:
    """Fills a new run's model, and its optimizer if asked for, from the earlier run; returns what was done.

    Raises on every rank: what `open_run` raises for the earlier run, CheckpointError for a checkpoint that
    is not whole any more.
    """
    return world.together(lambda: _Loading(run, dmp, optimizer, world).load())


TASKS = frozenset(("tasks", "task_gate", "gates"))
"""Modules of an encoder of several tasks that hold one part per task."""


class _Loading:
    """The same on this rank."""

    def __init__(self, run: Run, dmp: DistributedModelParallel, optimizer: Optimizer, world: World):
        assert run.start is not None
        self.started, self.earlier = run.start, open_earlier(run.start)
        self.config, self.statistics, self.cohorts = run.config, run.statistics, run.names
        self.watched = world.watched
        self.dmp, self.optimizer = dmp, optimizer
        self.parts = StoredParts(run.start.path, world.rank, world.size)
        self.notes: list[str] = []

    def load(self) -> str:
        tables = local_tables(self.dmp)
        for table in tables:
            self._table(table)
        drop_caches(self.dmp)
        self._dense({t.name for t in tables})
        gone = self.earlier.config.data.tables.keys() - self.config.data.tables.keys()
        self.notes += [f"table '{name}' of the earlier run is not used any more" for name in sorted(gone)]
        what = "the weights and optimizer state" if self.started.optimizer else "the weights"
        return "\n  ".join([f"begins with {what} of {self.started.path}", *self.notes])

    @torch.no_grad()
    def _table(self, table: Table) -> None:
        name = table.name.split(".")[-2]
        if reason := why_fresh(self.earlier, self.config, self.statistics, name):
            self.notes.append(f"table '{name}' is initialised fresh: {reason}")
            return
        saved = _saved_name(self.parts, name)
        rows_of, note = row_map(self.earlier, self.config, self.statistics, name)
        if note:
            self.notes.append(f"table '{name}': {note}")
        for block in table.blocks:
            height = len(block.weight_RD)
            moment_R = block.moment_R
            if moment_R is None:
                moment_R = self.optimizer.replicated_moments[table.name]
            for start in self.watched(range(0, height, ROWS_AT_ONCE)):
                part = slice(start, min(start + ROWS_AT_ONCE, height))
                row_R = rows_of(block.row + part.start, block.row + part.stop)
                weight_RD = block.weight_RD[part].to("cpu", copy=True)
                self.parts.fill_rows(model_key(saved), row_R, weight_RD, block.column)
                block.weight_RD[part].copy_(weight_RD)
                if self.started.optimizer:
                    moment_R[part].copy_(self._moments(saved, row_R, block))

    def _moments(self, saved: str, row_R: Ints, block: Block) -> Tensor:
        """(R,) mean over the block's columns of the moment that each column had; 0 for a fresh row."""
        first, last = block.column, block.column + block.weight_RD.shape[1]
        moment_R = torch.zeros(len(row_R))
        for begin, end, key in self.parts.moment_blocks(saved):
            shared = min(end, last) - max(begin, first)
            if shared > 0:
                part_R1 = torch.zeros(len(row_R), 1)
                self.parts.fill_rows(key, row_R, part_R1)
                moment_R += shared / (last - first) * part_R1[:, 0]
        return moment_R

    @torch.no_grad()
    def _dense(self, tables: set[str]) -> None:
        """Everything but the tables, with Adam's state and the moving averages where they are asked for."""
        adam, averages = self.optimizer.dense_state(), self.optimizer.averages
        before, now = inputs_of(self.earlier.config), inputs_of(self.config)
        if before != now:
            self.notes.append(
                "the network above the tables is initialised fresh: its inputs were "
                f"{', '.join(before)} and are {', '.join(now)}"
            )
        for name, value in self.dmp.module.state_dict().items():
            if name in tables or (before != now and ".projections." not in name):
                continue
            saved = self._earlier_name(name)
            if saved is None or model_key(saved) not in self.parts:
                self.notes.append(f"parameter '{name}' is initialised fresh: the earlier run has none of its task")
            elif (size := self.parts.size(model_key(saved))) != tuple(value.shape):
                self.notes.append(
                    f"parameter '{name}' is initialised fresh: {list(size)} before, {list(value.shape)} now"
                )
            else:
                value.copy_(self.parts.whole(model_key(saved)))
                for field in ("step", "exp_avg", "exp_avg_sq") if self.started.optimizer else ():
                    if f"{name}.{field}" in adam:
                        adam[f"{name}.{field}"].copy_(self.parts.whole(f"adam/{saved}.{field}"))
        self.optimizer.restart_averages()
        if self.started.optimizer and "averaged" in self.parts.manifest.optimizer and before == now:
            for name, average in averages.items():
                saved = self._earlier_name(name)
                if saved is not None and average_key(saved) in self.parts:
                    stored = self.parts.whole(average_key(saved))
                    if stored.shape == average.shape:
                        average.copy_(stored)
            self.optimizer.averaged = self.parts.manifest.optimizer["averaged"]

    def _earlier_name(self, name: str) -> str | None:
        """Of a parameter in the earlier run: an auxiliary prediction head is known by its cohort."""
        for prefix in (f"model.{p}" for p in AUXILIARY_PREFIX):
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                cohort = self.cohorts[int(number)]
                known = cohort in self.earlier.cohorts
                return f"{prefix}{self.earlier.cohorts.index(cohort)}.{rest}" if known else None
        # Lists of all tasks, which are known by number only.
        other_tasks = self.cohorts != self.earlier.cohorts and name.startswith("model.over.encoder.")
        return None if other_tasks and TASKS & set(name.split(".")) else name


def _saved_name(parts: StoredParts, table: str) -> str:
    """Name of the table's weight in the earlier run, where it may have had no weighted bags, or some."""
    names = [f"model.{ebc}.embedding_bags.{table}.weight" for ebc in ("ebc", "weighted_ebc")]
    return next((name for name in names if model_key(name) in parts), names[0])
