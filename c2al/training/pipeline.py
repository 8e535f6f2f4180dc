"""TorchRec's training pipeline with its stages on a clock."""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from c2al.data.batch import Batch
from c2al.distributed.optim import Optimizer

logger = logging.getLogger(__name__)


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
