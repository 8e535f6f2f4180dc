"""The training objective (C2AL, Eq. 4).

Legend: B batch, T tasks: the primary prediction head, then the auxiliary ones of head and tail cohort.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from c2al.errors import OperandError


class Loss(NamedTuple):
    """What one step optimises, and its parts."""

    total: Tensor
    """Scalar float32 to call backward on."""
    task_T: Tensor
    """Unscaled loss of every task, detached."""


def objective(
    logit_BT: Tensor,
    label_B: Tensor,
    weight_B: Tensor,
    member_B2: Tensor,
    *,
    lambda_head: float,
    lambda_tail: float,
    rows: float,
) -> Loss:
    """L = BCE(primary, y) + lambda_head BCE(head, y 1[x in head]) + lambda_tail BCE(tail, y 1[x in tail]).

    Every task sees every row. A row outside a cohort is a negative of that cohort's task. Each BCE is
    sum(weight * bce) / rows, not the mean of the batch. With `rows` = real rows of the global batch /
    world size, the average of the ranks' gradients is exact for padded and uneven batches.
    Never waits for the device.

    Args:
        logit_BT: T = 3 (primary, head, tail), or 1 (primary only: the lambdas do not enter).
        label_B: 0 or 1, float32.
        weight_B: sample weight, float32; 0 on padding rows.
        member_B2: 1 where the row is in the (head, tail) cohort, else 0, float32.
        rows: divisor of the sums.

    Raises:
        OperandError: T is neither 1 nor 3, or the batch sizes differ.
    """
    batch, tasks = logit_BT.shape
    if tasks not in (1, 3) or label_B.shape != (batch,) or weight_B.shape != (batch,) or member_B2.shape != (batch, 2):
        shapes = [tuple(t.shape) for t in (logit_BT, label_B, weight_B, member_B2)]
        raise OperandError(f"objective: needs (B, 1 or 3), (B,), (B,), (B, 2), got {', '.join(map(str, shapes))}")
    member_BT = F.pad(member_B2, (1, 0), value=1.0)[:, :tasks]
    bce_BT = F.binary_cross_entropy_with_logits(
        logit_BT.float(), label_B[:, None] * member_BT, weight_B[:, None], reduction="none"
    )
    task_T = bce_BT.sum(0) / rows
    # Scalars of the host enter kernels as arguments. A tensor made of them here would be copied to the
    # device at every step, and the copy would wait for the device.
    total = task_T[0]
    if tasks == 3:
        total = total + lambda_head * task_T[1] + lambda_tail * task_T[2]
    return Loss(total=total, task_T=task_T.detach())
