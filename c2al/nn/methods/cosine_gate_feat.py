"""Cosine gate: Du et al., Adapting Auxiliary Losses Using Gradient Similarity, 2018 (v3: 2020), arXiv 1812.02224."""

from collections.abc import Sequence

from torch import Tensor

from c2al.nn.methods import Method


class CosineGate(Method):
    """An auxiliary gradient at h counts where it does not oppose the primary one (the paper's unweighted version).

    w_0 = 1; w_c = 1[g_c . g_0 >= 0]. Without a conflict with the primary task it is the plain sum.
    """

    def weights(self, gramian_TT: Tensor, tasks: Sequence[int]) -> Tensor:
        if tasks[0] != 0:
            return gramian_TT.new_ones(len(tasks))
        return (gramian_TT[0] >= 0).to(gramian_TT.dtype)


METHOD = CosineGate
