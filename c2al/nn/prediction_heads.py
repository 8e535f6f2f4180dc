"""Prediction heads over the shared encoder (C2AL, Section 4).

Legend: B batch, F encoder features, T tasks: primary, head cohort, tail cohort.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from c2al.nn.dense import mlp


class Heads(nn.Module):
    """Logits (B, T) of encoder features (B, F): T = 3 with the auxiliary heads, 1 without.

    The auxiliary heads are created last, so that a seed gives the primary head, and everything
    created before, the same initial weights with and without them. With no `auxiliary_hidden` they are
    linear: what their losses teach must then be taught to the encoder, which serving keeps.
    """

    def __init__(
        self, in_features: int, hidden: Sequence[int], auxiliary: bool, auxiliary_hidden: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.primary = mlp(in_features, hidden, 1)
        self.head = mlp(in_features, auxiliary_hidden, 1) if auxiliary else None
        self.tail = mlp(in_features, auxiliary_hidden, 1) if auxiliary else None

    def forward(self, h_BF: Tensor) -> Tensor:
        heads = (self.primary, self.head, self.tail)
        return torch.cat([head(h_BF) for head in heads if head is not None], dim=1)
