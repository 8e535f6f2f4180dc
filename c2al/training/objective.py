"""The loss of one step, from a Batch's columns.

Letters: B batch, C cohorts, T tasks, the primary one first, G = C + 1 groups: the cohorts and the rows of none.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from c2al.config import Config
from c2al.nn.objective import Target, lambda_scale, objective, targets

REST = "rest"
"""Name of the group of the rows that are in no cohort."""


class Objective(nn.Module):
    """C2AL Eq. 4, or what train.cohort_weight, group_dro and uncertainty_weighting make of it.

    A module, so that the pipeline's tracer need not look inside. `cohorts` are the names of the columns of a
    Batch's member_BC. What training adapts is saved: GroupDRO's weights are a buffer, the log variances are
    parameters; serving has neither.
    """

    weight_G: Tensor

    def __init__(self, config: Config, cohorts: Sequence[str], world_size: int) -> None:
        super().__init__()
        train = config.train
        self.target: Target = train.auxiliary_target
        self.auxiliary = tuple(cohorts) if train.auxiliary else ()
        """Names of the auxiliary tasks."""
        self._base_C = tuple(train.lambda_of(name) for name in self.auxiliary)
        self._schedule, self._share, self._world_size = train.lambda_schedule, train.lambda_share, world_size
        self.lambda_C = self._base_C
        """What the coming step weighs each auxiliary loss with; numbers of the host."""
        self._cohort_weight, self._group_dro = train.cohort_weight, train.group_dro
        self._groups = (*cohorts, REST)
        if self._group_dro:
            groups = len(self._groups)
            self.register_buffer("weight_G", torch.full((groups,), 1 / groups, dtype=torch.float64))
        # exp(-s) is what a task's loss is weighed with: at the start 1 for the primary one, and lambda.
        start_T = [0.0, *(-math.log(value) if value > 0 else math.inf for value in self._base_C)]
        self.log_variance_T = nn.Parameter(torch.tensor(start_T)) if train.uncertainty_weighting else None

    def at_step(self, step: int, total_steps: int) -> None:
        """Sets the lambdas of `step` (from 0) of `total_steps`."""
        scale = lambda_scale(self._schedule, self._share, step, total_steps)
        self.lambda_C = tuple(value * scale for value in self._base_C)

    def targets(self, label_B: Tensor, member_BC: Tensor) -> Tensor:
        """(B, T) what every task learns."""
        return targets(label_B, member_BC[:, : len(self.auxiliary)], self.target)

    def forward(
        self, logit_BT: Tensor, label_B: Tensor, weight_B: Tensor, member_BC: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        # Gradients are averaged over ranks; local sum / (global rows / ranks) makes that the global mean.
        loss = objective(
            logit_BT,
            self.targets(label_B, member_BC),
            weight_B,
            lambda_C=self.lambda_C,
            rows=rows / self._world_size,
            factor_B=self._factor(logit_BT[:, 0], label_B, weight_B, member_BC, rows),
            log_variance_T=self.log_variance_T,
        )
        return loss.total, loss.task_T

    def _factor(
        self, logit_B: Tensor, label_B: Tensor, weight_B: Tensor, member_BC: Tensor, rows: int
    ) -> Tensor | None:
        """What each row counts for in the primary loss; None: 1 each."""
        if self._group_dro:
            return self._adapt(logit_B, label_B, weight_B, member_BC, rows)
        if self._cohort_weight != 1:
            return 1 + (self._cohort_weight - 1) * (member_BC > 0).any(dim=1)
        return None

    @torch.no_grad()
    def _adapt(self, logit_B: Tensor, label_B: Tensor, weight_B: Tensor, member_BC: Tensor, rows: int) -> Tensor:
        """GroupDRO: one step of the groups' weights, then the factors that make the primary loss their weighted sum.

        q_g <- q_g exp(eta L_g), normalised, and the loss is sum of q_g L_g, where L_g is the mean loss of the group
        in the global batch (Sagawa et al., ICLR 2020, arXiv 1911.08731, Algorithm 1, all groups per step). A group
        without rows in the batch has L_g = 0. A row in two cohorts counts in both. Collective.
        """
        member_BG = torch.cat([member_BC, (member_BC == 0).all(dim=1, keepdim=True).to(member_BC)], dim=1)
        in_BG = member_BG.double() * weight_B[:, None]
        bce_B = F.binary_cross_entropy_with_logits(logit_B.float(), label_B, reduction="none").double()
        sums_2G = torch.stack([bce_B @ in_BG, in_BG.sum(dim=0)])
        if self._world_size > 1:
            dist.all_reduce(sums_2G)
        loss_G, total_G = sums_2G[0] / sums_2G[1].clamp_min(1e-300), sums_2G[1]
        # Of weights as logarithms only differences count, and none of them can overflow.
        self.weight_G.copy_(torch.softmax(self.weight_G.log() + self._group_dro * loss_G, dim=0))
        share_G = torch.where(total_G > 0, self.weight_G * rows / total_G.clamp_min(1e-300), 0.0)
        return (member_BG.double() @ share_G).float()

    def shown(self) -> dict[str, dict[str, float]]:
        """What training has adapted, for the log; waits for the device."""
        shown = {}
        if self._group_dro:
            shown["group_weight"] = dict(zip(self._groups, self.weight_G.tolist(), strict=True))
        if self.log_variance_T is not None:
            weights = torch.exp(-self.log_variance_T.detach()).tolist()
            shown["task_weight"] = dict(zip(("primary", *self.auxiliary), weights, strict=True))
        return shown
