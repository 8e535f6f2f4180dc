"""IMTL-G: Liu et al., Towards Impartial Multi-task Learning, ICLR 2021."""

from collections.abc import Sequence

from torch import Tensor

from c2al.nn.methods import Method, torchjd


class IMTLG(Method):
    """The combination of the gradients at h whose projections on all of them are equal; weights add up to T.

    w is proportional to G^+ d, d_t = |g_t|, which also covers linearly dependent gradients (arXiv 2406.16232).
    A weight can be negative.
    """

    torchjd = True

    def weights(self, gramian_TT: Tensor, tasks: Sequence[int]) -> Tensor:
        weight_T: Tensor = torchjd().IMTLGWeighting()(gramian_TT)
        return len(tasks) * weight_T


METHOD = IMTLG
