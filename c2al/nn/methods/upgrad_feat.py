"""UPGrad: Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024, arXiv 2406.16232."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from c2al.nn.methods import Method, torchjd


class UPGrad(Method):
    """Sum of the gradients at h, each projected onto the cone of directions that no task opposes (Eq. 3).

    Without a conflict it is the plain sum. The projection is solved here, exactly: TorchJD's own needs two more
    packages and adds 1e-4 to the Gramian's diagonal.
    """

    torchjd = True

    def weights(self, gramian_TT: Tensor, tasks: Sequence[int]) -> Tensor:
        ones_T = torch.ones(len(tasks), dtype=gramian_TT.dtype)
        weight_T: Tensor = torchjd().UPGradWeighting(ones_T, projector=_Projector())(gramian_TT)
        return weight_T


class _Projector:
    """TorchJD's DualConeProjector: for each u of (..., T) the v >= u of least v^T G v."""

    def __call__(self, u: Tensor, gramian_TT: Any) -> Tensor:
        return torch.stack([u_T + least_squares(gramian_TT, -(gramian_TT @ u_T)) for u_T in u])


def least_squares(gramian_TT: Tensor, target_T: Tensor) -> Tensor:
    """s >= 0 of least s^T G s / 2 - target . s (non-negative least squares; Lawson and Hanson 1974, Algorithm 23.10).

    target must lie in the range of G, positive semidefinite.
    """
    s_T = torch.zeros_like(target_T)
    active: list[int] = []
    tolerance = 1e-12 * float(gramian_TT.diagonal().max())
    # Each round takes one task into the active set; a rounding error could otherwise take it in and out for ever.
    for _ in range(10 * len(s_T)):
        slope_T = target_T - gramian_TT @ s_T
        slope_T[active] = 0.0
        best = int(slope_T.argmax())
        if slope_T[best] <= tolerance:
            break
        active.append(best)
        while active:
            trial = torch.linalg.pinv(gramian_TT[active][:, active], hermitian=True) @ target_T[active]
            if bool((trial > 0).all()):
                s_T = torch.zeros_like(target_T)
                s_T[active] = trial
                break
            now = s_T[active]
            ratio = torch.where(trial <= 0, now / (now - trial).clamp_min(1e-300), torch.inf)
            s_T[active] = now + ratio.min() * (trial - now)
            out = active[int(ratio.argmin())]
            s_T[out] = 0.0
            active.remove(out)
    return s_T


METHOD = UPGrad
