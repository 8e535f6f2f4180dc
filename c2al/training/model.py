"""Impressions -> logits: EmbeddingBagCollection -> dense arch -> DHEN -> encoder -> prediction heads.

Letters: B batch, F dense features, N fields (dense tokens, then sparse features in config order),
D embedding dim, C auxiliary cohorts, T = 1 + C tasks, the primary one first.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from c2al.config import Config, SparseFeature
from c2al.data.batch import Batch
from c2al.nn.combine import Combine
from c2al.nn.dense import DenseArch
from c2al.nn.dhen import DHEN
from c2al.nn.encoders import encoder_of
from c2al.nn.prediction_heads import Heads
from c2al.training.objective import Objective

AUXILIARY_PREFIX = ("over.heads.auxiliary.", "over.encoder.auxiliary.", "over.heads.combine.")
"""Of what exists in C2ALModel in training only: the name of a parameter or buffer begins with one of these."""


class OverArch(nn.Module):
    """Everything above the embedding tables.

    Takes dense_BF, the summed embeddings and the lengths of the bags without weights, returns logit_BT in
    float32. With `serving` T = 1, and there is only what the primary task needs; its parameters are those of
    training without AUXILIARY_PREFIX.

    It makes the means of mean-pooled features itself. torchrec's own mean of a table that is split by rows
    divides by (length + 1e-6), and every other feature by (1 + 1e-6), so that predictions would depend on the
    sharding plan, and a program without torchrec could not give them.

    model.wide adds w . [dense; vec(pooled)] to the primary logit (Wide & Deep, Cheng et al. 2016). A feature's
    weight times an id's embedding is one number per id, so the wide part needs no tables of its own. The
    auxiliary tasks have no wide part: what their losses teach, they teach the encoder.
    """

    def __init__(self, config: Config, cohorts: int, serving: bool = False) -> None:
        super().__init__()
        model, data = config.model, config.data
        self.keys = [feature.key for feature in data.sparse]
        self.dim = model.embedding_dim
        self.dims = {name: features[0].dim or self.dim for name, features in data.tables.items()}
        """Columns of each table."""
        self.tables = {name: [f.key for f in features] for name, features in data.tables.items()}
        self.projections = nn.ModuleDict(
            {name: nn.Linear(dim, self.dim, bias=False) for name, dim in self.dims.items() if dim != self.dim}
        )
        own = [f for f in data.sparse if f.table_name not in data.weighted_tables]
        self.bags = len(own)
        """Features whose table has no weights."""
        self.means = {f.key: i for i, f in enumerate(own) if f.pooling == "mean"}
        """Mean-pooled feature -> its position among those."""
        plain = [key for name, keys in self.tables.items() if name not in self.projections for key in keys]
        self.groups = [("", plain)] if plain else []
        """(projection or none, keys): a group holds tables of one dim, so that it can be taken apart into features."""
        self.groups += [(name, self.tables[name]) for name in self.projections]
        self.autocast = config.train.precision == "bfloat16"
        self.dense_arch = (
            DenseArch(len(data.dense), list(model.dense_hidden), model.dense_tokens, self.dim) if data.dense else None
        )
        fields = len(self.keys) + (model.dense_tokens if data.dense else 0)
        self.dhen = DHEN(model, fields)
        self.compiled: Callable[[Tensor, Tensor | None], Tensor] | None = None
        """What runs in place of `interact` in training, see c2al.training.compilation."""
        self.encoder = encoder_of(model, self.dhen.out_fields * self.dim)
        inputs = len(data.dense) + len(self.keys) * self.dim
        self.wide = nn.Linear(inputs, 1, bias=False) if model.wide else None
        # What only auxiliary tasks have comes last, so that the rest is initialised alike with and without it.
        auxiliary = 0 if serving else cohorts
        # Behind experts no features are all tasks' own, and gradients there no longer tell the tasks apart.
        shared = auxiliary and model.encoder == "shared-bottom"
        combine = Combine(config.train.combine, 1 + cohorts, config.seed) if shared else None
        self.heads = Heads(self.encoder.out_features, model.head_hidden, auxiliary, model.auxiliary_hidden, combine)
        self.encoder.add_auxiliary(cohorts, serving)

    def forward(self, dense_BF: Tensor, pooled: Sequence[KeyedTensor], lengths: Tensor | None = None) -> Tensor:
        return self.logits(dense_BF, self._embeddings(pooled, lengths) if pooled else None)

    def interact(self, dense_BF: Tensor, pooled_BND: Tensor | None) -> Tensor:
        """What the DHEN layers put out, flattened: (B, out_fields * D)."""
        tokens = [] if self.dense_arch is None else [self.dense_arch(dense_BF)]
        if pooled_BND is not None:
            tokens.append(pooled_BND.to(tokens[0].dtype if tokens else None))
        x_BND = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
        fields_BLD: Tensor = self.dhen(x_BND)
        return fields_BLD.flatten(1)

    def logits(self, dense_BF: Tensor, pooled_BND: Tensor | None) -> Tensor:
        """logit_BT of the pooled embeddings, N of them in config order."""
        interact = self.compiled if self.compiled and self.training else self.interact
        with torch.autocast(dense_BF.device.type, torch.bfloat16, enabled=self.autocast):
            logit_BT: Tensor = self.heads(self.encoder(interact(dense_BF, pooled_BND)))
            if self.wide is not None:
                inputs = [dense_BF] if pooled_BND is None else [dense_BF, pooled_BND.flatten(1)]
                wide_B1 = self.wide(torch.cat(inputs, dim=1))
                logit_BT = torch.cat([logit_BT[:, :1] + wide_B1, logit_BT[:, 1:]], dim=1)
        return logit_BT.float()

    def _embeddings(self, pooled: Sequence[KeyedTensor], lengths: Tensor | None = None) -> Tensor:
        """`embeddings` of what the collections of tables put out."""
        # The column order of KeyedTensor.values() depends on the sharding plan: index by key.
        parts = KeyedTensor.regroup(list(pooled), [keys for _, keys in self.groups])
        sums = [v.view(v.shape[0], len(keys), -1) for v, (_, keys) in zip(parts, self.groups, strict=True)]
        return self.embeddings(sums, lengths)

    def embeddings(self, sums: Sequence[Tensor], lengths: Tensor | None) -> Tensor:
        """The embeddings of all features (B, N, D) in config order, divided where they are means, and projected.

        `sums` has for each of `groups` the sums of embeddings (B, keys, dim). `lengths` has for each feature
        without weights, in config order, and each row of B how many embeddings the sum is of; without it
        nothing is divided.
        """
        of_key: dict[str, Tensor] = {}
        for (name, keys), own_BNE in zip(self.groups, sums, strict=True):
            if lengths is not None and not self.means.keys().isdisjoint(keys):
                own_BNE = own_BNE / self._divisor(keys, lengths)
            own_BND = self.projections[name](own_BNE) if name else own_BNE
            if keys == self.keys:
                return own_BND
            of_key |= dict(zip(keys, own_BND.unbind(1), strict=True))
        return torch.stack([of_key[key] for key in self.keys], dim=1)

    def _divisor(self, keys: Sequence[str], lengths: Tensor) -> Tensor:
        """(B, keys, 1) by what a sum is divided: 1, or for a mean the length of its bag, and an empty one's by 1."""
        length_NB = lengths.view(self.bags, -1)
        divisor_NB = torch.ones(len(keys), length_NB.shape[1], device=lengths.device)
        for n, key in enumerate(keys):
            if key in self.means:
                divisor_NB[n] = length_NB[self.means[key]].clamp(min=1)
        return divisor_NB.T[:, :, None]


class C2ALModel(nn.Module):
    """Sparse and dense features -> logit_BT.

    `sparse` holds the features whose tables have no weights, `weighted` the others, as a Batch does.
    `cohorts` auxiliary prediction heads of C2AL stand beside the primary one: T = 1 + cohorts. `serving`
    leaves out what the primary task does not need: T = 1.
    Embedding tables are made on `table_device`; "meta" leaves them for the sharder to fill.
    """

    def __init__(self, config: Config, cohorts: int = 0, table_device: str = "meta", *, serving: bool = False) -> None:
        super().__init__()
        weighted = config.data.weighted_tables
        tables = [_table(name, features, config) for name, features in config.data.tables.items()]
        self.ebc = _collection([t for t in tables if t.name not in weighted], table_device)
        self.weighted_ebc = _collection([t for t in tables if t.name in weighted], table_device, weighted=True)
        self.over = OverArch(config, cohorts, serving)

    def forward(self, dense_BF: Tensor, sparse: KeyedJaggedTensor, weighted: KeyedJaggedTensor | None = None) -> Tensor:
        pooled = [] if self.ebc is None else [self.ebc(sparse)]
        if self.weighted_ebc is not None:
            pooled.append(self.weighted_ebc(weighted))
        logit_BT: Tensor = self.over(dense_BF, pooled, sparse.lengths())
        return logit_BT


def _table(name: str, features: Sequence[SparseFeature], config: Config) -> EmbeddingBagConfig:
    """The table that `features`, which agree in all that describes it, share."""
    feature = features[0]
    bound = feature.init_scale if feature.init == "uniform" and feature.init_scale else None
    return EmbeddingBagConfig(
        name=name,
        num_embeddings=feature.rows,
        embedding_dim=feature.dim or config.model.embedding_dim,
        feature_names=[f.key for f in features],
        pooling=PoolingType.SUM,  # OverArch makes the means
        weight_init_min=None if bound is None else -bound,
        weight_init_max=bound,
    )


def _collection(tables: list[EmbeddingBagConfig], device: str, weighted: bool = False) -> EmbeddingBagCollection | None:
    """The collection of the tables; None without any."""
    if not tables:
        return None
    return EmbeddingBagCollection(device=torch.device(device), tables=tables, is_weighted=weighted)


def primary_prediction(logit_BT: Tensor) -> Tensor:
    """Probability of the primary task, (B,). Bit-equal whatever T is: a vectorised sigmoid rounds
    otherwise on a strided column than on a contiguous one."""
    return torch.sigmoid(logit_BT[:, 0].contiguous())


class TrainTask(nn.Module):
    """What is sharded and trained: Batch -> (loss, (task losses (T,), logit_BT, batch)).

    `cohorts` are the names of the cohorts whose membership a Batch carries. They are the auxiliary tasks where the
    config has auxiliary losses. In eval mode there are no losses (None): whoever scores needs no labels and
    no cohorts.
    """

    def __init__(self, config: Config, world_size: int, cohorts: Sequence[str] = ()) -> None:
        super().__init__()
        self.model = C2ALModel(config, len(cohorts) if config.train.auxiliary else 0)
        self.objective = Objective(config, cohorts, world_size)

    def forward(self, batch: Batch) -> tuple[Tensor | None, tuple[Tensor | None, Tensor, Batch]]:
        logit_BT = self.model(batch.dense_BF, batch.sparse, batch.weighted)
        if not self.training:
            return None, (None, logit_BT.detach(), batch)
        loss, task_T = self.objective(logit_BT, batch.label_B, batch.weight_B, batch.member_BC, batch.rows)
        return loss, (task_T, logit_BT.detach(), batch)
