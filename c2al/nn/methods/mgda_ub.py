"""MGDA-UB: Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018, arXiv 1810.04650."""

from collections.abc import Sequence

from torch import Tensor

from c2al.nn.methods import Method, torchjd


class MGDA(Method):
    """T times the shortest convex combination of the tasks' gradients at h (the upper bound of Sec. 3.3).

    Frank-Wolfe (Algorithm 2). For two tasks the weight of the first is
    clip(g_2 . (g_2 - g_1) / |g_1 - g_2|^2, 0, 1).
    """

    torchjd = True

    def weights(self, gramian_TT: Tensor, tasks: Sequence[int]) -> Tensor:
        weight_T: Tensor = torchjd().MGDAWeighting()(gramian_TT)
        return len(tasks) * weight_T


METHOD = MGDA
