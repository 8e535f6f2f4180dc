"""How a table is split must not change how another one of its collection pools."""

import json

import pytest
import torch
import toy
from torch import nn
from torch.nn import functional as F
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from c2al.distributed.process import process_group
from c2al.distributed.sharding import shard_model
from c2al.distributed.tables import local_tables
from ranks import run_ranks

POOLING = {"rows_mean": "mean", "rows_sum": "sum", "whole_mean": "mean", "whole_sum": "sum"}
ROWS, BATCH = 11, 4


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(
                name=name,
                num_embeddings=ROWS,
                embedding_dim=8,
                feature_names=[name],
                pooling=PoolingType.MEAN if pooling == "mean" else PoolingType.SUM,
            )
            for name, pooling in POOLING.items()
        ]
        self.ebc = EmbeddingBagCollection(device=torch.device("meta"), tables=tables)
        self.over = nn.Linear(1, 1)

    def forward(self, sparse):
        return self.ebc(sparse)


def pooled(plan: str) -> dict:
    """Per feature what the sharded model pools, and this rank's blocks."""
    sparse = [
        {"column": n, "num_embeddings": ROWS, "pooling": p, "max_length": 4, "dim": 8} for n, p in POOLING.items()
    ]
    config = toy.config(dist__plan=plan, data__sparse=sparse)
    with process_group(config.dist) as world:
        dmp = shard_model(Bags(), config, world)
        found = dmp(bags()).to_dict()
        blocks = [
            (t.name.split(".")[-2], b.row, b.column, b.weight_RD.clone()) for t in local_tables(dmp) for b in t.blocks
        ]
    return {"pooled": {n: v.detach() for n, v in found.items()}, "blocks": blocks}


def bags() -> KeyedJaggedTensor:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 5, (len(POOLING) * BATCH,), generator=g)
    return KeyedJaggedTensor(
        keys=list(POOLING), values=torch.randint(0, ROWS, (int(lengths.sum()),), generator=g), lengths=lengths
    )


@pytest.mark.parametrize("rows", ["row_wise", "table_row_wise"])
@pytest.mark.parametrize("whole", ["table_wise", "column_wise", "data_parallel"])
def test_a_mean_table_split_by_rows_leaves_the_pooling_of_others_alone(tmp_path, rows, whole):
    ranks = {"table_wise": [1], "column_wise": [0, 1], "data_parallel": []}[whole]
    placements = {
        name: {"sharding": rows, "ranks": [0, 1]} if name.startswith("rows") else {"sharding": whole, "ranks": ranks}
        for name in POOLING
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"format": "plan", "version": 1, "tables": placements}))
    results = run_ranks(pooled, 2, str(path))
    tables = {name: torch.full((ROWS, 8), float("nan")) for name in POOLING}
    for result in results:
        for name, row, column, weight in result["blocks"]:
            tables[name][row : row + weight.shape[0], column : column + weight.shape[1]] = weight
    sparse = bags()
    for name, pooling in POOLING.items():
        jagged = sparse[name]
        expected = F.embedding_bag(jagged.values(), tables[name], jagged.offsets()[:-1], mode=pooling)
        for result in results:
            # TorchRec adds 1e-6 to the length by which it divides.
            torch.testing.assert_close(result["pooled"][name], expected, rtol=2e-6, atol=1e-7, msg=name)
