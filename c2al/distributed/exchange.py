"""How many bytes of pooled embeddings leave each rank in a step, for a plan and ranks that need not be there.

Letters: N ranks, L ranks per host, B rows of one rank's batch, D columns of a block, F features of its table,
e bytes per number. Bytes of one forward pass; the gradients of the backward pass go the other way.

table_wise, column_wise      the rank of a block sends B F D e to each of the other ranks
row_wise                     every rank has partial sums for all N B rows: a reduce-scatter, whose rings carry
                             N B F D e over every link within a host and 1/L of that over every rank's network link
table_row_wise, grid_shard   the same within the block's host, then each of its ranks sends its N B / L rows' sums
                             to the ranks of their rows
data_parallel                nothing; its gradient is part of DDP's all-reduce
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from c2al.distributed.placement import DATA_PARALLEL, ROW_SPLIT, Plan, Ranks

Floats = npt.NDArray[np.float64]


def bytes_sent(
    plan: Plan, tables: Mapping[str, EmbeddingBagConfig], ranks: Ranks, batch: int, element: int = 4
) -> Floats:
    """(N, 2) bytes that each rank sends per forward pass: to ranks of its host, and over the network.

    batch: rows of one rank. element: bytes per number as it travels (`dist.forward_comm`).
    """
    size, local = ranks.size, ranks.local_size
    sent_N2 = np.zeros((size, 2))
    inside, outside = local - 1, size - local
    for name, placement in plan.items():
        if placement.sharding == DATA_PARALLEL:
            continue
        table = tables[name]
        own = float(batch * len(table.feature_names) * element)
        columns = table.embedding_dim // placement.column_blocks(local)
        blocks = np.asarray(placement.ranks)
        if placement.sharding == "row_wise":
            # Rings: all but a rank's own part passes every link; a host's rings leave it through L links.
            sent_N2 += own * columns * np.array([size - 1, (size - 1) / local if outside else 0.0])
        elif placement.sharding in ROW_SPLIT:
            hosts = size // local
            sent_N2[blocks] += own * columns * np.array([hosts * inside, outside / local])
        else:
            np.add.at(sent_N2, blocks, own * columns * np.array([inside, outside]))
    return sent_N2
