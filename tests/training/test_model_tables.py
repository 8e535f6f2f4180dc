"""Tables of several collections and dims come to the network as fields of one dim, in config order."""

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from c2al.config import parse_config
from c2al.training.model import C2ALModel

FEATURES = [
    {"column": "a", "num_embeddings": 5, "dim": 4},
    {"column": "b", "num_embeddings": 6},
    {"column": "c", "num_embeddings": 7, "weights": "w", "max_length": 3, "dim": 12},
    {"column": "d", "table": "a", "num_embeddings": 5, "dim": 4},
    {"column": "e", "num_embeddings": 8},
]


def model(*features: dict) -> C2ALModel:
    tree = {"data": {"shards": 1, "sparse": list(features)}, "model": {"embedding_dim": 8}, "train": {"batch_size": 2}}
    return C2ALModel(parse_config(tree), table_device="cpu")


def bags(keys: str, weights: list[float] | None = None) -> KeyedJaggedTensor:
    """Two rows of single values 0, 1, 2, ..."""
    count = 2 * len(keys)
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.arange(count) % 5,
        lengths=torch.ones(count, dtype=torch.long),
        weights=None if weights is None else torch.tensor(weights),
    )


@pytest.mark.parametrize("only", ["abcde", "be", "ad", "cbe"])
def test_every_field_is_its_table_projected(only):
    torch.manual_seed(0)
    net = model(*(f for f in FEATURES if f["column"] in only))
    plain, weighted = "".join(k for k in only if k != "c"), [0.5, -2.0]
    pooled = [net.ebc(bags(plain))] + ([net.weighted_ebc(bags("c", weighted))] if "c" in only else [])
    found_BND = net.over._embeddings(pooled)
    order = [f["column"] for f in FEATURES if f["column"] in only]
    assert found_BND.shape == (2, len(order), 8)
    for n, key in enumerate(order):
        table = "a" if key == "d" else key
        ebc = net.weighted_ebc if key == "c" else net.ebc
        weight_RD = ebc.embedding_bags[table].weight
        ids = torch.arange(2) if key == "c" else torch.arange(2 * len(plain)).view(-1, 2)[plain.index(key)] % 5
        expected_BD = weight_RD[ids] * (torch.tensor(weighted)[:, None] if key == "c" else 1)
        if table in "ac":
            expected_BD = expected_BD @ net.over.projections[table].weight.T
        torch.testing.assert_close(found_BND[:, n], expected_BD, rtol=1e-6, atol=1e-7)
    assert set(net.over.projections) == set(only) & {"a", "c"}


def test_weights_start_within_the_declared_bound():
    net = model({"column": "a", "num_embeddings": 500, "init_scale": 0.001}, {"column": "b", "num_embeddings": 500})
    assert net.ebc.embedding_bags["a"].weight.abs().max() <= 0.001
    assert net.ebc.embedding_bags["b"].weight.abs().max() > 0.04


def test_a_mean_is_divided_by_the_length_of_its_bag_and_nothing_else_is():
    torch.manual_seed(0)
    net = model(
        {"column": "a", "num_embeddings": 5, "max_length": 3, "pooling": "mean", "dim": 4},
        {"column": "c", "num_embeddings": 7, "weights": "w", "max_length": 3},
        {"column": "b", "num_embeddings": 5, "max_length": 3},
        {"column": "e", "num_embeddings": 5, "max_length": 3, "pooling": "mean"},
    )
    lengths = [3, 0, 2, 1, 0, 2]  # of a, b and e in two rows
    sparse = KeyedJaggedTensor(keys=list("abe"), values=torch.arange(8) % 5, lengths=torch.tensor(lengths))
    weighted = KeyedJaggedTensor(
        keys=["c"], values=torch.tensor([1, 2, 3]), lengths=torch.tensor([2, 1]), weights=torch.tensor([0.5, 2.0, 3.0])
    )
    found_BND = net.over._embeddings([net.ebc(sparse), net.weighted_ebc(weighted)], sparse.lengths())

    def mean(name: str, row: int) -> torch.Tensor:
        bag = sparse[name].to_dense()[row]
        rows = net.ebc.embedding_bags[name].weight[bag]
        return rows.mean(0) if len(bag) else rows.sum(0)

    for row in range(2):
        c_RD, b_RD = net.weighted_ebc.embedding_bags["c"].weight, net.ebc.embedding_bags["b"].weight
        expected = [
            net.over.projections["a"](mean("a", row)),
            0.5 * c_RD[1] + 2 * c_RD[2] if row == 0 else 3 * c_RD[3],
            b_RD[sparse["b"].to_dense()[row]].sum(0),
            mean("e", row),
        ]
        torch.testing.assert_close(found_BND[row], torch.stack(expected), rtol=1e-6, atol=1e-7)
