"""One training run, from its folder to its last checkpoint."""

import contextlib
import dataclasses
import itertools
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from c2al.config import Config
from c2al.data.batch import Batch
from c2al.distributed.checkpoint import CheckpointReader, CheckpointWriter
from c2al.distributed.optim import make_optimizer
from c2al.distributed.process import World, peak_memory_mib
from c2al.distributed.sharding import plan_table, save_plan, shard_model
from c2al.errors import CheckpointError, NotFiniteError
from c2al.training.batches import training_batches, training_reader, validation_batches
from c2al.training.compilation import compile_training, is_compiled
from c2al.training.diagnostics import UnitRecorder, YRecorder
from c2al.training.dynamics import Dynamics
from c2al.training.early_stopping import Waiting
from c2al.training.factors import naming_factors
from c2al.training.interrupt import Interrupt, interruption
from c2al.training.metrics import BinaryMetrics, SavedSums, Sums, as_records, shown_ne
from c2al.training.model import TrainTask
from c2al.training.objective import Objective
from c2al.training.pipeline import Clock, make_steps
from c2al.training.profiler import profiler_of
from c2al.training.run_folder import MetricsLog, Run, sole_writer, start_run
from c2al.training.start_from import Start
from c2al.training.start_weights import load_start
from c2al.typed import Problems, build

PRIMARY = "primary"
"""Name of the primary task; the others have the names of their cohorts."""
Y_BATCHES = 8
"""Validation batches whose Y is recorded."""
INTERRUPT_STEPS = 10
"""Steps after which several ranks tell each other at the latest that one of them was told to stop."""


def train(
    config: Config,
    output: Path,
    world: World,
    cohorts: Path | None = None,
    like: Path | None = None,
    start: Start | None = None,
) -> float | None:
    """Trains to the end, going on from the newest checkpoint in `output`, and writes the run's folder.

    `start` names the run whose weights a new run begins with; like: see `start_run`. Returns the last validation
    NE, or with early stopping the best (None: no validation split, or undefined). A finished run is left as it
    is. Trained weights are never deleted: only a run that fails before its first step takes its new folder away.

    Raises C2ALError: OutputError when another process writes `output`, what `start_run` raises before
    the first step, NotFiniteError, InterruptError after a signal, DataError for a bad
    value met in training.
    """
    missing = [p for p in (output, *output.parents) if not p.exists()]
    with sole_writer(output, world), naming_factors(config):
        trainer = None
        try:
            trainer = Trainer(start_run(output, config, cohorts, world, like, start), world)
            return trainer.train()
        except BaseException:
            if world.rank == 0 and missing and (trainer is None or trainer.step == 0):
                _remove(missing)
            raise


def _remove(made: Sequence[Path]) -> None:
    """Removes the folder made[0], and of its parents made[1:] those that are empty."""
    shutil.rmtree(made[0], ignore_errors=True)
    with contextlib.suppress(OSError):
        for parent in made[1:]:
            parent.rmdir()


class Trainer:
    """One training run on this rank: everything the loop in `train` needs, built once."""

    def __init__(self, run: Run, world: World):
        self.run, self.world, self.config = run, world, run.config
        self.steps_per_epoch = world.together(lambda: training_reader(run, world).steps)
        self.total = self.steps_per_epoch * self.config.train.epochs
        if self.config.train.max_steps:
            self.total = min(self.total, self.config.train.max_steps)

        torch.manual_seed(self.config.seed)
        self.clock = Clock()
        task = TrainTask(self.config, world.size, run.names)
        if self.config.train.prime_biases:
            rates = run.base_rates.rates(self.config.train.auxiliary_target)
            task.model.over.heads.prime(rates[: 1 + len(run.auxiliary)])
        self.model = shard_model(task, self.config, world)
        # Sharding may copy modules, so the objective is looked up in what came out of it.
        self.objective = next(m for m in self.model.modules() if isinstance(m, Objective))
        self.dynamics = Dynamics(self.model, (PRIMARY, *run.auxiliary))
        # The schedule counts optimizer steps.
        updates = -(-self.total // self.config.train.accumulate)
        self.optimizer = make_optimizer(self.model, self.config.train.optimizer, updates, self.config.train.ema)
        self.steps = make_steps(self.model, self.optimizer, world, self.clock, self.config.train.accumulate)
        self.saved = CheckpointReader(run.checkpoints, world)
        self.checkpoints = CheckpointWriter(run.checkpoints, self.config.train.checkpoint, world)
        self.step = 0
        """Steps done."""
        self.ne: float | None = None
        """NE of the last evaluation."""
        self.waiting = Waiting()
        self.compiled: bool | None = None
        """Whether the steps before a resume were compiled; None in a new run."""
        self.metrics = self._new_metrics()
        if (newest := self.saved.latest()) is not None:
            self._resume(newest)
        elif run.start is not None:
            self._say(load_start(run, self.model, self.optimizer, world))

        compile_training(self.model, self.config, world, self.total, self.compiled)
        self.loss_T = torch.zeros(len(self.metrics.tasks), dtype=torch.float64, device=world.device)
        """Sum of the steps' task losses since the last log line."""
        self.step_loss_T = self.loss_T
        """Task losses of the last step."""
        self._logged = self.step
        self._stopping = 0
        """The signal that ends training after the next optimizer step; 0: none."""
        self.log = world.together(lambda: MetricsLog(run.path, self.step) if world.rank == 0 else None)
        self._recorded = world.broadcast(self.log.recorded if self.log is not None else frozenset())
        """Kinds of the records that an earlier process left of this step."""
        world.together(lambda: save_plan(self.model, run.path / "plan.json") if world.rank == 0 else None)
        if world.rank == 0:
            print(plan_table(self.model), file=sys.stderr)

    def train(self) -> float | None:
        """The loop: fetch, step, check, log, save, evaluate."""
        train = self.config.train
        ended = self.step >= self.total or self.waiting.over(train.early_stopping)
        if ended and "weights" in self._recorded:  # a run's last record
            done = f"{self.step} of {self.total} steps are done"
            self._say(f"{self.run.path}: already finished: {done}, nothing to train")
            return self._result()
        batches = self._batches()
        with (
            self.checkpoints,
            Interrupt() as interrupt,
            self._progress_bar() as bar,
            profiler_of(self.run, self.world) as profiler,
        ):
            self._catch_up()
            while self.step < self.total and not self.waiting.over(train.early_stopping):
                self.advance(batches)
                bar.update()
                profiler.step()
                self._check(interrupt, bar)
                if self._due(train.log_every):
                    self._log_training(bar)
                # Saved before the validation split is read: a failure there costs no trained weights.
                if saved := self._due(train.checkpoint.every_steps):
                    self._save()
                if self._due(train.y_every):
                    self._record_y()
                if self._due(train.eval_every):
                    self._evaluate()
                    if saved or self.waiting.decisive(train.early_stopping):
                        self._save(self.ne)
            if self.step < self.total:
                self._end_early(bar)
        self._record("weights", self.dynamics.weights())
        if self.log is not None:
            self.log.close()
        interrupt.pass_on()  # during the last step: this run is whole, but an experiment's next one must not begin
        return self._result()

    def _catch_up(self) -> None:
        """Does what an earlier process had still to do after the step that it saved."""
        if self.step and self._due(self.config.train.y_every) and "units" not in self._recorded:
            self._record_y()
        validated = bool(self.config.data.validation)
        if validated and self._due(self.config.train.eval_every) and self.waiting.missed(self.step):
            self._evaluate()
            self._save(self.ne)

    def _end_early(self, bar: Any) -> None:
        """What the last step does besides, where patience ended training."""
        if self.step > self._logged:
            self._log_training(bar)
        if not self._due(self.config.train.y_every):
            self._record_y()
        self._say(f"step {self.step}: {self.waiting.since} evaluations without a better NE, training ends")

    def _result(self) -> float | None:
        """Validation NE of the run's model: of the best checkpoint with early stopping, else of the last."""
        return self.waiting.best if self.run.result_is_best else self.ne

    def _due(self, every: int) -> bool:
        return self.step == self.total or (every > 0 and self.step % every == 0)

    def _until_pause(self) -> int:
        """Steps until the model is evaluated, the coming one included."""
        train = self.config.train
        every = [n for n in (train.eval_every, train.y_every) if n]
        return min([self.total - self.step, *(n - self.step % n for n in every)])

    def _batches(self) -> Iterator[Batch]:
        """The batches of the steps that are left, with the waiting for them on the clock."""
        batches = training_batches(self.run, self.world, self.steps_per_epoch, self.step, self.total)
        while True:
            with self.clock.section("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def advance(self, batches: Iterator[Batch]) -> None:
        """One step: forward, backward, update, and the sums of the metrics. Never waits for the device."""
        step = self.step + 1
        self.world.seed_step(self.config.seed, step)
        self.objective.at_step(step - 1, self.total)
        self.dynamics.before(step, logged=step == self.total or step % self.config.train.log_every == 0)
        # The last step of all is an optimizer step whatever is accumulated.
        task_T, logit_BT, batch = self.steps.progress(batches, self._until_pause(), step == self.total)
        self.step_loss_T = task_T
        self.loss_T += task_T
        self._update(self.metrics, logit_BT, batch)
        self.step = step

    def _check(self, interrupt: Interrupt, bar: Any) -> None:
        """Stops every rank when one saw a loss that is not finite or was told to stop.

        The losses are looked at, which waits for the device, wherever a checkpoint, an evaluation or a
        log line depends on them. The signal is the host's own and is looked at without the device.
        """
        train = self.config.train
        intervals = (train.log_every, train.eval_every, train.y_every, train.checkpoint.every_steps)
        due = any(self._due(every) for every in intervals)
        if self.world.size == 1:
            self._stopping = interrupt.received
        elif due or self.step % INTERRUPT_STEPS == 0:
            self._stopping = self._stopping or interrupt.told(self.world)
        # Half-summed gradients are not saved.
        stop = bool(self._stopping) and self.step % train.accumulate == 0 and self.step < self.total
        if due or stop:
            self._refuse_nonfinite()
        if stop:
            if self.step > self._logged:
                self._log_training(bar)
            self._save()
            self.checkpoints.wait()
            said = f"{self.run.path}: interrupted; step {self.step} is saved, the same command goes on"
            raise interruption(self._stopping, said)

    def _refuse_nonfinite(self) -> None:
        """Raises NotFiniteError on every rank when a loss since the last log line is not finite on any."""
        bad = self.world.all_sum(torch.tensor(float(not self.loss_T.isfinite().all()))).item()
        if bad:
            self.checkpoints.wait()
            kept = self.saved.latest()
            raise NotFiniteError(
                f"{self.run.path}: the loss is not finite at a step from {self._logged + 1} to {self.step} (on "
                f"{bad:.0f} of {self.world.size} ranks); "
                + (f"the last good checkpoint is {kept}" if kept else "there is no checkpoint before it")
            )

    def _log_training(self, bar: Any) -> None:
        window, lifetime = self._merged(self.metrics.window), self._merged(self.metrics.lifetime)
        self.metrics.reset_window()
        seconds = self.clock.lap()
        steps, self._logged = self.step - self._logged, self.step
        loss_T = self.world.all_sum(self.loss_T / self.world.size / steps).tolist()
        self.loss_T.zero_()
        speed = self.config.train.batch_size * steps / seconds["total"]
        shown = window.compute()
        values = {
            "loss": dict(zip(self.metrics.tasks, loss_T, strict=True)),
            "window": as_records(shown),
            "lifetime": as_records(lifetime.compute()),
            "samples_per_second": speed,
            "seconds": seconds,
            "input_dist_overlapped": self.steps.overlapped,
            "peak_memory_mib": peak_memory_mib(self.world.device),
            "learning_rate": dict(zip(("sparse", "dense"), self.optimizer.learning_rates, strict=True)),
            "lambda": dict(zip(self.run.auxiliary, self.objective.lambda_C, strict=True)),
            **self.objective.shown(),
        }
        self._record("train", values)
        if (gramian := self.dynamics.gramian()) is not None:
            self._record("gramian", gramian)
        said = f"{speed:,.0f} samples/s, NE {shown_ne(shown['primary']['all'].ne)}"
        bar.set_postfix_str(said)
        if bar.disable:
            self._say(f"step {self.step} of {self.total}: {said}")

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        """Writes a record of this step on rank 0; a disk that is full ends all ranks."""
        log = self.log
        self.world.together(lambda: log.write(self.step, kind, values) if log is not None else None)

    def _evaluate(self) -> None:
        """NE on the validation split; with none, nothing."""
        if not self.config.data.validation:
            return
        metrics = self._new_metrics()
        with self._evaluating(), self.optimizer.averages_in_place():
            for batch in validation_batches(self.run, self.world):
                _, (_, logit_BT, batch) = self.model(batch)
                self._update(metrics, logit_BT, batch)
        result = self._merged(metrics.lifetime).compute()
        self.ne = result["primary"]["all"].ne
        self.waiting = self.waiting.after(self.config.train.early_stopping, self.ne, self.step)
        self._record("validation", as_records(result))
        self._say(f"step {self.step}: validation NE {shown_ne(self.ne)}")

    def _record_y(self) -> None:
        """The distribution of every Y and the dead units on the first validation batches, as rank 0 sees them."""
        if not self.config.data.validation:
            return
        with self._evaluating(), YRecorder(self.model) as recorder, UnitRecorder(self.model) as units:
            for batch in itertools.islice(validation_batches(self.run, self.world), Y_BATCHES):
                self.model(batch)
        if "fm_attention" in self.config.model.interactions:
            self._record("y", recorder.summary())
        self._record("units", units.summary())

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        with self.steps.paused(), torch.no_grad():
            self.model.eval()
            yield
            self.model.train()

    def _save(self, ne: float | None = None) -> None:
        """Saves this step; `ne` is that of the very weights that are saved, or None."""
        with self.clock.section("checkpoint"):
            # Rank 0's `extra` is the one that is kept, so it holds the totals of all ranks.
            lifetime = self._merged(self.metrics.lifetime).saved()
            compiled = is_compiled(self.model)
            extra = _Extra(step=self.step, ne=self.ne, lifetime=lifetime, waiting=self.waiting, compiled=compiled)
            self.checkpoints.save(
                self.step, self.model, self.optimizer, dataclasses.asdict(extra), loss=self.step_loss_T, ne=ne
            )

    def _resume(self, path: Path) -> None:
        """Goes on from a checkpoint: weights, optimizer, position and the totals of the metrics."""
        extra = self.saved.load(path, self.model, self.optimizer, same_arithmetic=True)
        try:
            problems: list[str] = []
            saved = build(_Extra, extra, "", problems)
            if problems:
                raise ValueError("; ".join(problems))
            lifetime = saved.lifetime.restored()
            self.metrics = self._new_metrics(lifetime if self.world.rank == 0 else None)
        except ValueError as e:
            raise CheckpointError(f"{path}: not a checkpoint of this training run: {e}") from e
        self.step, self.ne, self.waiting, self.compiled = saved.step, saved.ne, saved.waiting, saved.compiled
        if self.step < self.total and self.step % self.config.train.accumulate:
            raise CheckpointError(
                f"{path}: ended between two optimizer steps, since train.max_steps was no multiple of "
                f"train.accumulate = {self.config.train.accumulate}; it cannot go on to step {self.total}"
            )

    def _say(self, text: str) -> None:
        if self.world.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def _new_metrics(self, lifetime: Sums | None = None) -> BinaryMetrics:
        return BinaryMetrics(
            (PRIMARY, *self.run.auxiliary), self.run.names, device=self.world.device, lifetime=lifetime
        )

    def _update(self, metrics: BinaryMetrics, logit_BT: Tensor, batch: Batch) -> None:
        target_BT = self.objective.targets(batch.label_B, batch.member_BC)
        metrics.update(logit_BT, target_BT, batch.weight_B, batch.member_BC)

    def _merged(self, sums: Sums) -> Sums:
        return dataclasses.replace(sums, sums_CTS=self.world.all_sum(sums.sums_CTS))

    def _progress_bar(self) -> Any:
        return tqdm(total=self.total, initial=self.step, unit="step", disable=self.world.rank > 0 or None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Extra:
    """What a checkpoint keeps beside the tensors."""

    step: int
    ne: float | None
    lifetime: SavedSums
    waiting: Waiting = dataclasses.field(default_factory=Waiting)
    compiled: bool | None = None
    """Whether training steps were compiled; None where an older version did not say."""

    def problems(self) -> Problems:
        if self.step < 0:
            yield "step", f"must not be negative, is {self.step}"
