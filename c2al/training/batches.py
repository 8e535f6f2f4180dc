"""The batches of one training run, as this rank reads them."""

import itertools
from collections.abc import Iterator

from c2al.data.batch import Batch
from c2al.data.parquet import BatchReader
from c2al.distributed.process import World
from c2al.training.run_folder import Run


def training_reader(run: Run, world: World, epoch: int = 0, start_step: int = 0) -> BatchReader:
    """This rank's part of an epoch of the training split, from its step `start_step` on."""
    data = run.config.data
    return BatchReader(
        data.train,
        data,
        run.statistics,
        batch_size=run.config.train.batch_size,
        rank=world.rank,
        world_size=world.size,
        seed=run.config.seed,
        epoch=epoch,
        shuffle=True,
        shards=data.shards,
        start_step=start_step,
        cohorts=run.cohorts,
        pin_memory=world.device.type == "cuda",
    )


def training_batches(run: Run, world: World, steps_per_epoch: int, done: int, last: int) -> Iterator[Batch]:
    """The batches after step `done` up to step `last`, one epoch after another."""
    epoch, start = divmod(done, steps_per_epoch)
    starts = itertools.chain([(epoch, start)], ((e, 0) for e in range(epoch + 1, run.config.train.epochs)))
    batches = itertools.chain.from_iterable(training_reader(run, world, e, s) for e, s in starts)
    return itertools.islice(batches, last - done)


def validation_batches(run: Run, world: World) -> Iterator[Batch]:
    """This rank's part of the validation split in file order, on its device."""
    data = run.config.data
    reader = BatchReader(
        data.validation,
        data,
        run.statistics,
        batch_size=run.config.train.batch_size - run.config.train.batch_size % world.size,
        rank=world.rank,
        world_size=world.size,
        seed=run.config.seed,
        shuffle=False,
        shards=world.size,
        cohorts=run.cohorts,
        pin_memory=world.device.type == "cuda",
    )
    return (batch.to(world.device, non_blocking=True) for batch in reader)
