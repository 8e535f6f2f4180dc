"""The training model as `c2al score` runs it: what an artifact is compared with."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from c2al.config import Config, replace
from c2al.data.batch import Batch
from c2al.data.parquet import BatchReader
from c2al.distributed.checkpoint import CheckpointReader
from c2al.distributed.process import World
from c2al.distributed.sharding import shard_model
from c2al.training.model import TrainTask, primary_prediction
from c2al.training.run_folder import Run, open_run


def on_cpu(run: Run) -> Run:
    """The run, whose device is the processor: artifacts are made for it and proved on it."""
    return dataclasses.replace(run, config=replace(run.config, **{"dist.device": "cpu"}))


class TrainingModel:
    """A checkpoint in the sharded training model, in one process."""

    def __init__(self, run: Run, checkpoint: Path, world: World):
        self.run = run
        task = TrainTask(run.config, world.size, run.names)
        self._task = shard_model(task, run.config, world, for_training=False).eval()
        CheckpointReader(run.checkpoints, world).load(checkpoint, self._task)

    def predict(self, batch: Batch) -> npt.NDArray[np.float32]:
        """(B,) of a batch, padding included."""
        with torch.no_grad():
            _, (_, logit_BT, _) = self._task(batch)
            prediction: npt.NDArray[np.float32] = primary_prediction(logit_BT).numpy()
        return prediction


def arguments(batch: Batch) -> tuple[torch.Tensor, ...]:
    """What an exported program takes of a batch."""
    own = batch.dense_BF, batch.sparse.values(), batch.sparse.lengths()
    if batch.weighted is None:
        return own
    return *own, batch.weighted.values(), batch.weighted.lengths(), batch.weighted.weights()


def batches(config: Config, run: Run, data: Sequence[str]) -> BatchReader:
    """Held-out rows in order, in the steps that `c2al score` takes in one process."""
    size, seed = config.train.batch_size, config.seed
    return BatchReader(
        data,
        config.data,
        run.statistics,
        batch_size=size,
        rank=0,
        world_size=1,
        seed=seed,
        shuffle=False,
        shards=1,
    )


def predictions(run_path: Path, data: Sequence[str], world: World) -> npt.NDArray[np.float32]:
    """Of the checkpoint that is the result of a run, for every row of `data` in order. Raises as `c2al score` does."""
    run = on_cpu(open_run(run_path))
    reader = CheckpointReader(run.checkpoints, world)
    model = reader.with_newest(lambda path: TrainingModel(run, path, world), best=run.result_is_best)

    def each() -> Iterator[npt.NDArray[np.float32]]:
        for batch in batches(run.config, run, data):
            yield model.predict(batch)[: batch.rows]

    return np.concatenate(list(each()))
