"""What of dist.* may change between a run and the one that goes on from it."""

import pytest

from c2al.config import replace
from c2al.errors import CheckpointError
from c2al.training.trainer import train


def test_a_run_does_not_go_on_with_another_number_of_column_blocks(config, world, tmp_path):
    """Row-wise Adagrad keeps one moment per row and column block, so dist.* would change what is trained."""
    short = replace(config, **{"train.max_steps": 2})
    split = {"dist.sharding": ["column_wise"], "dist.tables": [{"name": "item_id", "min_partition": 4}]}
    train(replace(short, **split), tmp_path / "run", world)
    with pytest.raises(CheckpointError, match=r"table 'item_id' was trained in 2 column blocks.*\n.*set dist\.plan to"):
        train(short, tmp_path / "run", world)
    train(replace(short, **{"dist.plan": str(tmp_path / "run" / "plan.json")}), tmp_path / "run", world)  # as it says
    train(replace(short, **split), tmp_path / "run", world)
