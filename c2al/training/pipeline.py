"""One training step after another: TorchRec's pipeline, or a plain loop where it has nothing to overlap."""

import contextlib
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
    TrainPipelineSparseDist,
)

from c2al.data.batch import Batch
from c2al.distributed.optim import Optimizer
from c2al.distributed.process import World

logger = logging.getLogger(__name__)


class Steps(Protocol):
    """Trains a model batch by batch."""

    @property
    def overlapped(self) -> bool | None:
        """Whether the next batch's input distribution runs ahead of this one's compute; None: there is none."""

    def progress(self, batches: Iterator[Batch], is_last: bool) -> Any:
        """Forward and backward of the next batch, and the update where accumulation ends; what the model returns
        beside the loss. Raises StopIteration without a batch."""

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The model as it is, to be run by others; batches in flight stay where they are."""


def make_steps(
    model: DistributedModelParallel, optimizer: Optimizer, world: World, clock: "Clock", accumulate: int
) -> Steps:
    """The plain loop for one process on the CPU, where TorchRec's pipeline only costs time; else the pipeline."""
    if world.alone_on_cpu:
        return PlainSteps(model, optimizer, clock, accumulate)
    return PipelinedSteps(model, optimizer, world.device, clock, accumulate)


class PlainSteps:
    """Fetch, forward, backward, update."""

    overlapped = None

    def __init__(self, model: DistributedModelParallel, optimizer: Optimizer, clock: "Clock", accumulate: int) -> None:
        self._model, self._optimizer, self._clock, self._accumulate = model, optimizer, clock, accumulate
        self._summed = 0
        """Batches whose gradients wait for an update."""

    def progress(self, batches: Iterator[Batch], is_last: bool) -> Any:
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
    """TorchRec's pipeline and its gradient accumulation, which knows when ranks must not exchange gradients."""

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: Optimizer,
        device: torch.device,
        clock: "Clock",
        accumulate: int,
    ) -> None:
        self._model = model
        self._pipeline = Pipeline(model, optimizer, device, clock)
        self._accumulation = GradientAccumulationWrapper(
            self._pipeline,
            self._pipeline.optimizer,  # the timed one: the wrapper calls what it is given, not the pipeline's
            model,
            GradientAccumulationConfig(num_steps=accumulate),
        )

    @property
    def overlapped(self) -> bool | None:
        return self._pipeline.overlapped

    def progress(self, batches: Iterator[Batch], is_last: bool) -> Any:
        return self._accumulation.progress(batches, is_last_batch=is_last)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._pipeline.detach()
        yield
        self._pipeline.attach(self._model)


class Pipeline(TrainPipelineSparseDist):  # type: ignore[misc]  # torchrec is untyped
    """TorchRec's overlapped pipeline with its stages on our clock."""

    def __init__(self, model: torch.nn.Module, optimizer: Optimizer, device: torch.device, clock: "Clock"):
        self._clock, self._said = clock, False
        self.optimizer = TimedOptimizer(optimizer, clock)
        super().__init__(model, self.optimizer, device, custom_model_fwd=self._forward)

    @property
    def overlapped(self) -> bool:
        """Whether the next batch's input distribution runs ahead of this one's compute."""
        return bool(self._pipelined_modules)

    def _forward(self, batch: Batch | None) -> Any:
        if not self._said and not self.overlapped:
            logger.warning("input distribution does not overlap compute: no sharded table can run ahead in this model")
        self._said = True
        with self._clock.section("forward"):
            return self._model(batch)

    def _backward(self, losses: Tensor) -> None:
        with self._clock.section("backward"):
            super()._backward(losses)


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
