"""Impressions -> logits: EmbeddingBagCollection -> dense arch -> DHEN -> encoder -> prediction heads.

Letters: B batch, F dense features, N fields (dense tokens, then sparse features in config order),
D embedding dim, C auxiliary cohorts, T = 1 + C tasks, the primary one first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from c2al.config import Config
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

    Takes dense_BF, the summed embeddings and the lengths of the bags, returns logit_BT in float32. With
    `serving` T = 1, and there is only what the primary task needs; its parameters are those of training
    without AUXILIARY_PREFIX.

    It makes the means of mean-pooled features itself. torchrec's own mean of a table that is split by rows
    divides every feature of the model by (length + 1e-6), the sums among them, so that predictions would
    depend on the sharding plan.

    model.wide adds w . [dense; vec(pooled)] to the primary logit (Wide & Deep, Cheng et al. 2016). A feature's
    weight times an id's embedding is one number per id, so the wide part needs no tables of its own. The
    auxiliary tasks have no wide part: what their losses teach, they teach the encoder.
    """

    def __init__(self, config: Config, cohorts: int, serving: bool = False) -> None:
        super().__init__()
        model, data = config.model, config.data
        self.keys = [feature.key for feature in data.sparse]
        self.dim = model.embedding_dim
        self.means = [i for i, feature in enumerate(data.sparse) if feature.pooling == "mean"]
        self.autocast = config.train.precision == "bfloat16"
        self.dense_arch = (
            DenseArch(len(data.dense), list(model.dense_hidden), model.dense_tokens, self.dim) if data.dense else None
        )
        fields = len(self.keys) + (model.dense_tokens if data.dense else 0)
        self.dhen = DHEN(model, fields)
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

    def forward(self, dense_BF: Tensor, pooled: KeyedTensor | None, lengths: Tensor | None = None) -> Tensor:
        if pooled is None:
            return self.logits(dense_BF, None)
        # The column order of KeyedTensor.values() depends on the sharding plan: index by key.
        (values_BX,) = KeyedTensor.regroup([pooled], [self.keys])
        return self.logits(dense_BF, values_BX.view(-1, len(self.keys), self.dim), lengths)

    def logits(self, dense_BF: Tensor, sum_BND: Tensor | None, lengths: Tensor | None = None) -> Tensor:
        """logit_BT of the sums of embeddings, N of them in config order.

        `lengths` (N * B) says how many embeddings each is the sum of; without it nothing is divided.
        """
        if sum_BND is not None and lengths is not None and self.means:
            length_NB = lengths.view(len(self.keys), -1)
            divisor_NB = torch.ones_like(length_NB, dtype=torch.float32)
            for i in self.means:
                divisor_NB[i] = length_NB[i].clamp(min=1)
            sum_BND = sum_BND / divisor_NB.T[:, :, None]
        with torch.autocast(dense_BF.device.type, torch.bfloat16, enabled=self.autocast):
            tokens = [] if self.dense_arch is None else [self.dense_arch(dense_BF)]
            if sum_BND is not None:
                tokens.append(sum_BND.to(tokens[0].dtype if tokens else None))
            x_BND = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
            logit_BT: Tensor = self.heads(self.encoder(self.dhen(x_BND).flatten(1)))
            if self.wide is not None:
                inputs = [dense_BF] if sum_BND is None else [dense_BF, sum_BND.flatten(1)]
                wide_B1 = self.wide(torch.cat(inputs, dim=1))
                logit_BT = torch.cat([logit_BT[:, :1] + wide_B1, logit_BT[:, 1:]], dim=1)
        return logit_BT.float()


class C2ALModel(nn.Module):
    """Sparse and dense features -> logit_BT.

    `cohorts` auxiliary prediction heads of C2AL stand beside the primary one: T = 1 + cohorts. `serving`
    leaves out what the primary task does not need: T = 1.
    Embedding tables are made on `table_device`; "meta" leaves them for the sharder to fill.
    """

    def __init__(self, config: Config, cohorts: int = 0, table_device: str = "meta", *, serving: bool = False) -> None:
        super().__init__()
        self.ebc = (
            EmbeddingBagCollection(
                device=torch.device(table_device),
                tables=[
                    EmbeddingBagConfig(
                        name=f.key,
                        num_embeddings=f.rows,
                        embedding_dim=config.model.embedding_dim,
                        feature_names=[f.key],
                        pooling=PoolingType.SUM,  # OverArch makes the means
                    )
                    for f in config.data.sparse
                ],
            )
            if config.data.sparse
            else None
        )
        self.over = OverArch(config, cohorts, serving)

    def forward(self, dense_BF: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        pooled = None if self.ebc is None else self.ebc(sparse)
        logit_BT: Tensor = self.over(dense_BF, pooled, sparse.lengths())
        return logit_BT


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
        logit_BT = self.model(batch.dense_BF, batch.sparse)
        if not self.training:
            return None, (None, logit_BT.detach(), batch)
        loss, task_T = self.objective(logit_BT, batch.label_B, batch.weight_B, batch.member_BC, batch.rows)
        return loss, (task_T, logit_BT.detach(), batch)
