"""GradVac: Wang et al., Gradient Vaccine, ICLR 2021, arXiv 2010.05874."""

from collections.abc import Sequence

import torch
from torch import Tensor

from c2al.nn.methods import Method

BETA = 0.01
"""Share of the newest cosine in the moving average; the paper's value."""


class GradVac(Method):
    """Turns a task's gradient at h towards another's where their cosine is below its moving average.

    For phi_ij = cos(g_i', g_j) below the average a_ij (the others j in random order):
        g_i' += |g_i'| (a sqrt(1 - phi^2) - phi sqrt(1 - a^2)) / (|g_j| sqrt(1 - a^2)) g_j
    and a_ij <- (1 - BETA) a_ij + BETA phi_ij, from 0 on. With averages of 0 it is PCGrad. The averages are
    buffers, for which TorchJD's class, otherwise the same, has no public place.
    """

    average_TT: Tensor

    def __init__(self, tasks: int) -> None:
        super().__init__(tasks)
        self.register_buffer("average_TT", torch.zeros(tasks, tasks, dtype=torch.float64))

    def weights(self, gramian_TT: Tensor, tasks: Sequence[int]) -> Tensor:
        average_TT = self.average_TT.cpu().clone()
        length_T = gramian_TT.diagonal().sqrt()
        # Row i: g_i' as a combination of the gradients.
        share_TT = torch.eye(len(tasks), dtype=gramian_TT.dtype)
        for i in range(len(tasks)):
            for j in torch.randperm(len(tasks)).tolist():
                if i == j:
                    continue
                share_T = share_TT[i]
                length = (share_T @ gramian_TT @ share_T).clamp_min(0).sqrt()
                cosine = ((share_T @ gramian_TT[j]) / (length * length_T[j])).nan_to_num().clamp(-1, 1)
                target = average_TT[tasks[i], tasks[j]].clone()
                if cosine < target:
                    sine, sine_target = (1 - cosine**2).sqrt(), (1 - target**2).sqrt().clamp_min(1e-12)
                    share_TT[i, j] += length * (target * sine - cosine * sine_target) / (length_T[j] * sine_target)
                average_TT[tasks[i], tasks[j]] = (1 - BETA) * target + BETA * cosine
        self.average_TT.copy_(average_TT)
        return share_TT.sum(dim=0)


METHOD = GradVac
