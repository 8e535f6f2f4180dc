"""DHEN: layers of interaction ensembles (Zhang et al. 2022, arXiv 2203.11014).

Legend: B batch, M fields in, L fields out, D embedding dim.
"""

import torch
from torch import Tensor, nn

from c2al.config import ModelConfig
from c2al.nn.interactions import NORM_EPS, Cross, FieldLinear, FMAttention, LinearCompression, SelfAttention

Interaction = FMAttention | LinearCompression | Cross | SelfAttention


class DHENLayer(nn.Module):
    """X' = Dropout(Norm(Ensemble_i Interaction_i(X) + Shortcut(X))); (B, M, D) -> (B, out_fields, D).

    concat: the outputs stand side by side as fields and a linear map over the field axis brings
    them to L. sum: they are added, each after such a map of its own if it has not L fields.
    Norm is per token, over D.
    """

    def __init__(self, config: ModelConfig, fields: int) -> None:
        super().__init__()
        dim, self.out_fields = config.embedding_dim, config.fields or fields
        concat, produced = config.ensemble == "concat", 0
        self.interactions = nn.ModuleDict()
        for name in config.interactions:
            interaction = _interaction(name, config, fields)
            produced += interaction.out_fields
            module: nn.Module = interaction
            if not concat and interaction.out_fields != self.out_fields:
                module = nn.Sequential(interaction, FieldLinear(interaction.out_fields, self.out_fields))
            self.interactions[name] = module
        self.concat = FieldLinear(produced, self.out_fields) if concat else None
        self.shortcut = nn.Identity() if config.shortcut == "identity" else FieldLinear(fields, self.out_fields)
        self.norm = nn.LayerNorm(dim, NORM_EPS) if config.norm == "layer" else nn.RMSNorm(dim, NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BMD: Tensor) -> Tensor:
        outputs = [interaction(x_BMD) for interaction in self.interactions.values()]
        ensemble_BLD = torch.stack(outputs).sum(0) if self.concat is None else self.concat(torch.cat(outputs, dim=1))
        x_BLD: Tensor = self.dropout(self.norm(ensemble_BLD + self.shortcut(x_BMD)))
        return x_BLD


class DHEN(nn.Module):
    """Stack of `config.layers` DHEN layers; (B, fields, D) -> (B, out_fields, D), D = config.embedding_dim."""

    def __init__(self, config: ModelConfig, fields: int) -> None:
        super().__init__()
        self.out_fields = config.fields or fields
        widths = [fields] + [self.out_fields] * (config.layers - 1)
        self.layers = nn.ModuleList(DHENLayer(config, width) for width in widths)

    def forward(self, x_BMD: Tensor) -> Tensor:
        for layer in self.layers:
            x_BMD = layer(x_BMD)
        return x_BMD


def _interaction(name: str, config: ModelConfig, fields: int) -> Interaction:
    dim, out_fields = config.embedding_dim, config.fields or fields
    match name:
        case "fm_attention":
            return FMAttention(fields, dim, out_fields, config.fm)
        case "linear":
            return LinearCompression(fields, out_fields)
        case "cross":
            return Cross(fields, dim, config.cross_rank)
        case "attention":
            return SelfAttention(fields, dim, config.attention_heads)
    raise AssertionError(name)
