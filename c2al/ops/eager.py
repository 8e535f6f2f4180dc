"""FM attention in batched matrix products: every dtype and size, on the CPU and on a GPU.

Legend: B batch, M fields, D embedding dim, p x q the matrix A of a sample (x^T or x), K columns of
Y. T = A^T Y and G = A T. T is saved for backward: recomputing it costs more than reading it.
"""

import torch
from torch import Tensor

CHUNK_BYTES = 2**22
"""Of a float32 or float64 x that one piece of a batch holds on the CPU, so that its second and third
read come from the last-level cache. AMD EPYC, 2 cores: 32 MB of float32 in 0.86-0.97 of the time in one
piece; bfloat16, with half the bytes for the same products, takes as long or longer in pieces."""


def _samples(x_BMD: Tensor) -> int:
    """Samples a piece. (A shared Y makes large products of the whole batch, which block themselves.)"""
    if x_BMD.is_cuda or not x_BMD.numel() or x_BMD.element_size() < 4:
        return max(x_BMD.shape[0], 1)
    _, m, d = x_BMD.shape
    return max(1, CHUNK_BYTES // (m * d * x_BMD.element_size()))


def products(x_BMD: Tensor, y: Tensor, paper: bool) -> tuple[Tensor, Tensor]:
    """(G, T)."""
    a_BPQ = x_BMD.mT if paper else x_BMD
    if y.dim() == 2:
        t_BQK = torch.matmul(a_BPQ.mT, y)
        return torch.bmm(a_BPQ, t_BQK), t_BQK
    t_BQK, g_BPK = (x_BMD.new_empty(len(x_BMD), n, y.shape[-1]) for n in a_BPQ.mT.shape[1:])
    samples = _samples(x_BMD)
    for a, y_piece, t, g in zip(*(torch.split(z, samples) for z in (a_BPQ, y, t_BQK, g_BPK)), strict=True):
        torch.bmm(a, torch.bmm(a.mT, y_piece, out=t), out=g)
    return g_BPK, t_BQK


def norm(g_BPK: Tensor, norm_eps: float | None) -> tuple[Tensor, Tensor]:
    """(G or its row-normalised form, 1 / standard deviation of the rows or size 0)."""
    stats = torch.promote_types(g_BPK.dtype, torch.float32)
    if norm_eps is None:
        return g_BPK, g_BPK.new_empty(0, dtype=stats)
    out_BPK, _, rstd_BP1 = torch.native_layer_norm(g_BPK, g_BPK.shape[-1:], None, None, norm_eps)
    return out_BPK, rstd_BP1.squeeze(-1).to(stats)


def norm_backward(grad_BPK: Tensor, out_BPK: Tensor, rstd_BP: Tensor) -> Tensor:
    """Gradient of the rows before LayerNorm from its output: rstd (g - mean(g) - out mean(g out))."""
    g_BPK, n_BPK = grad_BPK.to(rstd_BP.dtype), out_BPK.to(rstd_BP.dtype)
    projection_BP1 = (g_BPK * n_BPK).mean(-1, keepdim=True)
    centred_BPK = (g_BPK - g_BPK.mean(-1, keepdim=True)).addcmul_(n_BPK, projection_BP1, value=-1)
    return centred_BPK.mul_(rstd_BP.unsqueeze(-1)).to(grad_BPK.dtype)


def gradients(grad_BPK: Tensor, x_BMD: Tensor, y: Tensor, t_BQK: Tensor, paper: bool) -> tuple[Tensor, Tensor]:
    """(dX, dY) from dA = dG T^T + Y S^T, dY = A S, S = A^T dG.

    dX is computed in x's own orientation: writing dA through a transposed view is 3x slower in
    float32 and far worse in bfloat16 (benchmarks/fm_attention.py, CPU).
    """
    if y.dim() == 2:
        return _shared_gradients(grad_BPK, x_BMD, y, t_BQK, paper)
    dx_BMD, dy_BPK = x_BMD.new_empty(x_BMD.shape), y.new_empty(y.shape)
    samples = _samples(x_BMD)
    whole = (grad_BPK, x_BMD, y, t_BQK, dx_BMD, dy_BPK)
    for grad, x, y_piece, t, dx, dy in zip(*(torch.split(z, samples) for z in whole), strict=True):
        a = x.mT if paper else x
        s = torch.bmm(a.mT, grad)
        if paper:
            torch.bmm(t, grad.mT, out=dx).baddbmm_(s, y_piece.mT)
        else:
            torch.bmm(grad, t.mT, out=dx).baddbmm_(y_piece, s.mT)
        torch.bmm(a, s, out=dy)
    return dx_BMD, dy_BPK


def _shared_gradients(grad_BPK: Tensor, x_BMD: Tensor, y: Tensor, t_BQK: Tensor, paper: bool) -> tuple[Tensor, Tensor]:
    """The same for one Y of the whole batch, whose gradient is a sum over it."""
    a_BPQ = x_BMD.mT if paper else x_BMD
    s_BQK = torch.bmm(a_BPQ.mT, grad_BPK)
    if paper:
        dx_BMD = torch.bmm(t_BQK, grad_BPK.mT)
        dx_BMD.flatten(0, 1).addmm_(s_BQK.flatten(0, 1), y.mT)
        return dx_BMD, x_BMD.flatten(0, 1).mT @ s_BQK.flatten(0, 1)
    dx_BMD = torch.bmm(grad_BPK, t_BQK.mT)
    dx_BMD.baddbmm_(y.expand(x_BMD.shape[0], -1, -1), s_BQK.mT)
    dy_BPK = torch.bmm(a_BPQ, s_BQK)
    return dx_BMD, dy_BPK.sum(0, dtype=torch.promote_types(y.dtype, torch.float32)).to(y.dtype)
