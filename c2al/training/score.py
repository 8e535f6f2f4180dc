"""A trained model's predictions on any labelled Parquet impressions.

Writes a folder with one part-*.parquet per rank, whose rows in order of the names are the input's:
row id, user id, label, weight, prediction (probability of the primary prediction head), the time column
if there is one, and every column of an axis and evaluate.items under its own name. `_complete.json` comes last.
"""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from c2al.config import Config
from c2al.data.batch import Batch
from c2al.data.parquet import BatchReader
from c2al.data.scores_folder import write_marker
from c2al.data.source import File, open_dataset
from c2al.distributed.checkpoint import CheckpointReader
from c2al.distributed.process import World
from c2al.distributed.sharding import shard_model
from c2al.errors import ConfigError, DataError, OutputError
from c2al.files import LOCK, output_errors
from c2al.training.model import TrainTask, primary_prediction
from c2al.training.run_folder import Run, config_differences, open_run, sole_writer

_FREE = (
    *("dist.", "axes", "arms", "discover.", "evaluate.", "experiment."),
    *("train.batch_size", "train.compile", "train.checkpoint."),
    *(f"data.{k}" for k in ("train", "validation", "test", "row_id", "user_id", "time", "label", "weight")),
    *(f"data.{k}" for k in ("workers", "prefetch", "shards", "shuffle_rows")),
)
"""What may differ from the run's config: nothing that makes another model of it."""
ROW_GROUP_ROWS = 2**16
"""Of scores. With a row group per batch, listing them all would take readers longer than reading them."""
_OWN = ("label", "weight", "prediction")
"""Columns that every folder of scores has."""


def score(
    run_path: Path,
    data: Sequence[str],
    output: Path,
    world: World,
    checkpoint: Path | None = None,
    batch_size: int | None = None,
    config: Config | None = None,
) -> int:
    """Scores `data` into the folder `output` and returns the number of rows, on every rank.

    `config` replaces the run's, e.g. to score on other ranks or to carry other axes; it must describe
    the same model. `batch_size` counts the rows of a step over all ranks.

    Raises ConfigError when `output` exists or `config` describes another model, OutputError when
    another process writes `output`, CheckpointError without a checkpoint, DataError for a prediction
    that is not finite and for what is wrong with the data; then no `output` is left behind.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size: must be at least 1, is {batch_size}")
    run = open_run(run_path)
    if config is not None:
        run = _with_config(run, config)
    partial = output.with_name(f".{output.name}.partial")
    world.once(lambda: _make(output, partial))
    with sole_writer(partial, world):
        try:
            world.once(lambda: _prepare(output, partial))
            rows = _Scoring(run, data, world, batch_size).write(partial, checkpoint)
            world.once(lambda: _finish(partial, output, rows))
        except BaseException:
            if world.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
    return rows


def _make(output: Path, partial: Path) -> None:
    """Raises OutputError naming `output` when its folder cannot be made."""
    with output_errors(output):
        partial.mkdir(parents=True, exist_ok=True)


def _with_config(run: Run, config: Config) -> Run:
    changed = [
        f"{key}: the model was trained with {old!r}, it cannot be scored with {new!r}"
        for key, old, new in config_differences(run.config, config)
        if not key.startswith(_FREE)
    ]
    if changed:
        raise ConfigError(changed)
    return dataclasses.replace(run, config=config)


def _prepare(output: Path, partial: Path) -> None:
    """Refuses an output that is there, and clears what a process that died has left in `partial`."""
    if output.exists() or output.is_symlink():
        raise ConfigError(f"{output}: exists; give another --output")
    with output_errors(partial):
        for left_over in partial.iterdir():
            if left_over.name != LOCK:
                left_over.unlink()


def _finish(partial: Path, output: Path, rows: int) -> None:
    marker = write_marker(partial, tuple(p.name for p in partial.glob("part-*.parquet")))
    if marker.rows != rows:
        raise OutputError(
            f"{partial}: holds {marker.rows:,} of {rows:,} rows; all ranks must write to one storage that all hosts see"
        )
    with output_errors(output):
        partial.rename(output)
        (output / LOCK).unlink()


def _said(path: Path, world: World, best: bool) -> Path:
    """Says on rank 0 that this checkpoint is taken because it is the best one."""
    if best and world.rank == 0:
        print(f"scoring with {path}, the best checkpoint, since the run stops early", file=sys.stderr)
    return path


def carried_columns(config: Config) -> tuple[str, ...]:
    """Columns of the impressions that scores hand through. An axis may lie on the label or the weight itself.

    Raises ConfigError for a column that would hide one of the scores' own.
    """
    own = {"label": config.data.label, "weight": config.data.weight}
    columns = [config.data.row_id, config.data.user_id, config.data.time, *config.judged_columns]
    carried = tuple(dict.fromkeys(c for c in columns if c and own.get(c) != c))
    for name in _OWN:
        if name in carried:
            raise ConfigError(f"data: the column '{name}' of the impressions would hide the scores' own '{name}'")
    return carried


class _Part:
    """One rank's Parquet file, in row groups of at least ROW_GROUP_ROWS rows but for the last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        self._waiting.append(table)
        if sum(t.num_rows for t in self._waiting) >= ROW_GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        if self._waiting:
            self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        table = pa.concat_tables(self._waiting)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, table.schema, compression="zstd")
        self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
        self._waiting = []


class _Scoring:
    """One scoring job on this rank."""

    def __init__(self, run: Run, data: Sequence[str], world: World, batch_size: int | None):
        self.run, self.world, self.names = run, world, run.config.data
        self.files = world.together(lambda: self._open(data))
        size = batch_size or run.config.train.batch_size
        self.reader = world.together(
            lambda: BatchReader(
                data,
                self.names,
                run.statistics,
                batch_size=max(size - size % world.size, world.size),
                rank=world.rank,
                world_size=world.size,
                seed=run.config.seed,
                shuffle=False,
                shards=world.size,
                carry=carried_columns(run.config),
                pin_memory=world.device.type == "cuda",
            )
        )
        # With one shard per rank and no shuffling, the ranks' rows follow one another in file order.
        self.first_row = world.rank * self.reader.rows // world.size

    def _open(self, data: Sequence[str]) -> tuple[File, ...]:
        files = open_dataset(data)
        for file in files:
            if self.names.label not in file.schema.names:
                raise DataError(
                    f"{file.name}: has no column '{self.names.label}' (data.label); "
                    "score needs labelled impressions, since its output is for discover and evaluate"
                )
        return files

    def write(self, folder: Path, checkpoint: Path | None) -> int:
        """Writes this rank's part and returns the number of rows over all ranks."""
        world = self.world
        task = TrainTask(self.run.config, world.size, self.run.names)
        model = shard_model(task, self.run.config, world, for_training=False).eval()
        checkpoints = CheckpointReader(self.run.checkpoints, world)
        if checkpoint is not None:
            checkpoints.load(checkpoint, model)
        else:
            best = self.run.result_is_best
            checkpoints.with_newest(lambda path: checkpoints.load(_said(path, world, best), model), best=best)

        rows, part = 0, _Part(folder / f"part-{world.rank:05d}.parquet")
        bar = tqdm(total=self.reader.steps, unit="batch", disable=None if world.rank == 0 else True)
        with torch.no_grad(), output_errors(part.path):
            for batch in self.reader:
                _, (_, logit_BT, _) = model(batch.to(world.device, non_blocking=True))
                table = self._scores(batch, primary_prediction(logit_BT).cpu(), self.first_row + rows)
                part.write(table)
                rows += table.num_rows
                bar.update()
            bar.close()
            part.close()
        return int(world.all_sum(torch.tensor(rows, dtype=torch.int64)).item())

    def _scores(self, batch: Batch, prediction_B: torch.Tensor, first_row: int) -> pa.Table:
        """The columns of one batch's real rows; padding is at the end of a batch."""
        assert batch.carried is not None
        table, rows = batch.carried, batch.carried.num_rows
        prediction = prediction_B[:rows].numpy()
        for bad in np.flatnonzero(~np.isfinite(prediction))[:1]:
            raise DataError(
                f"{self._where(first_row + int(bad))}: the prediction is {prediction[bad]}; "
                "the model's weights or this row's inputs are too large"
            )
        for option in ("row_id", "user_id"):
            name = getattr(self.names, option)
            if table.column(name).null_count:
                null = int(np.flatnonzero(table.column(name).is_null().to_numpy())[0])
                raise DataError(f"{self._where(first_row + null)}: column '{name}' is null (data.{option})")
        columns = {"label": batch.label_B[:rows].cpu().numpy(), "weight": batch.weight_B[:rows].cpu().numpy()}
        for column, values in {**columns, "prediction": prediction}.items():
            table = table.append_column(column, pa.array(values))
        return table

    def _where(self, row: int) -> str:
        """File, row group and row of a row of the data set, as messages name them."""
        for file in self.files:
            for group, rows in enumerate(file.row_group_rows):
                if row < rows:
                    return f"{file.where(group)}, row {row}"
                row -= rows
        raise AssertionError("a row beyond the data set")
