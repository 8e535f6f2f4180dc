"""Interaction modules of a DHEN layer: tokens in, tokens out.

Legend: B batch, M fields in, L fields out, D embedding dim, p rows and K columns of Y.
Every module takes x_BMD and has `out_fields`, the L of the (B, L, D) it returns.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from c2al.config import FMConfig
from c2al.errors import ConfigError
from c2al.ops.field_attention import field_attention
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

    def crossed(self, x_BF: Tensor, x0_BF: Tensor) -> Tensor:
        """x0 * (U V^T x + b) + x, (B, M D)."""
        return torch.addcmul(x_BF, x0_BF, self.u(self.v(x_BF)).to(x_BF.dtype))

    def forward(self, x_BMD: Tensor) -> Tensor:
        x_BF = x_BMD.flatten(1)
        return self.crossed(x_BF, x_BF).view_as(x_BMD)


class CrossNetwork(nn.Module):
    """Cross layers one on the other (DCN-v2, arXiv 2008.13535, Eq. 1 and 2), on vec(x), x_0 the module's input.

    x_{l+1} = x_0 * (U_l V_l^T x_l + b_l) + x_l: every layer raises the degree of the polynomial by one.
    """

    def __init__(self, fields: int, dim: int, rank: int, layers: int) -> None:
        super().__init__()
        self.out_fields = fields
        self.layers = nn.ModuleList(Cross(fields, dim, rank) for _ in range(layers))

    def forward(self, x_BMD: Tensor) -> Tensor:
        x0_BF = x_BF = x_BMD.flatten(1)
        layer: Cross
        for layer in self.layers:  # type: ignore[assignment]  # a ModuleList does not say of what
            x_BF = layer.crossed(x_BF, x0_BF)
        return x_BF.view_as(x_BMD)


def pairs(fields: int, name: str) -> tuple[Tensor, Tensor]:
    """Indices i < j of the P = M (M - 1) / 2 pairs of fields. Raises ConfigError where there are none."""
    if fields < 2:
        raise ConfigError(f"model.interactions: {name} multiplies pairs of fields, and a layer takes in {fields}")
    first_P, second_P = torch.triu_indices(fields, fields, offset=1)
    return first_P, second_P


class AttentionalFM(nn.Module):
    """Attentional factorisation machine (Xiao et al., IJCAI 2017, Eq. 4-6), projected to L tokens.

    e_ij = x_i * x_j for i < j;  a = softmax over the pairs of h^T relu(W e_ij + b);  L tokens = P sum_ij a_ij e_ij

    Cost: P = M (M - 1) / 2 pairs, so 2 B P D A FLOPs forward with A attention units, and B P (D + A) numbers kept for
    the backward pass: with 64 fields of 64 dimensions 2,016 pairs per sample, half a megabyte in float32.
    """

    first_P: Tensor
    second_P: Tensor

    def __init__(self, fields: int, dim: int, out_fields: int, units: int) -> None:
        super().__init__()
        self.out_fields = out_fields
        first_P, second_P = pairs(fields, "afm")
        self.register_buffer("first_P", first_P, persistent=False)
        self.register_buffer("second_P", second_P, persistent=False)
        self.hidden = nn.Linear(dim, units)
        self.score = nn.Linear(units, 1, bias=False)
        self.out = nn.Linear(dim, out_fields * dim)

    def forward(self, x_BMD: Tensor) -> Tensor:
        pair_BPD = x_BMD[:, self.first_P] * x_BMD[:, self.second_P]
        weight_BP1 = torch.softmax(self.score(torch.relu(self.hidden(pair_BPD))), dim=1)
        pooled_BD = (weight_BP1.mT.to(pair_BPD.dtype) @ pair_BPD)[:, 0]
        tokens_BF: Tensor = self.out(pooled_BD)
        return tokens_BF.view(x_BMD.shape[0], self.out_fields, x_BMD.shape[2])


class DotInteraction(nn.Module):
    """Dot products of all pairs of fields (DLRM, Naumov et al. 2019, arXiv 1906.00091), projected to L tokens.

    z_ij = x_i . x_j for i < j;  L tokens = W z + b. DLRM hands z to its top MLP, whose first layer is this map.

    Cost: 2 B M^2 D FLOPs forward for the products, 2 B P L D for the map, P = M (M - 1) / 2.
    """

    pair_P: Tensor

    def __init__(self, fields: int, dim: int, out_fields: int) -> None:
        super().__init__()
        self.out_fields = out_fields
        first_P, second_P = pairs(fields, "dot")
        self.register_buffer("pair_P", first_P * fields + second_P, persistent=False)
        self.out = nn.Linear(len(first_P), out_fields * dim)

    def forward(self, x_BMD: Tensor) -> Tensor:
        dot_BP = (x_BMD @ x_BMD.mT).flatten(1)[:, self.pair_P]
        tokens_BF: Tensor = self.out(dot_BP)
        return tokens_BF.view(x_BMD.shape[0], self.out_fields, x_BMD.shape[2])


class SelfAttention(nn.Module):
    """Multi-head self-attention among the fields (Vaswani et al. 2017), `heads` of D / heads dims."""

    def __init__(self, fields: int, dim: int, heads: int) -> None:
        super().__init__()
        self.out_fields = fields
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BMD: Tensor) -> Tensor:
        out_BMD: Tensor = self.out(field_attention(self.qkv(x_BMD), self.heads))
        return out_BMD
