"""The plain stack is the same function as the model: what its speed is compared with must be the same work."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedTensor

from c2al.config import replace
from c2al.training.model import OverArch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package

from made_rows import in_memory
from shapes import SHAPES
from stack import Columns, MergedTable, Over, PlainStep


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "wukong-26x16", "demo"])
def test_over_arch_is_that_of_the_model(name, precision, auxiliary):
    shape = SHAPES[name]()
    config = replace(shape.config, **{"train.precision": precision})
    torch.manual_seed(0)
    ours = OverArch(config, 2 if auxiliary else 0)
    plain = Over(config.model, len(config.data.dense), len(shape.rows), auxiliary, precision == "bfloat16")
    plain.load_state_dict(ours.state_dict())
    dense_BF = torch.randn(7, len(config.data.dense))
    pooled_BND = torch.randn(7, len(shape.rows), config.model.embedding_dim)
    keyed = KeyedTensor(ours.keys, [ours.dim] * len(ours.keys), pooled_BND.flatten(1))
    torch.testing.assert_close(plain(dense_BF, pooled_BND), ours(dense_BF, [keyed]), rtol=0, atol=0)


def test_table_update_is_row_wise_adagrad_of_the_summed_gradients():
    table = MergedTable((3, 4), 4, lr=0.1, eps=1e-3)
    before, row_V = table.weight_RD.numpy().astype(np.float64), torch.tensor([1, 1, 2, 3, 6, 3])
    expected, moment = before.copy(), np.zeros(7)
    rng = np.random.default_rng(0)
    for _ in range(2):
        grad_BND = torch.from_numpy(rng.normal(size=(3, 2, 4)).astype(np.float32))
        by_value = grad_BND.transpose(0, 1).reshape(6, 4).numpy().astype(np.float64)
        for row in set(row_V.tolist()):
            g = by_value[row_V.numpy() == row].sum(0)
            moment[row] += (g**2).mean()
            expected[row] -= 0.1 * g / (np.sqrt(moment[row]) + 1e-3)
        table.update(row_V, None, grad_BND)
    np.testing.assert_allclose(table.weight_RD.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert (table.weight_RD.numpy()[[0, 4, 5]] == before[[0, 4, 5]]).all()


def test_lists_are_summed_and_their_gradient_reaches_every_row():
    table = MergedTable((3, 4), 4, lr=1.0, eps=1e-3)
    row_V, bag_V = torch.tensor([0, 2, 1, 3, 6, 5]), torch.tensor([0, 0, 1, 2, 3, 3])  # two features, two samples
    pooled_BND = table.lookup(row_V, bag_V, 2)
    torch.testing.assert_close(pooled_BND[0, 0], table.weight_RD[0] + table.weight_RD[2])
    torch.testing.assert_close(pooled_BND[1, 1], table.weight_RD[6] + table.weight_RD[5])
    before = table.weight_RD.clone()
    grad_BND = torch.zeros_like(pooled_BND)
    grad_BND[1, 1] = 1.0
    table.update(row_V, bag_V, grad_BND)
    changed = (table.weight_RD != before).any(1)
    assert changed.tolist() == [False] * 5 + [True, True]


@pytest.mark.parametrize("auxiliary", [False, True])
def test_loss_is_the_objective_and_a_step_lowers_it(auxiliary):
    shape = SHAPES["tiny"]()
    table = MergedTable(shape.rows, 8, 0.05, 1e-8)
    torch.manual_seed(0)
    step = PlainStep(shape.config, table, auxiliary, bfloat16=False, compiled=None)
    columns = Columns.random(3, table, shape.rows, shape.batch, "cpu")
    expected = step.reference_loss(columns)
    first = step(columns)
    torch.testing.assert_close(first, expected.detach())
    for _ in range(30):
        last = step(columns)
    assert last < 0.8 * first


def test_batches_in_memory_cover_lists_strings_and_numbers():
    shape = SHAPES["demo"]()
    table = MergedTable(shape.rows, 16, 0.05, 1e-8)
    batches = in_memory(shape.config.data, table, shape.rows, 32, 2)
    assert len(batches) == 2
    for c in batches:
        assert c.dense_BF.shape == (32, len(shape.config.data.dense))
        feature = torch.bucketize(c.row_V, table.start_N, right=True) - 1
        assert torch.equal(feature, c.bag_V // 32)  # every id lies in its own feature's table
        assert len(c.row_V) > 32 * len(shape.rows)  # lists of more than one
