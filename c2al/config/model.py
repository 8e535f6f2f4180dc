"""The sections of the network."""

import dataclasses
from typing import Literal

from c2al.config.bounds import LARGEST_FACTOR
from c2al.typed import Problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class FMConfig:
    """FM attention G = X X^T Y (C2AL Eq. 3)."""

    layout: Literal["paper", "wukong"] = "paper"
    """paper: Y (d x k) mixes embedding dimensions. wukong: Y (n x k) mixes fields."""
    y: Literal["mlp", "static"] = "mlp"
    """mlp: Y per sample from an attention MLP. static: Y is a learned parameter."""
    k: int = 8
    """Columns of Y."""
    hidden: int = 64
    """Hidden units of the MLP that turns G into fields and, with y = 'mlp', of the attention MLP."""
    y_l1: float = 0.0
    """Adds y_l1 * mean over samples of the sum of |Y|, per layer, to what training minimises; not logged."""
    y_l2: float = 0.0
    """As y_l1, of the sum of Y^2."""

    def problems(self) -> Problems:
        for field in ("k", "hidden"):
            if getattr(self, field) < 1:
                yield field, f"must be at least 1, is {getattr(self, field)}"
        for field in ("y_l1", "y_l2"):
            if not 0 <= getattr(self, field) <= LARGEST_FACTOR:
                yield field, f"must lie in [0, {LARGEST_FACTOR:g}], is {getattr(self, field)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Experts over the DHEN's output, of model.encoder = "mmoe" and "ple"."""

    shared: int = 4
    """Experts that all tasks share."""
    own: int = 1
    """Experts of every task's own; ple only."""
    units: tuple[int, ...] = (64,)
    """Units of every layer of an expert, with ReLU after each; the last is what prediction heads read."""
    levels: int = 1
    """Levels of extraction; ple only. With more than 1 the primary task depends on auxiliary tasks' experts of the
    lower levels: these are served, and the model does not start equal with and without auxiliary tasks."""

    def problems(self) -> Problems:
        for field in ("shared", "own", "levels"):
            if getattr(self, field) < 1:
                yield field, f"must be at least 1, is {getattr(self, field)}"
        if not self.units or any(u < 1 for u in self.units):
            yield "units", f"must not be empty and each at least 1, is {list(self.units)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """EmbeddingBagCollection -> dense arch -> DHEN -> encoder of every task -> prediction heads."""

    preset: Literal["", "wukong", "dcnv2", "dlrm", "attention-only"] = ""
    """A known stack: sets layers, interactions, tokens, ensemble, fields, shortcut, norm, cross_layers and fm as
    c2al/config/presets.py lists them. Any of them set beside it wins; set by an override, it wins over the file."""
    embedding_dim: int = 16
    """d, of every embedding table; a multiple of 4 (fbgemm)."""
    dense_hidden: tuple[int, ...] = (64,)
    """Hidden units of the dense arch, which maps the dense features to `dense_tokens` fields."""
    dense_tokens: int = 1
    """Fields the dense arch contributes beside the sparse features."""
    layers: int = 2
    """DHEN layers."""
    interactions: tuple[Literal["fm_attention", "linear", "cross", "attention", "afm", "dot"], ...] = (
        "fm_attention",
        "linear",
        "cross",
    )
    """Interaction modules of every layer. fm_attention: Eq. 3. linear: a map of the fields. cross: DCN-v2. attention:
    self-attention. afm: attentional FM. dot: the dot products of DLRM."""
    ensemble: Literal["concat", "sum", "stack"] = "concat"
    """How the interactions' outputs become a layer's. concat: side by side, then a linear map over the fields.
    sum: added, each after such a map if its number of fields differs. stack: side by side, no map (Wukong)."""
    fields: int = 0
    """Fields every DHEN layer puts out; 0: as many as it takes in, and with ensemble = "stack" as many as its
    interactions put out."""
    tokens: tuple[int, ...] = ()
    """Fields of every interaction's own output, in the order of `interactions`; empty or 0: fields of the layer.
    cross and attention put out as many fields as they take in; the others have any width."""
    shortcut: Literal["identity", "linear", "none"] = "identity"
    """Path around a layer: its input as it is (needs fields = 0 and an ensemble that keeps the number of fields),
    a linear map of it, or none."""
    norm: Literal["layer", "rms", "none"] = "layer"
    """Normalisation of a layer's output: LayerNorm or RMSNorm, over the embedding dimension, or none."""
    cross_rank: int = 16
    """Rank of the DCN-v2 cross weights."""
    cross_layers: int = 1
    """Cross layers within one module 'cross', all multiplied by the module's input."""
    afm_units: int = 16
    """Attention units of the interaction module 'afm'."""
    attention_heads: int = 2
    """Attention heads of the interaction module 'attention'; divides embedding_dim."""
    encoder: Literal["shared-bottom", "mmoe", "ple"] = "shared-bottom"
    """What each prediction head reads. shared-bottom: the DHEN's output. mmoe, ple: its task's mixture of experts
    over that output, see `experts`."""
    wide: bool = False
    """Adds a linear function of the dense features and the pooled embeddings to the primary logit (Wide & Deep)."""
    head_hidden: tuple[int, ...] = (64,)
    """Hidden units of the primary prediction head; none: linear in the encoder's features."""
    auxiliary_hidden: tuple[int, ...] = ()
    """Hidden units of each auxiliary prediction head; none: linear in the encoder's features."""
    dropout: float = 0.0
    """Probability that a value is set to 0 in training, after every DHEN layer."""
    fm: FMConfig = FMConfig()
    """The interaction module 'fm_attention'."""
    experts: ExpertsConfig = ExpertsConfig()
    """The encoders 'mmoe' and 'ple'."""

    def problems(self) -> Problems:
        if self.embedding_dim < 4 or self.embedding_dim % 4:
            yield "embedding_dim", f"must be a positive multiple of 4, is {self.embedding_dim}"
        for field in ("layers", "dense_tokens", "cross_rank", "cross_layers", "afm_units", "attention_heads"):
            if getattr(self, field) < 1:
                yield field, f"must be at least 1, is {getattr(self, field)}"
        for field in ("dense_hidden", "head_hidden", "auxiliary_hidden"):
            if any(h < 1 for h in getattr(self, field)):
                yield field, f"units must be at least 1, is {list(getattr(self, field))}"
        if self.fields < 0:
            yield "fields", f"must not be negative, is {self.fields}"
        if not self.interactions or len(set(self.interactions)) != len(self.interactions):
            yield "interactions", f"must name each module at most once and at least one, is {list(self.interactions)}"
        for field in ("y_l1", "y_l2"):
            if getattr(self.fm, field) and "fm_attention" not in self.interactions:
                yield (
                    f"fm.{field}",
                    f"is {getattr(self.fm, field)} without effect: only the interaction 'fm_attention' has a Y, and "
                    f"interactions is {list(self.interactions)}",
                )
        yield from self._width_problems()
        if self.attention_heads >= 1 and self.embedding_dim % self.attention_heads:
            yield "attention_heads", f"must divide embedding_dim = {self.embedding_dim}, is {self.attention_heads}"
        if self.fields and self.shortcut == "identity":
            yield "shortcut", "identity needs fields = 0 (a layer that keeps its number of fields)"
        if self.encoder == "mmoe" and self.experts.levels > 1:
            yield "experts.levels", f"more than 1 goes with encoder = 'ple' only, is {self.experts.levels}"
        if not 0 <= self.dropout < 1:
            yield "dropout", f"must lie in [0, 1), is {self.dropout}"

    def _width_problems(self) -> Problems:
        if self.tokens and len(self.tokens) != len(self.interactions):
            yield "tokens", f"names one width per interaction ({len(self.interactions)}), has {list(self.tokens)}"
        for name, tokens in zip(self.interactions, self.tokens, strict=False):
            if tokens < 0:
                yield "tokens", f"must not be negative, is {tokens} for {name}"
            if tokens and name in ("cross", "attention"):
                yield "tokens", f"{name} puts out as many fields as it takes in and takes 0 here, is {tokens}"
        if self.ensemble == "stack" and self.fields:
            yield "fields", f"does not go with ensemble = 'stack', whose width follows from tokens; is {self.fields}"
        if self.ensemble == "stack" and self.shortcut == "identity":
            yield "shortcut", "'identity' does not go with ensemble = 'stack', which changes the number of fields"
