"""DHEN: layers of interaction ensembles (Zhang et al. 2022, arXiv 2203.11014).

Legend: B batch, M fields in, L fields out, D embedding dim.
"""

import torch
from torch import Tensor, nn

from c2al.config import ModelConfig
from c2al.nn.interactions import (
    NORM_EPS,
    AttentionalFM,
    Cross,
    CrossNetwork,
    DotInteraction,
    FieldLinear,
    FMAttention,
    LinearCompression,
    SelfAttention,
)

Interaction = FMAttention | LinearCompression | Cross | CrossNetwork | SelfAttention | AttentionalFM | DotInteraction


class DHENLayer(nn.Module):
    """X' = Dropout(Norm(Ensemble_i Interaction_i(X) + Shortcut(X))); (B, M, D) -> (B, out_fields, D).

    concat: the outputs stand side by side as fields and a linear map over the field axis brings
    them to L. sum: they are added, each after such a map of its own if it has not L fields.
    stack: they stand side by side and are the L fields (Wukong, arXiv 2403.02545, Eq. 4, with
    interactions = ["linear", "fm_attention"]). Norm is per token, over D. Without norm and shortcut a layer is
    its interactions alone.
    """

    def __init__(self, config: ModelConfig, fields: int) -> None:
        super().__init__()
        dim, width = config.embedding_dim, config.fields or fields
        tokens = config.tokens or (0,) * len(config.interactions)
        made = {
            name: _interaction(name, config, fields, own or width)
            for name, own in zip(config.interactions, tokens, strict=True)
        }
        produced = sum(interaction.out_fields for interaction in made.values())
        self.ensemble = config.ensemble
        self.out_fields = produced if config.ensemble == "stack" else width
        self.interactions = nn.ModuleDict()
        for name, interaction in made.items():
            mapped = config.ensemble == "sum" and interaction.out_fields != width
            self.interactions[name] = (
                nn.Sequential(interaction, FieldLinear(interaction.out_fields, width)) if mapped else interaction
            )
        self.concat = FieldLinear(produced, width) if config.ensemble == "concat" else None
        self.shortcut = _shortcut(config.shortcut, fields, self.out_fields)
        self.norm = _norm(config.norm, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BMD: Tensor) -> Tensor:
        outputs = [interaction(x_BMD) for interaction in self.interactions.values()]
        if self.ensemble == "sum":
            ensemble_BLD = torch.stack(outputs).sum(0)
        else:
            ensemble_BLD = torch.cat(outputs, dim=1)
            if self.concat is not None:
                ensemble_BLD = self.concat(ensemble_BLD)
        if self.shortcut is not None:
            ensemble_BLD = ensemble_BLD + self.shortcut(x_BMD)
        x_BLD: Tensor = self.dropout(self.norm(ensemble_BLD))
        return x_BLD


class DHEN(nn.Module):
    """Stack of `config.layers` DHEN layers; (B, fields, D) -> (B, out_fields, D), D = config.embedding_dim."""

    def __init__(self, config: ModelConfig, fields: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(config.layers):
            layer = DHENLayer(config, fields)
            self.layers.append(layer)
            fields = layer.out_fields
        self.out_fields = fields

    def forward(self, x_BMD: Tensor) -> Tensor:
        for layer in self.layers:
            x_BMD = layer(x_BMD)
        return x_BMD


def _interaction(name: str, config: ModelConfig, fields: int, out_fields: int) -> Interaction:
    dim = config.embedding_dim
    match name:
        case "fm_attention":
            return FMAttention(fields, dim, out_fields, config.fm)
        case "linear":
            return LinearCompression(fields, out_fields)
        case "cross":
            if config.cross_layers == 1:
                return Cross(fields, dim, config.cross_rank)
            return CrossNetwork(fields, dim, config.cross_rank, config.cross_layers)
        case "attention":
            return SelfAttention(fields, dim, config.attention_heads)
        case "afm":
            return AttentionalFM(fields, dim, out_fields, config.afm_units)
        case "dot":
            return DotInteraction(fields, dim, out_fields)
    raise AssertionError(name)


def _shortcut(kind: str, fields: int, out_fields: int) -> nn.Module | None:
    if kind == "none":
        return None
    return nn.Identity() if kind == "identity" else FieldLinear(fields, out_fields)


def _norm(kind: str, dim: int) -> nn.Module:
    match kind:
        case "layer":
            return nn.LayerNorm(dim, NORM_EPS)
        case "rms":
            return nn.RMSNorm(dim, NORM_EPS)
    return nn.Identity()
