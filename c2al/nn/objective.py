"""The training objective (C2AL, Eq. 4).

Legend: B batch, C auxiliary cohorts, T = 1 + C tasks: the primary prediction head, then the auxiliary ones.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from c2al.errors import OperandError

Schedule = Literal["constant", "warmup", "decay", "early"]
Target = Literal["label", "membership"]


class Loss(NamedTuple):
    """What one step optimises, and its parts."""

    total: Tensor
    """Scalar float32 to call backward on."""
    task_T: Tensor
    """Unscaled loss of every task, detached."""


def targets(label_B: Tensor, member_BC: Tensor, target: Target = "label") -> Tensor:
    """(B, T) what every task learns: y, then per cohort y 1[x in cohort], or 1[x in cohort] itself.

    A row outside a cohort is a negative of that cohort's task. Membership says what the label does not: on
    rows without a click it still tells the encoder who belongs to the cohort.
    """
    auxiliary_BC = member_BC if target == "membership" else label_B[:, None] * member_BC
    return torch.cat([label_B[:, None], auxiliary_BC], dim=1)


def objective(
    logit_BT: Tensor,
    target_BT: Tensor,
    weight_B: Tensor,
    *,
    lambda_C: Sequence[float],
    rows: float,
    factor_B: Tensor | None = None,
    log_variance_T: Tensor | None = None,
) -> Loss:
    """L = BCE(primary, y) + sum over cohorts c of lambda_c BCE(auxiliary c, y 1[x in c]).

    Every task sees every row. Each BCE is sum(weight * bce) / rows, not the mean of the batch. With
    `rows` = real rows of the global batch / world size, the average of the ranks' gradients is exact for
    padded and uneven batches. Never waits for the device.

    Args:
        logit_BT: the primary task first.
        target_BT: 0 or 1, float32; see `targets`.
        weight_B: sample weight, float32; 0 on padding rows.
        lambda_C: one per auxiliary cohort.
        rows: divisor of the sums.
        factor_B: what each row's primary loss is multiplied with in `total`; task_T stays as it is.
        log_variance_T: instead of lambda_C, total = sum over t of exp(-s_t) BCE_t + s_t / 2, s learned (Kendall
            et al., CVPR 2018, arXiv 1705.07115, for classification).

    Raises:
        OperandError: the batch sizes, the tasks or the number of lambdas differ.
    """
    batch, tasks = logit_BT.shape
    if target_BT.shape != (batch, tasks) or weight_B.shape != (batch,) or len(lambda_C) != tasks - 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in (logit_BT, target_BT, weight_B))
        raise OperandError(f"objective: needs (B, T), (B, T), (B,) and T - 1 lambdas, got {shapes} and {len(lambda_C)}")
    bce_BT = F.binary_cross_entropy_with_logits(logit_BT.float(), target_BT, weight_B[:, None], reduction="none")
    task_T = bce_BT.sum(0) / rows
    # Scalars of the host enter kernels as arguments. A tensor made of them here would be copied to the
    # device at every step, and the copy would wait for the device.
    total = task_T[0] if factor_B is None else (factor_B * bce_BT[:, 0]).sum() / rows
    if log_variance_T is not None:
        loss_T = torch.cat([total[None], task_T[1:]])
        total = (torch.exp(-log_variance_T) * loss_T + log_variance_T / 2).sum()
        return Loss(total=total, task_T=task_T.detach())
    for i, weight in enumerate(lambda_C, 1):
        total = total + weight * task_T[i]
    return Loss(total=total, task_T=task_T.detach())


def lambda_scale(schedule: Schedule, share: float, step: int, total_steps: int) -> float:
    """Factor on every lambda at `step` (from 0) of `total_steps`.

    warmup: linear from 0 to 1 over the first `share` of the steps; early: 1 over them and 0 afterwards;
    decay: linear from 1 to 0 over the last `share`; constant: 1.
    """
    length = share * total_steps
    if schedule == "warmup":
        return min(1.0, step / length)
    if schedule == "decay":
        return min(1.0, (total_steps - 1 - step) / max(length, 1.0))
    if schedule == "early":
        return float(step < length)
    return 1.0
