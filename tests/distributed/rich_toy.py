"""The toy with what production tables have: a shared table, tables of another dim, weighted bags, normal weights.

Takes the place of `toy`: the same names, for the tests that run both.
"""

import torch
import toy
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from toy import DENSE, GLOBAL_BATCH

from c2al.config import Config

ROWS = {**toy.ROWS, "basket": 41}
DIMS = {"user": 16, "item": 16, "tags": 8, "basket": 8}
FEATURES = {"user": ["user"], "item": ["item", "seen"], "tags": ["tags"], "basket": ["basket", "last"]}
"""Table -> the features that share it. `seen`, `tags` and `basket` are lists; `last`, one value, weighs 1."""
LISTS = ("seen", "tags", "basket")
WEIGHTED = ("basket",)
WIDTH = sum(DIMS[table] for table, features in FEATURES.items() for _ in features)
STD = 0.03


def _collection(names: list[str], weighted: bool) -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=ROWS[name],
            embedding_dim=DIMS[name],
            feature_names=FEATURES[name],
            pooling=PoolingType.MEAN if name == "tags" else PoolingType.SUM,
        )
        for name in names
    ]
    return EmbeddingBagCollection(device=torch.device("meta"), tables=tables, is_weighted=weighted)


Sparse = tuple[KeyedJaggedTensor, KeyedJaggedTensor]


class Toy(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        self.ebc = _collection([n for n in ROWS if n not in WEIGHTED], weighted=False)
        self.weighted_ebc = _collection(list(WEIGHTED), weighted=True)
        torch.manual_seed(seed)
        self.over = nn.Sequential(nn.Linear(DENSE + WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, dense_BF: torch.Tensor, sparse: Sparse) -> torch.Tensor:
        pooled, weighted = self.ebc(sparse[0]), self.weighted_ebc(sparse[1])
        parts = [weighted[f] if t in WEIGHTED else pooled[f] for t, features in FEATURES.items() for f in features]
        return self.over(torch.cat([dense_BF, *parts], dim=1)).squeeze(1)


def config(**overrides: object) -> Config:
    sparse = []
    for table, features in FEATURES.items():
        for name in features:
            feature = {"column": name, "table": table, "num_embeddings": ROWS[table], "dim": DIMS[table]}
            if name in LISTS:
                feature["max_length"] = 3
            if table == "tags":
                feature["pooling"] = "mean"
            if name == "basket":
                feature["weights"] = "weights"
            if table == "user":
                feature |= {"init": "normal", "init_scale": STD}
            sparse.append(feature)
    return toy.config(data__sparse=sparse, **overrides)


def batch(step: int, rank: int, size: int) -> tuple[torch.Tensor, Sparse, torch.Tensor]:
    """Rank's equal slice of global batch `step`. Both features of a table hold the same ids at times."""
    g = torch.Generator().manual_seed(2000 + step)
    dense_BF = torch.randn(GLOBAL_BATCH, DENSE, generator=g)
    label_B = (torch.rand(GLOBAL_BATCH, generator=g) < 0.4).float()
    per_rank = GLOBAL_BATCH // size
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    parts: dict[bool, list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]] = {False: [], True: []}
    for table, features in FEATURES.items():
        for name in features:
            length_B = torch.ones(GLOBAL_BATCH).long()
            if name in LISTS:
                length_B = torch.randint(0, 4, (GLOBAL_BATCH,), generator=g)
            ids = torch.randint(0, ROWS[table], (int(length_B.sum()),), generator=g)
            weights = torch.randn(len(ids), generator=g) if name == "basket" else torch.ones(len(ids))
            start = int(length_B[: mine.start].sum())
            own = slice(start, start + int(length_B[mine].sum()))
            parts[table in WEIGHTED].append((name, ids[own], length_B[mine], weights[own]))
    jagged = [
        KeyedJaggedTensor(
            keys=[p[0] for p in of],
            values=torch.cat([p[1] for p in of]),
            lengths=torch.cat([p[2] for p in of]),
            weights=torch.cat([p[3] for p in of]) if weighted else None,
        )
        for weighted, of in parts.items()
    ]
    return dense_BF[mine], (jagged[0], jagged[1]), label_B[mine]


def train_step(dmp, optimizer, step: int, rank: int, size: int) -> float:
    """One step as the training job does it; returns the global loss."""
    return toy.train_on(dmp, optimizer, *batch(step, rank, size), size)
