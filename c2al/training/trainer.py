"""One training run, from its folder to its last checkpoint."""

import contextlib
import dataclasses
import itertools
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile, schedule, tensorboard_trace_handler
from torchrec.distributed.train_pipeline import GradientAccumulationConfig, GradientAccumulationWrapper
from tqdm import tqdm

from c2al.config import Config
from c2al.data.batch import Batch
from c2al.data.parquet import BatchReader
from c2al.distributed.checkpoint import CheckpointReader, CheckpointWriter
from c2al.distributed.optim import make_optimizer
from c2al.distributed.process import World
from c2al.distributed.sharding import plan_table, save_plan, shard_model
from c2al.errors import C2ALError, TrainingError
from c2al.training.diagnostics import YRecorder
from c2al.training.interrupt import Interrupt
from c2al.training.metrics import BinaryMetrics, Metric, Sums
from c2al.training.model import TrainTask
from c2al.training.pipeline import Clock, Pipeline
from c2al.training.run_folder import MetricsLog, Run, start_run

TASKS = ("primary", "head", "tail")
Y_BATCHES = 8
"""Validation batches whose Y is recorded."""


def train(
    config: Config, output: Path, world: World, cohorts: Path | None = None, stop_after: int | None = None
) -> float | None:
    """Trains to the end, going on from the newest checkpoint in `output`, and writes the run's folder.

    `stop_after` ends early, with a checkpoint, once that many steps are done in all. Returns the
    last validation NE (None: no validation split, or undefined). Raises C2ALError, the same on
    every rank; a run that fails before its first checkpoint leaves no folder behind.
    """
    existed = output.exists()
    try:
        run = start_run(output, config, cohorts, world)
        return Trainer(run, world).train(stop_after)
    except C2ALError:
        if world.rank == 0 and not existed and not any((output / "checkpoints").glob("step*")):
            shutil.rmtree(output, ignore_errors=True)
        raise


class Trainer:
    """One training run on this rank: everything the loop in `train` needs, built once."""

    def __init__(self, run: Run, world: World):
        self.run, self.world, self.config = run, world, run.config
        self.steps_per_epoch = self.reader(epoch=0).steps
        self.total = self.steps_per_epoch * self.config.train.epochs
        if self.config.train.max_steps:
            self.total = min(self.total, self.config.train.max_steps)

        torch.manual_seed(self.config.seed)
        self.clock = Clock()
        self.model = shard_model(TrainTask(self.config, world.size), self.config, world)
        # The schedule counts optimizer steps.
        updates = -(-self.total // self.config.train.accumulate)
        self.optimizer = make_optimizer(self.model, self.config.train.optimizer, updates)
        self.pipeline = Pipeline(self.model, self.optimizer, world.device, self.clock)
        self.accumulation = GradientAccumulationWrapper(
            self.pipeline,
            self.pipeline.optimizer,  # the timed one: the wrapper calls what it is given, not the pipeline's
            self.model,
            GradientAccumulationConfig(num_steps=self.config.train.accumulate),
        )
        self.saved = CheckpointReader(run.checkpoints, world)
        self.checkpoints = CheckpointWriter(run.checkpoints, self.config.train.checkpoint, world)
        self.step = 0
        if (newest := self.saved.latest()) is not None:
            self.step = self.saved.load(newest, self.model, self.optimizer, same_arithmetic=True)["step"]

        self.metrics = self._new_metrics(window=self.config.train.log_every)
        self.loss_T = torch.zeros(len(self.metrics.tasks), dtype=torch.float64, device=world.device)
        """Sum of the steps' task losses since the last log line."""
        self._logged = self.step
        self.ne: float | None = None
        self.ne_step = -1
        """Step that `ne` is of."""
        self.log = MetricsLog(run.path, self.step) if world.rank == 0 else None
        if world.rank == 0:
            save_plan(self.model, run.path / "plan.json")
            print(plan_table(self.model), file=sys.stderr)

    def train(self, stop_after: int | None) -> float | None:
        """The loop: fetch, step, log, evaluate, save."""
        train, last = self.config.train, min(self.total, stop_after or self.total)
        batches = self._batches(self.step, last)
        with Interrupt() as interrupt, self._progress_bar(last) as bar, self._profiler() as profiler:
            while self.step < last:
                self.step += 1
                self.advance(batches)
                bar.update()
                profiler.step()
                if self._due(1 if self.world.size == 1 else train.log_every) or self.step == last:
                    self._check(interrupt)
                if self._due(train.log_every) or self.step == last:
                    self._log_training(bar)
                if self._due(train.eval_every) or self.step == self.total:
                    self._evaluate()
                if self._due(train.y_every) or self.step == self.total:
                    self._record_y()
                if self._due(train.checkpoint.every_steps) or self.step == last:
                    self._save()
        self.checkpoints.wait()
        if self.log is not None:
            self.log.close()
        return self.ne

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def reader(self, epoch: int, start_step: int = 0) -> BatchReader:
        """This rank's part of an epoch of the training split."""
        data = self.config.data
        return BatchReader(
            data.train,
            data,
            self.run.statistics,
            batch_size=self.config.train.batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            seed=self.config.seed,
            epoch=epoch,
            shuffle=True,
            shards=data.shards,
            start_step=start_step,
            cohorts=self.run.cohorts,
        )

    def _batches(self, done: int, last: int) -> Iterator[Batch]:
        """The batches after step `done` up to step `last`; the pipeline runs on through the ends of epochs."""
        epoch, start = divmod(done, self.steps_per_epoch)
        readers = itertools.chain(
            [self.reader(epoch, start)], (self.reader(e) for e in range(epoch + 1, self.config.train.epochs))
        )
        batches = itertools.islice(itertools.chain.from_iterable(readers), last - done)
        while True:
            with self.clock.section("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def advance(self, batches: Iterator[Batch]) -> None:
        """One step: forward, backward, update, and the sums of the metrics."""
        self.world.seed_step(self.config.seed, self.step)
        # The last step of all is an optimizer step whatever is accumulated.
        task_T, logit_BT, batch = self.accumulation.progress(batches, is_last_batch=self.step == self.total)
        self.step_loss_T = task_T
        self.loss_T += task_T
        _update(self.metrics, logit_BT, batch)

    def _check(self, interrupt: Interrupt) -> None:
        """Stops every rank when one saw a non-finite loss or was told to stop."""
        bad, stop = self.world.all_sum(
            torch.tensor([not self.loss_T.isfinite().all(), interrupt.received], dtype=torch.float64)
        ).tolist()
        if bad:
            self.checkpoints.wait()
            kept = self.saved.latest()
            raise TrainingError(
                f"{self.run.path}: the loss is not finite at or up to {self.config.train.log_every} steps before step "
                f"{self.step} (on {bad:.0f} of {self.world.size} ranks); "
                + (f"the last good checkpoint is {kept}" if kept else "there is no checkpoint before it")
            )
        if stop and (self.step % self.config.train.accumulate == 0):
            self._save()
            self.checkpoints.wait()
            raise TrainingError(f"{self.run.path}: interrupted; step {self.step} is saved, the same command goes on")

    def _log_training(self, bar: Any) -> None:
        window, lifetime = self._merged(self.metrics.window), self._merged(self.metrics.lifetime)
        seconds = self.clock.lap()
        steps, self._logged = self.step - self._logged, self.step
        loss_T = self.world.all_sum(self.loss_T / self.world.size / steps).tolist()
        self.loss_T.zero_()
        speed = self.config.train.batch_size * steps / seconds["total"]
        if self.log is not None:
            values = {
                "loss": dict(zip(self.metrics.tasks, loss_T, strict=True)),
                "window": _table(window),
                "lifetime": _table(lifetime),
                "samples_per_second": speed,
                "seconds": seconds,
                "input_dist_overlapped": self.pipeline.overlapped,
                "peak_memory_mib": _peak_memory_mib(self.world.device),
                "learning_rate": dict(zip(("sparse", "dense"), self.optimizer.learning_rates, strict=True)),
            }
            self.log.write(self.step, "train", values)
            bar.set_postfix_str(f"{speed:,.0f} samples/s, NE {_shown(window['primary']['all'].ne)}")

    def _evaluate(self) -> None:
        """NE on the validation split; with none, nothing."""
        if not self.config.data.validation:
            return
        metrics = self._new_metrics(window=1)
        with self._evaluating():
            for batch in self._validation():
                _, (_, logit_BT, batch) = self.model(batch)
                _update(metrics, logit_BT, batch)
        result = self._merged(metrics.lifetime)
        self.ne, self.ne_step = result["primary"]["all"].ne, self.step
        if self.log is not None:
            self.log.write(self.step, "validation", _table(result))
            tqdm.write(f"step {self.step}: validation NE {_shown(self.ne)}", file=sys.stderr)

    def _record_y(self) -> None:
        """The distribution of every Y on the head of the validation split, as rank 0 sees it."""
        if not self.config.data.validation or "fm_attention" not in self.config.model.interactions:
            return
        with self._evaluating(), YRecorder(self.model) as recorder:
            for batch in itertools.islice(self._validation(), Y_BATCHES):
                self.model(batch)
        if self.log is not None:
            self.log.write(self.step, "y", recorder.summary())

    def _validation(self) -> Iterator[Batch]:
        data = self.config.data
        reader = BatchReader(
            data.validation,
            data,
            self.run.statistics,
            batch_size=self.config.train.batch_size - self.config.train.batch_size % self.world.size,
            rank=self.world.rank,
            world_size=self.world.size,
            seed=self.config.seed,
            shuffle=False,
            shards=self.world.size,
            cohorts=self.run.cohorts,
        )
        return (batch.to(self.world.device) for batch in reader)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Takes the model out of the pipeline, whose batches in flight stay where they are."""
        self.pipeline.detach()
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.train()
        self.pipeline.attach(self.model)

    def _save(self) -> None:
        with self.clock.section("checkpoint"):
            ne = self.ne if self.ne_step == self.step else None
            extra = {"step": self.step}
            self.checkpoints.save(self.step, self.model, self.optimizer, extra, loss=self.step_loss_T, ne=ne)

    def _new_metrics(self, window: int) -> BinaryMetrics:
        tasks = TASKS if self.config.train.auxiliary else TASKS[:1]
        cohorts = TASKS[1:] if self.run.cohorts else ()
        return BinaryMetrics(tasks, cohorts, window=window, device=self.world.device)

    def _merged(self, sums: Sums) -> dict[str, dict[str, Metric]]:
        return dataclasses.replace(sums, sums_CTS=self.world.all_sum(sums.sums_CTS)).compute()

    def _progress_bar(self, last: int) -> Any:
        return tqdm(total=last, initial=self.step, unit="step", disable=None if self.world.rank == 0 else True)

    def _profiler(self) -> Any:
        steps = self.config.train.profile_steps
        if not steps:
            return NoProfile()
        handler = tensorboard_trace_handler(str(self.run.path / "profile"), f"rank{self.world.rank}")
        return profile(schedule=schedule(wait=10, warmup=1, active=steps, repeat=1), on_trace_ready=handler)


class NoProfile(contextlib.nullcontext["NoProfile"]):
    """Stands where torch.profiler stands when no trace was asked for."""

    def __enter__(self) -> "NoProfile":
        return self

    def step(self) -> None:
        pass


def _update(metrics: BinaryMetrics, logit_BT: Tensor, batch: Batch) -> None:
    label_BT = batch.label_B[:, None]
    if len(metrics.tasks) > 1:
        label_BT = torch.cat([label_BT, label_BT * batch.member_B2], dim=1)
    metrics.update(logit_BT, label_BT, batch.weight_B, batch.member_B2 if len(metrics.cohorts) > 1 else None)


def _table(result: dict[str, dict[str, Metric]]) -> dict[str, Any]:
    return {task: {cohort: dataclasses.asdict(m) for cohort, m in row.items()} for task, row in result.items()}


def _shown(ne: float | None) -> str:
    return "undefined" if ne is None else f"{ne:.4f}"


def _peak_memory_mib(device: torch.device) -> float:
    """Of the process, or of the device where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
