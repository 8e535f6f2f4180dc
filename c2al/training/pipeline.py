"""One training step after another: TorchRec's pipeline, or a plain loop where it has nothing to overlap."""

import contextlib
import itertools
import logging
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import (
    GradientAccumulationConfig,
    GradientAccumulationWrapper,
    PrefetchTrainPipelineSparseDist,
    TrainPipelineSparseDist,
)

from c2al.data.batch import Batch
from c2al.distributed.optim import Optimizer
from c2al.distributed.process import World
from c2al.distributed.tables import plan_of, without_locks

logger = logging.getLogger(__name__)


class Steps(Protocol):
    """Trains a model batch by batch."""

    @property
    def overlapped(self) -> bool | None:
        """Whether the next batch's input distribution runs ahead of this one's compute; None: there is none."""

    def progress(self, batches: Iterator[Batch], ahead: int, is_last: bool) -> Any:
        """Forward and backward of the next batch, and the update where accumulation ends; what the model returns
        beside the loss. Raises StopIteration without a batch.

        `ahead`: batches until `paused`, this one included; no more are taken from `batches` before."""

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The model as it is, to be run by others, after as many batches as `progress` was told of."""


def make_steps(
    model: DistributedModelParallel, optimizer: Optimizer, world: World, clock: "Clock", accumulate: int
) -> Steps:
    """The plain loop for one process on the CPU, where TorchRec's pipeline only costs time; else the pipeline.

    Where a table is in host memory, its rows of the next batch are cached while this one's forward pass runs.
    """
    if world.alone_on_cpu:
        return PlainSteps(model, optimizer, clock, accumulate)
    cached = any(placement.cache_load_factor for placement in plan_of(model).values())
    kind = PrefetchPipeline if cached else Pipeline
    return PipelinedSteps(model, optimizer, kind(model, optimizer, world.device, clock), accumulate)


class PlainSteps:
    """Fetch, forward, backward, update."""

    overlapped = None

    def __init__(self, model: DistributedModelParallel, optimizer: Optimizer, clock: "Clock", accumulate: int) -> None:
        self._model, self._optimizer, self._clock, self._accumulate = model, optimizer, clock, accumulate
        self._summed = 0
        """Batches whose gradients wait for an update."""

    def progress(self, batches: Iterator[Batch], ahead: int, is_last: bool) -> Any:
        batch = next(batches)
        if not self._summed:
            self._optimizer.zero_grad()
        with record_function("## forward ##"), self._clock.section("forward"):
            loss, output = self._model(batch)
        with record_function("## backward ##"), self._clock.section("backward"):
            loss.backward()
        self._summed += 1
        if is_last or self._summed == self._accumulate:
            with record_function("## optimizer ##"), self._clock.section("optimizer"):
                self._optimizer.step()
            self._summed = 0
        return output

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        yield


class PipelinedSteps:
    """TorchRec's pipeline and its gradient accumulation, which knows when ranks must not exchange gradients.

    The pipeline runs empty before a pause: a batch whose rows are cached already would be looked up in the place
    of the first one that others give the model.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: Optimizer,
        pipeline: "Pipeline | PrefetchPipeline",
        accumulate: int,
    ) -> None:
        self._model, self._pipeline = model, pipeline
        self._accumulation = GradientAccumulationWrapper(
            pipeline,
            pipeline.optimizer,  # the timed one: the wrapper calls what it is given, not the pipeline's
            model,
            GradientAccumulationConfig(num_steps=accumulate),
        )
        self._batches: Iterator[Batch] = iter(())
        self._left = 0
        """Batches until the pipeline is empty."""

    @property
    def overlapped(self) -> bool | None:
        return self._pipeline.overlapped

    def progress(self, batches: Iterator[Batch], ahead: int, is_last: bool) -> Any:
        if not self._left:
            self._batches, self._left = itertools.islice(batches, ahead), ahead
        output = self._accumulation.progress(self._batches, is_last_batch=is_last)
        self._left -= 1
        return output

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        assert not self._left, f"{self._left} batches are under way"
        self._pipeline.detach()
        with without_locks(self._model):
            yield
        self._pipeline.attach(self._model)


class _Timed:
    """A pipeline of TorchRec with its stages on our clock."""

    _model: torch.nn.Module
    _pipelined_modules: list[Any]

    def __init__(self, model: torch.nn.Module, optimizer: Optimizer, device: torch.device, clock: "Clock"):
        self._clock = clock
        self.optimizer = TimedOptimizer(optimizer, clock)
        self.overlapped: bool | None = None
        """Whether the next batch's input distribution runs ahead of this one's compute; None before the first."""
        super().__init__(model, self.optimizer, device, custom_model_fwd=self._forward)  # type: ignore[call-arg]

    def _forward(self, batch: Batch | None) -> Any:
        if self.overlapped is None:
            self.overlapped = bool(self._pipelined_modules)
            if not self.overlapped:
                logger.warning(
                    "input distribution does not overlap compute: no sharded table can run ahead in this model"
                )
        with self._clock.section("forward"):
            return self._model(batch)


class Pipeline(_Timed, TrainPipelineSparseDist):  # type: ignore[misc]  # torchrec is untyped
    """Copies to the device and distributes the inputs of the batches to come."""

    def _backward(self, losses: Tensor) -> None:
        with self._clock.section("backward"):
            super()._backward(losses)


class PrefetchPipeline(_Timed, PrefetchTrainPipelineSparseDist):  # type: ignore[misc]
    """Also caches the next batch's rows of tables in host memory. Its backward pass is in the clock's "other"."""


class TimedOptimizer:
    """An Optimizer whose updates are on the clock; what a TrainPipeline needs of one."""

    def __init__(self, optimizer: Optimizer, clock: "Clock"):
        self._optimizer, self._clock = optimizer, clock

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        with self._clock.section("optimizer"):
            self._optimizer.step()


class Clock:
    """Where the time between two log lines went, in seconds as the host sees it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Seconds by section since the last lap; "total" is all of it, "other" (input
        distribution, metrics, logging) what no section took."""
        now = time.perf_counter()
        total, self._start = now - self._start, now
        seconds, self._seconds = self._seconds, {}
        return {**seconds, "other": total - sum(seconds.values()), "total": total}
