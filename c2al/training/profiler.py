"""torch.profiler on some steps of a training run."""

import contextlib
from typing import Any

from torch.profiler import profile, schedule, tensorboard_trace_handler

from c2al.distributed.process import World
from c2al.training.run_folder import Run


def profiler_of(run: Run, world: World) -> Any:
    """A context with a method `step`: the profiler that `train.profile_steps` asks for, or one that does nothing.

    The trace of every rank goes into the run's folder `profile`.
    """
    steps = run.config.train.profile_steps
    if not steps:
        return _NoProfile()
    handler = tensorboard_trace_handler(str(run.path / "profile"), f"rank{world.rank}")
    return profile(schedule=schedule(wait=10, warmup=1, active=steps, repeat=1), on_trace_ready=handler)


class _NoProfile(contextlib.nullcontext["_NoProfile"]):
    """Stands where torch.profiler stands when no trace was asked for."""

    def __enter__(self) -> "_NoProfile":
        return self

    def step(self) -> None:
        pass
