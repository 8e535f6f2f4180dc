"""A trained model's predictions on any Parquet impressions.

Writes a folder with one part-*.parquet a rank, whose rows in order of the names are the input's:
row id, user id, label, weight, prediction (probability of the primary head), the time column if
there is one, and every axis column under its own name. `_complete.json` comes last.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from c2al.config import Axis
from c2al.data.batch import Batch
from c2al.data.parquet import BatchReader
from c2al.distributed.checkpoint import CheckpointReader
from c2al.distributed.process import World
from c2al.distributed.sharding import shard_model
from c2al.errors import ConfigError
from c2al.files import write_atomically
from c2al.training.model import TrainTask, primary_prediction
from c2al.training.run_folder import Run, open_run

COMPLETE = "_complete.json"


def score(
    run_path: Path,
    data: Sequence[str],
    output: Path,
    world: World,
    checkpoint: Path | None = None,
    batch_size: int | None = None,
    axes: tuple[Axis, ...] | None = None,
) -> int:
    """Scores `data` into the folder `output` and returns the number of rows, on every rank.

    Raises ConfigError when `output` exists, CheckpointError without a checkpoint, and what reading
    the data raises; then no `output` is left behind.
    """
    run = open_run(run_path)
    partial = output.with_name(f".{output.name}.partial")

    def start() -> None:
        if output.exists():
            raise ConfigError(f"{output}: exists; give another --output")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    world.once(start)
    try:
        rows = _score(run, data, partial, world, checkpoint, batch_size, run.config.axes if axes is None else axes)
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise

    def finish() -> None:
        write_atomically(partial / COMPLETE, json.dumps({"rows": rows, "parts": world.size}) + "\n")
        partial.rename(output)

    world.once(finish)
    return rows


def _score(
    run: Run,
    data: Sequence[str],
    folder: Path,
    world: World,
    checkpoint: Path | None,
    batch_size: int | None,
    axes: tuple[Axis, ...],
) -> int:
    names = run.config.data
    columns = [names.row_id, names.user_id, names.time, *(a.column for a in axes)]
    carry = tuple(dict.fromkeys(c for c in columns if c and c != names.label))
    size = batch_size or run.config.train.batch_size
    reader = BatchReader(
        data,
        names,
        run.statistics,
        batch_size=max(size - size % world.size, world.size),
        rank=world.rank,
        world_size=world.size,
        seed=run.config.seed,
        shuffle=False,
        shards=world.size,
        carry=carry,
    )
    model = shard_model(TrainTask(run.config, world.size), run.config, world, plan_again=True).eval()
    checkpoints = CheckpointReader(run.checkpoints, world)
    if checkpoint is not None:
        checkpoints.load(checkpoint, model)
    else:
        checkpoints.with_newest(lambda path: checkpoints.load(path, model))

    rows, writer = 0, None
    bar = tqdm(total=reader.steps, unit="batch", disable=None if world.rank == 0 else True)
    with torch.no_grad():
        for batch in reader:
            _, (_, logit_BT, _) = model(batch.to(world.device))
            table = _scores(batch, primary_prediction(logit_BT).cpu(), names.label)
            if writer is None:
                writer = pq.ParquetWriter(folder / f"part-{world.rank:05d}.parquet", table.schema, compression="zstd")
            writer.write_table(table)
            rows += table.num_rows
            bar.update()
    bar.close()
    if writer is not None:
        writer.close()
    return int(world.all_sum(torch.tensor(float(rows), dtype=torch.float64)).item())


def _scores(batch: Batch, prediction_B: torch.Tensor, label: str) -> pa.Table:
    """The columns of one batch's real rows; padding is at the end of a batch."""
    assert batch.carried is not None
    table, rows = batch.carried, batch.carried.num_rows
    floats = {"label": batch.label_B, "weight": batch.weight_B, "prediction": prediction_B}
    for name, value_B in floats.items():
        if name in table.column_names:
            raise ConfigError(f"data: the column '{name}' of the impressions would hide the scores' own '{name}'")
        table = table.append_column(name, pa.array(value_B[:rows].cpu().numpy()))
    return table
