"""PCGrad: Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, arXiv 2001.06782."""

from collections.abc import Sequence

from torch import Tensor

from c2al.nn.methods import Method, torchjd


class PCGrad(Method):
    """Each task's gradient at h loses its component against every other task's, in random order (Algorithm 1).

    g_i <- g_i - (g_i . g_j) / |g_j|^2 g_j wherever g_i . g_j < 0; the results are added. Without a conflict
    it is the plain sum.
    """

    torchjd = True

    def weights(self, gramian_TT: Tensor, tasks: Sequence[int]) -> Tensor:
        weight_T: Tensor = torchjd().PCGradWeighting()(gramian_TT)
        return weight_T


METHOD = PCGrad
