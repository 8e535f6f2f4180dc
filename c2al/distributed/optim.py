"""One optimizer over a sharded model.

The tables are trained by row-wise Adagrad, fused into their backward. The rest is trained by Adam or
AdamW. Both learning rates decay alike; each has its own warm-up.

Row-wise Adagrad, for the gradient g of a row of D columns: m += mean(g^2); w -= lr * g / (sqrt(m) + eps).
A table that is split by columns keeps one m per row and column block, and the mean is over the columns
of that block. Another number of column blocks therefore trains other weights; another number of ranks
does not.

Of the dense weights an exponential moving average may be kept, which training itself does not use.

A fused table is updated by every backward. Where batches are accumulated before a step, a data_parallel
table is updated once, by their summed gradient, like the dense part.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from c2al.config import OptimizerConfig
from c2al.distributed.tables import local_tables


def learning_rate_scale(config: OptimizerConfig, step: int, total_steps: int, warmup_steps: int) -> float:
    """Factor on a learning rate at `step`, which counts from 0.

    It rises linearly to 1 in the warm-up, then decays to final_lr_fraction at step total_steps - 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.decay == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    remaining = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * remaining


class Optimizer:
    """Trains a sharded model; `step()` after every backward (or after the last of an accumulation).

    The fused tables are updated inside backward, so the learning rate of step t is set before it:
    at construction, after a load, and at the end of step t - 1.
    """

    def __init__(self, dmp: DistributedModelParallel, config: OptimizerConfig, total_steps: int, ema: float = 0.0):
        self._config, self._total_steps, self._fused = config, total_steps, dmp.fused_optimizer
        tables = local_tables(dmp)
        # The dense kernel of data_parallel tables has no optimizer of its own, and Adam would train
        # them differently from the same table under any other plan.
        self._replicated = {t.name: t.blocks[0] for t in tables if t.replicated}
        self.replicated_moments = {
            name: torch.zeros(len(b.weight_RD), device=b.weight_RD.device) for name, b in self._replicated.items()
        }
        """Row-wise Adagrad sums (rows,) of the data_parallel tables, by the name of the table's weight."""
        names = {t.name for t in tables}
        self._dense: dict[str, nn.Parameter] = {
            n: p for n, p in dmp.module.named_parameters() if n not in names and p.requires_grad
        }
        kind = torch.optim.AdamW if config.dense == "adamw" else torch.optim.Adam
        self._adam = kind(
            list(self._dense.values()),
            lr=config.dense_lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        # Adam makes its state at the first step. A checkpoint that is loaded before that step would be
        # dropped without a word.
        for p in self._dense.values():
            self._adam.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self._ema = ema
        self.averages = {n: p.detach().clone() for n, p in self._dense.items()} if ema else {}
        """Moving average of every dense parameter, live; none where there is no `ema`."""
        self.averaged = 0
        """Updates of the averages."""
        self.steps = 0
        self._schedule()

    @property
    def learning_rates(self) -> tuple[float, float]:
        """(tables, dense) of the coming step."""
        c = self._config
        sparse, dense = (
            learning_rate_scale(c, self.steps, self._total_steps, warmup)
            for warmup in (c.sparse_warmup_steps, c.warmup_steps)
        )
        return c.sparse_lr * sparse, c.dense_lr * dense

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients; TorchRec's gradient accumulation passes the flag as torch's optimizers take it."""
        self._adam.zero_grad(set_to_none=set_to_none)
        for block in self._replicated.values():
            assert block.parameter is not None
            block.parameter.grad = None

    def step(self) -> None:
        """Clips and applies the dense gradients, updates the data_parallel tables, moves the schedule on."""
        if self._config.clip_norm:
            nn.utils.clip_grad_norm_(list(self._dense.values()), self._config.clip_norm)
        self._adam.step()
        for name, block in self._replicated.items():
            if block.grad_RD is not None:
                self._row_wise_adagrad(block.weight_RD, block.grad_RD, self.replicated_moments[name])
        if self.averages:
            self._average()
        self.steps += 1
        self._schedule()

    def dense_state(self) -> dict[str, torch.Tensor]:
        """Adam's live state tensors, named PARAMETER.step, .exp_avg and .exp_avg_sq."""
        return {f"{name}.{key}": value for name, p in self._dense.items() for key, value in self._adam.state[p].items()}

    @torch.no_grad()
    def restart_averages(self) -> None:
        """Sets the averages to the weights, as at construction."""
        for name, average in self.averages.items():
            average.copy_(self._dense[name])
        self.averaged = 0

    @contextlib.contextmanager
    def averages_in_place(self) -> Iterator[None]:
        """The model has the averages for its dense weights; without `ema` it is left as it is."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, int]:
        """What is neither in `dense_state`, `averages`, `replicated_moments` nor in the tables' fused state."""
        return {"steps": self.steps} | ({"averaged": self.averaged} if self.averages else {})

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]
        self.averaged = state.get("averaged", 0)
        self._schedule()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.averages.items():
            weight = self._dense[name].detach().clone()
            self._dense[name].copy_(average)
            average.copy_(weight)

    @torch.no_grad()
    def _average(self) -> None:
        """average += (1 - decay) * (weight - average).

        The decay rises to `ema` as (1 + n) / (10 + n) at update n, or the initial weights would weigh in a
        short run for as long as the average looks back.
        """
        decay = min(self._ema, (1 + self.averaged) / (10 + self.averaged))
        averages, weights = list(self.averages.values()), [self._dense[name] for name in self.averages]
        torch._foreach_lerp_(averages, cast(list[torch.Tensor], weights), 1 - decay)
        self.averaged += 1

    def _schedule(self) -> None:
        sparse, dense = self.learning_rates
        for group in self._fused.param_groups:
            group["lr"] = sparse
        self._fused.step()  # hands the rate to the kernels; their update itself is in backward
        self._adam.param_groups[0]["lr"] = dense

    @torch.no_grad()
    def _row_wise_adagrad(self, weight_RD: torch.Tensor, grad_RD: torch.Tensor, moment_R: torch.Tensor) -> None:
        """The fused kernel's update. A row that no gradient reached is left alone, weight decay included."""
        touched_R = (grad_RD != 0).any(dim=1)
        if self._config.sparse_weight_decay:
            grad_RD = grad_RD + self._config.sparse_weight_decay * weight_RD * touched_R[:, None]
        # Rows that were not touched have a gradient of 0, which leaves both as they are. Taking the
        # touched rows out would wait for the device in every step, to learn how many there are.
        moment_R += grad_RD.square().mean(dim=1)
        rate_R = self.learning_rates[0] / (moment_R.sqrt() + self._config.sparse_eps)
        weight_RD -= torch.where(touched_R, rate_R, 0.0)[:, None] * grad_RD


def make_optimizer(
    dmp: DistributedModelParallel, config: OptimizerConfig, total_steps: int, ema: float = 0.0
) -> Optimizer:
    """Optimizer of a model that `shard_model` made; `total_steps` is where the schedule ends.

    `ema` is the decay of the moving average of the dense weights; 0: none.
    """
    return Optimizer(dmp, config, total_steps, ema)
