"""Mean pooling is the mean, whatever the sharding plan and whatever other features there are."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from c2al.config import parse_config
from c2al.distributed.process import process_group
from c2al.training.score import score
from c2al.training.trainer import train
from impressions import splits, tree


@pytest.mark.parametrize("of_sum", ["row_wise", "table_wise"])
def test_predictions_do_not_depend_on_the_plan_of_a_mean(tmp_path_factory, of_sum):
    root = tmp_path_factory.mktemp("means")
    splits(root / "data", rows=1024)
    predictions = []
    for of_mean in ("row_wise", "table_wise", "column_wise"):
        sections = tree(root / "data")
        sections["data"]["sparse"].append(
            {"column": "tags", "name": "tag_mean", "num_embeddings": 16, "max_length": 4, "pooling": "mean"}
        )
        sections["dist"]["sharding"] = ["table_wise"]
        sections["dist"]["tables"] = [
            {"name": "tags", "sharding": [of_sum]},
            {"name": "tag_mean", "sharding": [of_mean]},
        ]
        config = parse_config(sections)
        with process_group(config.dist) as world:
            train(config, root / f"run-{of_mean}", world)
            score(root / f"run-{of_mean}", config.data.test, root / f"scores-{of_mean}", world)
        predictions.append(np.asarray(pq.read_table(root / f"scores-{of_mean}")["prediction"]))
    for other in predictions[1:]:
        # Eight steps of training apart, sums of other orders differ in the last bits only.
        np.testing.assert_allclose(other, predictions[0], rtol=0, atol=1e-6)
