"""When a run ends before its steps are done: validation NE that no longer gets better."""

import dataclasses
import math

from c2al.config import EarlyStoppingConfig
from c2al.typed import Problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Waiting:
    """Where a run stands: what a checkpoint keeps, so that a resumed run stops at the same step."""

    best: float | None = None
    """Lowest validation NE by more than min_delta; None before the first that is defined."""
    since: int = 0
    """Evaluations since then without a better one."""
    step: int = 0
    """Step of the last evaluation."""

    def problems(self) -> Problems:
        if self.since < 0 or self.step < 0:
            yield "since", f"must not be negative, is {self.since} at step {self.step}"

    def after(self, config: EarlyStoppingConfig, ne: float | None, step: int) -> "Waiting":
        """After an evaluation; an NE that is undefined is not better than anything."""
        better = ne is not None and ne < (math.inf if self.best is None else self.best - config.min_delta)
        if better:
            return Waiting(best=ne, since=0, step=step)
        return Waiting(best=self.best, since=self.since + 1, step=step)

    def decisive(self, config: EarlyStoppingConfig) -> bool:
        """Whether the last evaluation found the best weights so far, or ends training."""
        return config.patience > 0 and (self.since == 0 or self.over(config))

    def missed(self, step: int) -> bool:
        """Whether a run that goes on at `step`, which is to be evaluated, ended between saving and evaluating it."""
        return step > self.step

    def over(self, config: EarlyStoppingConfig) -> bool:
        """Whether training ends here."""
        return 0 < config.patience <= self.since
