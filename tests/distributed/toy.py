"""A small model of c2al's shape (tables, dense part, logits) and its data, for tests of the dist layer."""

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from c2al.config import Config, parse_config

DIM, DENSE = 16, 3
ROWS = {"user": 37, "item": 64, "tags": 50}
"""37 rows do not divide by 2 or 4; tags is multi-hot and mean-pooled."""
DIMS = dict.fromkeys(ROWS, DIM)
GLOBAL_BATCH = 32


class Toy(nn.Module):
    def __init__(self, seed: int = 0, dim: int = DIM, rows: dict[str, int] | None = None, extra: bool = False):
        super().__init__()
        self.rows = dict(rows or ROWS)
        self.ebc = EmbeddingBagCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingBagConfig(
                    name=name,
                    num_embeddings=n,
                    embedding_dim=dim,
                    feature_names=[name],
                    pooling=PoolingType.MEAN if name == "tags" else PoolingType.SUM,
                )
                for name, n in self.rows.items()
            ],
        )
        torch.manual_seed(seed)
        self.over = nn.Sequential(nn.Linear(DENSE + dim * len(self.rows), 8), nn.Tanh(), nn.Linear(8, 1))
        if extra:
            self.tail = nn.Linear(8, 1)

    def forward(self, dense_BF: torch.Tensor, sparse: KeyedJaggedTensor) -> torch.Tensor:
        pooled = self.ebc(sparse)
        return self.over(torch.cat([dense_BF, *(pooled[name] for name in self.rows)], dim=1)).squeeze(1)


def config(**overrides: object) -> Config:
    """A config whose sparse features are the toy's tables; overrides by dotted path, '__' for '.'."""
    tree = {
        "data": {
            "shards": 4,
            "sparse": [
                {"column": name, "num_embeddings": rows, "max_length": 3 if name == "tags" else 1}
                for name, rows in ROWS.items()
            ],
        },
        "model": {"embedding_dim": DIM},
        "train": {"batch_size": GLOBAL_BATCH, "optimizer": {"sparse_lr": 0.1, "dense_lr": 0.01}},
        "dist": {"device": "cpu", "ddr_gib": 1.0},
    }
    for path, value in overrides.items():
        section = tree
        *parents, leaf = path.split("__")
        for name in parents:
            section = section.setdefault(name, {})
        section[leaf] = value
    return parse_config(tree)


def batch(step: int, rank: int, size: int) -> tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor]:
    """Rank's equal slice of global batch `step`: (dense_BF, sparse, label_B). Ids repeat within a batch."""
    g = torch.Generator().manual_seed(1000 + step)
    dense_BF = torch.randn(GLOBAL_BATCH, DENSE, generator=g)
    label_B = (torch.rand(GLOBAL_BATCH, generator=g) < 0.4).float()
    per_rank = GLOBAL_BATCH // size
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    values, lengths = [], []
    for name, rows in ROWS.items():
        length_B = (
            torch.randint(0, 4, (GLOBAL_BATCH,), generator=g) if name == "tags" else torch.ones(GLOBAL_BATCH).long()
        )
        ids = torch.randint(0, rows, (int(length_B.sum()),), generator=g)
        start = int(length_B[: mine.start].sum())
        values.append(ids[start : start + int(length_B[mine].sum())])
        lengths.append(length_B[mine])
    sparse = KeyedJaggedTensor(keys=list(ROWS), values=torch.cat(values), lengths=torch.cat(lengths))
    return dense_BF[mine], sparse, label_B[mine]


def train_step(dmp, optimizer, step: int, rank: int, size: int) -> float:
    """One step as the training job does it; returns the global loss."""
    return train_on(dmp, optimizer, *batch(step, rank, size), size)


def train_on(dmp, optimizer, dense_BF, sparse, label_B, size: int) -> float:
    """A step on this batch."""
    optimizer.zero_grad()
    logit_B = dmp(dense_BF, sparse)
    # Gradients are averaged over ranks, so a rank divides its sum by its share of the global rows.
    loss = nn.functional.binary_cross_entropy_with_logits(logit_B, label_B, reduction="sum") / (GLOBAL_BATCH / size)
    loss.backward()
    optimizer.step()
    total = loss.detach().double() / size
    torch.distributed.all_reduce(total)
    return float(total)
