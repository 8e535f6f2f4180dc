"""Prediction heads over the shared encoder (C2AL, Section 4).

Legend: B batch, F encoder features, C auxiliary cohorts, T = 1 + C tasks: the primary one first.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from c2al.nn.combine import Combine
from c2al.nn.dense import mlp


class Heads(nn.Module):
    """Logits (B, T) of T encoder features (B, F), one per task: the primary prediction head, then one per cohort.

    The auxiliary prediction heads are created last, so that a seed gives the primary one, and everything
    created before, the same initial weights with and without them. With no `auxiliary_hidden` they are
    linear: what their losses teach must then be taught to the encoder, which serving keeps.

    `combine` stands in training between an encoder whose features all tasks share and the prediction heads.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        cohorts: int = 0,
        auxiliary_hidden: Sequence[int] = (),
        combine: Combine | None = None,
    ) -> None:
        super().__init__()
        self.primary = mlp(in_features, hidden, 1)
        self.auxiliary = nn.ModuleList(mlp(in_features, auxiliary_hidden, 1) for _ in range(cohorts))
        self.combine = combine

    def forward(self, h_TBF: Sequence[Tensor]) -> Tensor:
        heads = (self.primary, *self.auxiliary)
        if self.combine is not None:
            h_TBF = self.combine(h_TBF[0])
        return torch.cat([head(h_BF) for head, h_BF in zip(heads, h_TBF, strict=True)], dim=1)

    @torch.no_grad()
    def prime(self, rate_T: Sequence[float]) -> None:
        """Sets the last bias of each prediction head to log(rate / (1 - rate)), the rate of positives of its task.

        A head that starts at a rate of one half first learns the rate, through every embedding row of
        every impression. Draws no random numbers. Rates lie in (0, 1).
        """
        for head, rate in zip((self.primary, *self.auxiliary), rate_T, strict=True):
            head[-1].bias.fill_(math.log(rate / (1 - rate)))
