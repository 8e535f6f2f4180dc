"""The update of tables in host memory against the kernel it replaces, bit for bit."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from c2al.distributed.table_update import HostTables, _shares_a_table

ROWS = (50, 7, 300)


def kernel(dims: tuple[int, ...], pooling: PoolingMode, shared: bool) -> SplitTableBatchedEmbeddingBagsCodegen:
    torch.manual_seed(0)
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(r, d, EmbeddingLocation.HOST, ComputeDevice.CPU) for r, d in zip(ROWS, dims, strict=True)],
        feature_table_map=[0, 1, 1, 2] if shared else [0, 1, 2],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.05,
        eps=1e-8,
        pooling_mode=pooling,
        device=torch.device("cpu"),
    )
    tables.init_embedding_weights_uniform(-0.1, 0.1)
    return tables


@pytest.mark.parametrize("longest", [1, 4])
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize("dims", [(16, 16, 16), (4, 8, 20), (64, 64, 64)])
def test_every_bit_is_that_of_the_kernel_it_replaces(dims, pooling, longest):
    """Rows that repeat within a batch and within a bag, empty bags, widths that fill no vector register."""
    theirs, replaced = kernel(dims, pooling, False), kernel(dims, pooling, False)
    ours = HostTables(replaced)
    generator = torch.Generator().manual_seed(1)
    batch, features = 33, len(ROWS)
    for step in range(4):
        low = 0 if longest > 1 else 1
        length = torch.randint(low, longest + 1, (features * batch,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), length.cumsum(0)])
        limit = torch.tensor(ROWS).repeat_interleave(batch).repeat_interleave(length)
        ids = (torch.rand(len(limit), generator=generator) * limit).long()
        grad_BD = torch.randn(batch, sum(dims), generator=generator)
        for lookup in (theirs, ours):
            lookup(ids, offsets).backward(grad_BD)
        for tables in (theirs, replaced):
            tables.set_learning_rate(0.05 / (step + 2))
        assert torch.equal(theirs.weights_host, replaced.weights_host), f"weights after step {step}"
        assert torch.equal(theirs.momentum1_host, replaced.momentum1_host), f"moments after step {step}"
    assert replaced.momentum1_host.count_nonzero() > 50, "rows were trained"


def test_an_id_outside_its_table_is_still_refused():
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode

    tables = kernel((16, 16, 16), PoolingMode.SUM, False)
    tables.bounds_check_mode_int = BoundsCheckMode.FATAL.value
    with pytest.raises(RuntimeError, match="idx < num_rows"):
        HostTables(tables)(torch.tensor([51, 0, 0]), torch.arange(4))


def test_evaluation_moves_no_table():
    tables = kernel((16, 16, 16), PoolingMode.SUM, False)
    before = tables.weights_host.detach().clone()
    with torch.no_grad():
        out_BD = HostTables(tables)(torch.tensor([3, 4, 5]), torch.arange(4))
    assert not out_BD.requires_grad
    assert torch.equal(out_BD[0, :16], before[3 * 16 : 4 * 16])
    assert torch.equal(tables.weights_host, before)


def test_tables_that_features_share_keep_fbgemms_update():
    """The gradients of a row must meet before its update, over all features that read it."""
    assert _shares_a_table(kernel((16, 16, 16), PoolingMode.SUM, True))
    assert not _shares_a_table(kernel((16, 16, 16), PoolingMode.SUM, False))
