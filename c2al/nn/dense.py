"""The MLP, and the dense arch that turns dense features into tokens.

Legend: B batch, F dense features, D embedding dim.
"""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


def mlp(in_features: int, hidden: Sequence[int], out_features: int) -> nn.Sequential:
    """Linear layers with ReLU between them and none after the last."""
    widths = [in_features, *hidden, out_features]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DenseArch(nn.Module):
    """Dense features to fields beside the sparse ones: (B, F) -> (B, tokens, dim)."""

    def __init__(self, in_features: int, hidden: Sequence[int], tokens: int, dim: int) -> None:
        super().__init__()
        self.shape_TD = (tokens, dim)
        self.mlp = mlp(in_features, hidden, tokens * dim)

    def forward(self, dense_BF: Tensor) -> Tensor:
        tokens_BF: Tensor = self.mlp(dense_BF)
        return tokens_BF.view(dense_BF.shape[0], *self.shape_TD)
