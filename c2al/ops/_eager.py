"""FM attention in batched matrix products, for the CPU and as the fallback on a GPU.

Legend: B batch, p x q the matrix A of a sample, K columns of Y. T = A^T Y and G = A T.
T is saved for backward: recomputing it costs more than reading it.
"""

import torch
from torch import Tensor


def forward(a_BPQ: Tensor, y: Tensor, norm_eps: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """(G or its row-normalised form, T, 1 / standard deviation of the rows or size 0)."""
    t_BQK = torch.matmul(a_BPQ.mT, y)
    g_BPK = torch.bmm(a_BPQ, t_BQK)
    if norm_eps is None:
        return g_BPK, t_BQK, g_BPK.new_empty(0, dtype=_stats_dtype(g_BPK))
    out_BPK, _, rstd_BP1 = torch.native_layer_norm(g_BPK, g_BPK.shape[-1:], None, None, norm_eps)
    return out_BPK, t_BQK, rstd_BP1.squeeze(-1).to(_stats_dtype(g_BPK))


def norm_backward(grad_BPK: Tensor, out_BPK: Tensor, rstd_BP: Tensor) -> Tensor:
    """Gradient of the rows before LayerNorm from its output: rstd (g - mean(g) - out mean(g out))."""
    g_BPK, n_BPK = grad_BPK.to(rstd_BP.dtype), out_BPK.to(rstd_BP.dtype)
    projection_BP1 = (g_BPK * n_BPK).mean(-1, keepdim=True)
    centred_BPK = (g_BPK - g_BPK.mean(-1, keepdim=True)).addcmul_(n_BPK, projection_BP1, value=-1)
    return centred_BPK.mul_(rstd_BP.unsqueeze(-1)).to(grad_BPK.dtype)


def backward(grad_BPK: Tensor, a_BPQ: Tensor, y: Tensor, t_BQK: Tensor, da_BPQ: Tensor) -> Tensor:
    """Writes dA = dG T^T + Y S^T, S = A^T dG, into `da_BPQ` and returns dY = A S."""
    s_BQK = torch.bmm(a_BPQ.mT, grad_BPK)
    torch.bmm(grad_BPK, t_BQK.mT, out=da_BPQ)
    da_BPQ.baddbmm_(y.expand(len(a_BPQ), -1, -1), s_BQK.mT)
    if y.dim() == 3:
        return torch.bmm(a_BPQ, s_BQK)
    return torch.bmm(a_BPQ, s_BQK).sum(0, dtype=_stats_dtype(y)).to(y.dtype)


def _stats_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
