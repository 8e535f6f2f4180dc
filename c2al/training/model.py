"""Impressions -> logits: EmbeddingBagCollection -> dense arch -> DHEN -> prediction heads.

Letters: B batch, F dense features, N fields (dense tokens, then sparse features in config order),
D embedding dim, T tasks (1: primary; 3: primary, head, tail).
"""

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from c2al.config import Config
from c2al.data.batch import Batch
from c2al.nn.dense import DenseArch
from c2al.nn.dhen import DHEN
from c2al.nn.objective import objective
from c2al.nn.prediction_heads import Heads

AUXILIARY_PREFIXES = ("over.heads.head.", "over.heads.tail.")
"""Parameters of C2ALModel that exist in training only."""


class OverArch(nn.Module):
    """Everything above the embedding tables.

    Takes dense_BF and the pooled embeddings, returns logit_BT in float32.
    """

    def __init__(self, config: Config, auxiliary: bool) -> None:
        super().__init__()
        model, data = config.model, config.data
        self.keys = [feature.key for feature in data.sparse]
        self.dim = model.embedding_dim
        self.autocast = config.train.precision == "bfloat16"
        self.dense_arch = (
            DenseArch(len(data.dense), list(model.dense_hidden), model.dense_tokens, self.dim) if data.dense else None
        )
        fields = len(self.keys) + (model.dense_tokens if data.dense else 0)
        self.dhen = DHEN(model, fields)
        # Last, so that whatever is above is initialised alike with and without auxiliary prediction heads.
        self.heads = Heads(self.dhen.out_fields * self.dim, model.head_hidden, auxiliary, model.auxiliary_hidden)

    def forward(self, dense_BF: Tensor, pooled: KeyedTensor | None) -> Tensor:
        with torch.autocast(dense_BF.device.type, torch.bfloat16, enabled=self.autocast):
            tokens = [] if self.dense_arch is None else [self.dense_arch(dense_BF)]
            if pooled is not None:
                # The column order of KeyedTensor.values() depends on the sharding plan: index by key.
                (values_BND,) = KeyedTensor.regroup([pooled], [self.keys])
                tokens.append(values_BND.view(-1, len(self.keys), self.dim).to(tokens[0].dtype if tokens else None))
            x_BND = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
            logit_BT: Tensor = self.heads(self.dhen(x_BND).flatten(1))
        return logit_BT.float()


class C2ALModel(nn.Module):
    """Sparse and dense features -> logit_BT.

    `auxiliary` adds the auxiliary prediction heads of head and tail cohort (T = 3); without it T = 1.
    Embedding tables are made on `table_device`; "meta" leaves them for the sharder to fill.
    """

    def __init__(self, config: Config, auxiliary: bool, table_device: str = "meta") -> None:
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
                        pooling=PoolingType.SUM if f.pooling == "sum" else PoolingType.MEAN,
                    )
                    for f in config.data.sparse
                ],
            )
            if config.data.sparse
            else None
        )
        self.over = OverArch(config, auxiliary)

    def forward(self, dense_BF: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        pooled = None if self.ebc is None else self.ebc(sparse)
        logit_BT: Tensor = self.over(dense_BF, pooled)
        return logit_BT


def primary_prediction(logit_BT: Tensor) -> Tensor:
    """Probability of the primary task, (B,). Bit-equal whatever T is: a vectorised sigmoid rounds
    otherwise on a strided column than on a contiguous one."""
    return torch.sigmoid(logit_BT[:, 0].contiguous())


class Objective(nn.Module):
    """C2AL Eq. 4 on a Batch's columns; a module so that the pipeline's tracer need not look inside."""

    def __init__(self, lambda_head: float, lambda_tail: float, world_size: int) -> None:
        super().__init__()
        self.lambda_head, self.lambda_tail, self.world_size = lambda_head, lambda_tail, world_size

    def forward(
        self, logit_BT: Tensor, label_B: Tensor, weight_B: Tensor, member_B2: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        # Gradients are averaged over ranks; local sum / (global rows / ranks) makes that the global mean.
        loss = objective(
            logit_BT,
            label_B,
            weight_B,
            member_B2,
            lambda_head=self.lambda_head,
            lambda_tail=self.lambda_tail,
            rows=rows / self.world_size,
        )
        return loss.total, loss.task_T


class TrainTask(nn.Module):
    """What is sharded and trained: Batch -> (loss, (task losses (T,), logit_BT, batch))."""

    def __init__(self, config: Config, world_size: int) -> None:
        super().__init__()
        self.model = C2ALModel(config, config.train.auxiliary)
        self.objective = Objective(config.train.lambda_head, config.train.lambda_tail, world_size)

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Batch]]:
        logit_BT = self.model(batch.dense_BF, batch.sparse)
        loss, task_T = self.objective(logit_BT, batch.label_B, batch.weight_B, batch.member_B2, batch.rows)
        return loss, (task_T, logit_BT.detach(), batch)
