"""Aligned-MTL: Senushkin et al., Independent Component Alignment, CVPR 2023, arXiv 2305.19000."""

from collections.abc import Sequence

import torch
from torch import Tensor

from c2al.nn.methods import Method, torchjd


class AlignedMTL(Method):
    """Sum of the gradients at h after their principal components were all given the smallest one's scale.

    w = sigma_min V Sigma^-1 V^T 1, G = V Sigma^2 V^T (Algorithm 1). Orthogonal gradients of one length keep
    weights of 1: the plain sum.
    """

    torchjd = True

    def weights(self, gramian_TT: Tensor, tasks: Sequence[int]) -> Tensor:
        weight_T: Tensor = torchjd().AlignedMTLWeighting(torch.ones(len(tasks), dtype=gramian_TT.dtype))(gramian_TT)
        return weight_T


METHOD = AlignedMTL
