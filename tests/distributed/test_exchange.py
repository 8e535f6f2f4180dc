"""Bytes that leave each rank per forward pass, counted by hand."""

import numpy as np
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from c2al.distributed.exchange import bytes_sent
from c2al.distributed.placement import Cluster, Placement

# Two hosts of two ranks; batches of 10 rows; a table of two features of 8 columns: 10 * 2 * 8 * 4 = 640 bytes.
CLUSTER = Cluster(4, 2, torch.device("cpu"))
TABLES = {"t": EmbeddingBagConfig(name="t", num_embeddings=100, embedding_dim=8, feature_names=["a", "b"])}


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        # To one rank of its own host, and to two of the other.
        (Placement("table_wise", (2,)), [[0, 0], [0, 0], [640, 1280], [0, 0]]),
        # Half of the columns from each of two ranks.
        (Placement("column_wise", (0, 3)), [[320, 640], [0, 0], [0, 0], [320, 640]]),
        (Placement("column_wise", (1, 1)), [[0, 0], [640, 1280], [0, 0], [0, 0]]),
        # Three of four parts pass every link of a ring; the two links that leave a host share them.
        (Placement("row_wise", (0, 1, 2, 3)), [[1920, 960]] * 4),
        # Within the host the sums of two of four parts; then each rank has those of two parts, half for the other host.
        (Placement("table_row_wise", (2, 3)), [[0, 0], [0, 0], [1280, 640], [1280, 640]]),
        (Placement("grid_shard", (0, 1, 2, 3)), [[640, 320]] * 4),
        (Placement("data_parallel", ()), [[0, 0]] * 4),
    ],
    ids=lambda value: value.sharding if isinstance(value, Placement) else "",
)
def test_bytes_of_every_sharding_type(placement, expected):
    np.testing.assert_array_equal(bytes_sent({"t": placement}, TABLES, CLUSTER, 10), expected)


def test_one_host_sends_nothing_over_the_network_and_half_precision_half():
    one = Cluster(4, 4, torch.device("cpu"))
    for placement in (Placement("table_wise", (2,)), Placement("row_wise", (0, 1, 2, 3))):
        whole, half = (bytes_sent({"t": placement}, TABLES, one, 10, element) for element in (4, 2))
        assert whole[:, 1].sum() == 0 < whole[:, 0].sum() == 2 * half[:, 0].sum()
