"""Interaction modules of a DHEN layer: tokens in, tokens out.

Legend: B batch, M fields in, L fields out, D embedding dim, p rows and K columns of Y.
Every module takes x_BMD and has `out_fields`, the L of the (B, L, D) it returns.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from c2al.config import FMConfig
from c2al.ops.fm_attention import fm_attention

NORM_EPS = 1e-5


class FieldLinear(nn.Module):
    """Linear map over the field axis, the same for every embedding dimension: x[b, :, d] -> W x[b, :, d] + bias."""

    def __init__(self, fields: int, out_fields: int) -> None:
        super().__init__()
        self.out_fields = out_fields
        self.linear = nn.Linear(fields, out_fields)

    def forward(self, x_BMD: Tensor) -> Tensor:
        out_BDL: Tensor = self.linear(x_BMD.mT)
        return out_BDL.mT


class LinearCompression(FieldLinear):
    """Linear compression of the fields (Wukong, arXiv 2403.02545, Eq. 5; DHEN's linear module)."""


class YSource(nn.Module):
    """Produces the Y of an FM attention; diagnostics hook every instance to see it."""


class StaticY(YSource):
    """Y as a learned parameter (p, K), shared by all samples."""

    def __init__(self, p: int, k: int) -> None:
        super().__init__()
        self.y_PK = nn.Parameter(torch.randn(p, k) / p**0.5)

    def forward(self, x_BMD: Tensor) -> Tensor:
        return self.y_PK * 1.0  # a new tensor, so that a hook never holds the parameter itself


class MLPY(YSource):
    """Y of each sample from an attention MLP: Y = reshape(W2 relu(W1 vec(x))), (B, p, K)."""

    def __init__(self, fields: int, dim: int, hidden: int, p: int, k: int) -> None:
        super().__init__()
        self.shape_PK = (p, k)
        self.mlp = nn.Sequential(nn.Linear(fields * dim, hidden), nn.ReLU(), nn.Linear(hidden, p * k))

    def forward(self, x_BMD: Tensor) -> Tensor:
        y_BF: Tensor = self.mlp(x_BMD.flatten(1))
        return y_BF.view(x_BMD.shape[0], *self.shape_PK)


class _Penalty(torch.autograd.Function):
    """Y as it is; backward adds the gradient of (l1 sum |Y| + l2 sum Y^2) / samples, which needs no way to the loss."""

    @staticmethod
    def forward(ctx, y: Tensor, l1: float, l2: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(y)
        ctx.l1, ctx.l2 = l1, l2
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (y,) = ctx.saved_tensors
        samples = y.shape[0] if y.dim() == 3 else 1
        return gradient + (ctx.l1 * y.sign() + 2 * ctx.l2 * y) / max(samples, 1), None, None


class FMAttention(nn.Module):
    """FM attention (C2AL, Eq. 3): G = X X^T Y, LayerNorm of its rows, then an MLP to L tokens.

    LayerNorm is fused into the op and has no scale and shift: the MLP's first layer holds them.
    """

    def __init__(self, fields: int, dim: int, out_fields: int, config: FMConfig) -> None:
        super().__init__()
        self.out_fields = out_fields
        self.layout = config.layout
        self.y_l1, self.y_l2 = config.y_l1, config.y_l2
        p = dim if config.layout == "paper" else fields
        self.y: YSource = MLPY(fields, dim, config.hidden, p, config.k) if config.y == "mlp" else StaticY(p, config.k)
        self.mlp = nn.Sequential(
            nn.Linear(p * config.k, config.hidden), nn.ReLU(), nn.Linear(config.hidden, out_fields * dim)
        )

    def forward(self, x_BMD: Tensor) -> Tensor:
        y = self.y(x_BMD)
        if self.training and (self.y_l1 or self.y_l2):
            y = _Penalty.apply(y, self.y_l1, self.y_l2)  # type: ignore[no-untyped-call]
        g_BPK = fm_attention(x_BMD, y, layout=self.layout, norm_eps=NORM_EPS)
        tokens_BF: Tensor = self.mlp(g_BPK.flatten(1))
        return tokens_BF.view(x_BMD.shape[0], self.out_fields, x_BMD.shape[2])


class Cross(nn.Module):
    """Low-rank cross over all fields (DCN-v2, arXiv 2008.13535, Eq. 2): x * (U V^T x + b) + x on vec(x)."""

    def __init__(self, fields: int, dim: int, rank: int) -> None:
        super().__init__()
        self.out_fields = fields
        self.v = nn.Linear(fields * dim, rank, bias=False)
        self.u = nn.Linear(rank, fields * dim)

    def forward(self, x_BMD: Tensor) -> Tensor:
        x_BF = x_BMD.flatten(1)
        out_BF: Tensor = torch.addcmul(x_BF, x_BF, self.u(self.v(x_BF)).to(x_BF.dtype))
        return out_BF.view_as(x_BMD)


def attend(q_BHMd: Tensor, k_BHMd: Tensor, v_BHMd: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of every sample and head, (B, H, M, d).

    A GPU has fused kernels for it. On the CPU torch's fused kernel is made for long sequences: for (1024, 4,
    28, 16), forward and backward with the maps around it, it takes 331 ms in bfloat16 and the plain
    products 71, in float32 71 and 63 (one thread, Xeon with AMX, docs/LOG.md).
    """
    if q_BHMd.device.type != "cpu":
        return F.scaled_dot_product_attention(q_BHMd, k_BHMd, v_BHMd)
    weights_BHMM = torch.softmax((q_BHMd * q_BHMd.shape[-1] ** -0.5) @ k_BHMd.mT, dim=-1)
    return weights_BHMM @ v_BHMd


class SelfAttention(nn.Module):
    """Multi-head self-attention among the fields (Vaswani et al. 2017), `heads` of D / heads dims."""

    def __init__(self, fields: int, dim: int, heads: int) -> None:
        super().__init__()
        self.out_fields = fields
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BMD: Tensor) -> Tensor:
        qkv_BHMd = [t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x_BMD).chunk(3, dim=-1)]
        out_BMD: Tensor = self.out(attend(*qkv_BHMd).transpose(1, 2).flatten(2))
        return out_BMD
